"""The gradient of a linear layer's weight as its two factors, never formed.

A linear layer that saw inputs A ``(n, d_in)`` and output gradients B ``(n, d_out)`` has the weight
gradient ``G = Bᵀ A``. Inner products need no G:

    ⟨G_1, G_2⟩ = Σ_ab (A_1 A_2ᵀ)_ab (B_1 B_2ᵀ)_ab

which is cheaper when n is below about ``d_in·d_out / (d_in + d_out)``, and exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Factors:
    """The gradient ``outputsᵀ inputs`` of a weight ``(d_out, d_in)``, as its factors."""

    inputs: Tensor  # (n, d_in)
    outputs: Tensor  # (n, d_out)

    def dense(self) -> Tensor:
        """The gradient itself, ``(d_out, d_in)``."""
        return self.outputs.T @ self.inputs

    def __add__(self, other: "Factors") -> "Factors":
        return Factors(
            torch.cat([self.inputs, other.inputs]), torch.cat([self.outputs, other.outputs])
        )


class GhostLinear(torch.autograd.Function):
    """``F.linear`` whose backward hands the factors to ``receive`` and forms no weight gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        receive: Callable[[Factors], None],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.receive = receive
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        ctx.receive(Factors(x.detach().flatten(0, -2), g.flatten(0, -2).to(x.dtype)))
        # Under autocast the output gradient is of lower precision than the stored weight.
        to_input = (g @ weight.to(g.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_bias = g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return to_input, None, to_bias, None
