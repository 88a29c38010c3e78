"""GELU, LayerNorm and monomials have torch's values and derivatives of every order."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from weightshare.equivariant.basis import monomials
from weightshare.equivariant.pointwise import Gelu, LayerNorm, contiguous


def derivatives(function, x, *weights):
    """Value, gradient, and the gradient of the gradient's size with respect to everything."""
    x = x.clone().requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return [y, slope, *torch.autograd.grad(slope.square().sum(), [x, *weights])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ])],
)  # fmt: skip
def test_values_and_two_derivatives_are_those_of_torch(dtype, device):
    torch.manual_seed(0)
    x = 2 * torch.randn(7, 3, 16, dtype=dtype, device=device)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"atol": 1e-12}
    tolerance.setdefault("rtol", 1e-11)
    for mine, theirs in zip(
        derivatives(Gelu(), x), derivatives(torch.nn.functional.gelu, x), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **tolerance)
    norm = LayerNorm(16).to(device, dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)

    def plain(x):
        return torch.nn.functional.layer_norm(x, (16,), norm.weight, norm.bias, norm.eps)

    weights = [norm.weight, norm.bias]
    for mine, theirs in zip(
        derivatives(norm, x, *weights), derivatives(plain, x, *weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_first_second_and_third_derivatives_are_those_of_the_value():
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    norm = LayerNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    for function in (Gelu(), norm, lambda x: monomials(x[:, :2], 3), lambda x: monomials(x, 2)):
        assert gradcheck(function, x)
        assert gradgradcheck(function, x)

        def slope(x, function=function):
            return torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)[0]

        assert gradgradcheck(slope, x)


def test_contiguous_puts_value_and_gradient_in_order():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert contiguous(x.T).is_contiguous() and gradgradcheck(lambda x: contiguous(x.T) ** 3, x)
    y = x.T.contiguous().requires_grad_()
    (slope,) = torch.autograd.grad(contiguous(y), y, torch.ones(3, 4, dtype=torch.float64).T)
    assert slope.is_contiguous()
