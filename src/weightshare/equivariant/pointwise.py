"""GELU and LayerNorm with short second derivatives.

Learning forces differentiates a derivative. For that pass torch spells out GELU in 9 and LayerNorm
in 60 small kernels, which at the size of molecules is most of a step. The values and first
derivatives here are torch's own; the second ones are written down in closed form.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

FUSED_GELU = """
template <typename T> T gelu_second(T second, T grad, T x) {
    T density = T(0.3989422804014327) * exp(T(-0.5) * x * x);
    return second * grad * density * (T(2) - x * x);
}
"""


class Gelu(nn.Module):
    r"""The exact GELU, :math:`x\,\Phi(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Gelu.apply(x)
        return found


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, affine."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _LayerNorm.apply(x, self.weight, self.bias, self.eps)
        return found


def contiguous(x: Tensor) -> Tensor:
    """``x`` in memory order, and its gradient, too."""
    found: Tensor = _Contiguous.apply(x)
    return found


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x) if x.is_contiguous() else x.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return contiguous(grad)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.aten.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        found: Tensor = _GeluSlope.apply(grad, x)
        return found


class _GeluSlope(torch.autograd.Function):
    r""":math:`g\,(\Phi + x\varphi)`, whose derivative by x is :math:`g\,\varphi\,(2 - x^2)`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(grad, x)
        return torch.ops.aten.gelu_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grad, x = ctx.saved_tensors
        by_grad = _GeluSlope.apply(second, x) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return by_grad, None
        if x.is_cuda and not torch.is_grad_enabled():
            return by_grad, _fused_gelu()(second, grad, x)
        square = x * x
        density = torch.exp(square * -0.5) / math.sqrt(2 * math.pi)
        return by_grad, second * grad * density * (2 - square)


@functools.cache
def _fused_gelu() -> Any:
    """One kernel for the ordinary case, in which nothing is differentiated a third time."""
    return torch.cuda.jiterator._create_jit_fn(FUSED_GELU)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        found, mean, rate = torch.ops.aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rate)
        ctx.eps = eps
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rate = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        if not torch.is_grad_enabled():
            return *torch.ops.aten.native_layer_norm_backward(
                grad, x, x.shape[-1:], mean, rate, weight, bias, needed
            ), None
        slope = _NormSlope.apply(grad * weight, x, mean, rate, ctx.eps) if needed[0] else None
        over = tuple(range(grad.ndim - 1))
        by_weight = (grad * _normalised(x, ctx.eps)).sum(over) if needed[1] else None
        return slope, by_weight, grad.sum(over) if needed[2] else None, None


class _NormSlope(torch.autograd.Function):
    r""":math:`s(g) = r\,(g - \overline g - \hat x\,\overline{g\hat x})`, symmetric in g.

    With :math:`r` the inverse deviation, bars for means over the channels and v the gradient that
    arrives, :math:`\partial_x\langle v, s(g)\rangle = -r\,(\hat x\,\overline{v\,s(g)} +
    \overline{g\hat x}\,s(v) + \overline{v\hat x}\,s(g))`.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, mean: Tensor, rate: Tensor, eps: float
    ) -> Tensor:
        found: Tensor = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, x.shape[-1:], mean, rate, None, None, [True, False, False]
        )[0]
        ctx.save_for_backward(grad, x, mean, rate, found)
        ctx.eps = eps
        return found

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, mean, rate, slope = ctx.saved_tensors
        other = _NormSlope.apply(second, x, mean, rate, ctx.eps)
        if not ctx.needs_input_grad[1]:
            return other, None, None, None, None
        if torch.is_grad_enabled():  # for third derivatives the deviation depends on x, too
            unit = _normalised(x, ctx.eps)
            rate = (x.var(-1, unbiased=False, keepdim=True) + ctx.eps).rsqrt()
        else:
            unit = (x - mean) * rate
        by_x = unit * (second * slope).mean(-1, keepdim=True)
        by_x = torch.addcmul(by_x, other, (grad * unit).mean(-1, keepdim=True))
        by_x = torch.addcmul(by_x, slope, (second * unit).mean(-1, keepdim=True))
        return other, by_x * -rate, None, None, None


def _normalised(x: Tensor, eps: float) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
