"""Recomputation that also saves memory when derivatives are differentiated again.

Checkpointing as torch has it keeps, when a gradient is itself to be differentiated (forces in a
loss), the whole graph of the recomputed forward pass until the second backward pass; nothing is
saved then. Here the gradient is computed again too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = Callable[..., Tensor]


def recomputed(function: Function, *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, of which only the inputs are kept for the first and second backward
    pass. ``function`` must be pure and take every tensor it depends on as an input. Third
    derivatives are refused."""
    found: Tensor = _Value.apply(function, *inputs)
    return found


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        slopes = iter(_Slope.apply(ctx.function, needed, grad, *ctx.saved_tensors))
        return (None, *(next(slopes) if need else None for need in needed))


class _Slope(torch.autograd.Function):
    """The vector-Jacobian product of the function, and in turn its derivative."""

    @staticmethod
    def forward(
        ctx: Any, function: Function, needed: tuple[bool, ...], grad: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.needed = function, needed
        ctx.save_for_backward(grad, *inputs)
        return _slopes(function, needed, grad, inputs, create_graph=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *seconds: Tensor) -> tuple[Tensor | None, ...]:
        grad, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(need)
                for t, need in zip((grad, *inputs), wanted, strict=True)
            ]
            outputs = _slopes(ctx.function, ctx.needed, leaves[0], leaves[1:], create_graph=True)
            pairs = [(o, s) for o, s in zip(outputs, seconds, strict=True) if o.requires_grad]
            chosen = [leaf for leaf in leaves if leaf.requires_grad]
            found: list[Tensor | None] = [None] * len(chosen)
            if pairs and chosen:
                found = list(
                    torch.autograd.grad(
                        [o for o, _ in pairs], chosen, [s for _, s in pairs], allow_unused=True
                    )
                )
        rest = iter(found)
        return (None, None, *(next(rest) if need else None for need in wanted))


def _slopes(
    function: Function,
    needed: tuple[bool, ...],
    grad: Tensor,
    inputs: Any,
    create_graph: bool,
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [
            t if create_graph and t.requires_grad else t.detach().requires_grad_(need)
            for t, need in zip(inputs, needed, strict=True)
        ]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        return torch.autograd.grad(
            function(*leaves), wanted, grad, create_graph=create_graph, materialize_grads=True
        )
