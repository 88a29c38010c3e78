"""Kernels from invariants: monomials, then a small network, evaluated once for all layers."""

import functools
from itertools import combinations_with_replacement, product
from typing import Any

import torch
from torch import Tensor, nn

from weightshare.equivariant.pointwise import Gelu


def monomials(x: Tensor, degree: int) -> Tensor:
    """All distinct monomials of degree 1 to ``degree`` of the last axis, in lexicographic order."""
    if x.shape[-1] > 2 or not x.requires_grad:
        return _columns(x, degree)
    found: Tensor = _Monomials.apply(x, degree)
    return found


def _columns(x: Tensor, degree: int) -> Tensor:
    columns = x.unbind(-1)
    found: dict[tuple[int, ...], Tensor] = {}
    for term in exponents(len(columns), degree):
        found[term] = columns[term[0]] if len(term) == 1 else found[term[:-1]] * columns[term[-1]]
    return torch.stack(list(found.values()), -1)


class _Monomials(torch.autograd.Function):
    """Monomials whose derivatives are a matrix times the monomials: four kernels instead of the
    dozens that torch writes for the products one by one, in force training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, degree: int) -> Tensor:
        found = _columns(x, degree)
        ctx.save_for_backward(found)
        ctx.inputs, ctx.degree = x.shape[-1], degree
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (found,) = ctx.saved_tensors
        start, rest = _derivatives(ctx.inputs, ctx.degree, found.dtype, found.device)
        slopes = torch.addmm(start, found.flatten(0, -2), rest)
        slopes = slopes.view(*found.shape[:-1], ctx.inputs, found.shape[-1])
        return (slopes * grad.unsqueeze(-2)).sum(-1), None


@functools.cache
def _derivatives(
    inputs: int, degree: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The derivative of every monomial by every input as constants (inputs * terms,) and
    coefficients (terms, inputs * terms) of the monomials."""
    terms = exponents(inputs, degree)
    table = torch.zeros(len(terms) + 1, inputs, len(terms), dtype=dtype)
    for column, term in enumerate(terms):
        for row in set(term):
            left = list(term)
            left.remove(row)
            place = terms.index(tuple(left)) + 1 if left else 0
            table[place, row, column] = term.count(row)
    table = table.flatten(1).to(device)
    return table[0], table[1:]


def exponents(inputs: int, degree: int) -> list[tuple[int, ...]]:
    """The distinct monomials as sorted index tuples: (0,), (1,), (0, 0), (0, 1), ..."""
    terms = range(1, degree + 1)
    return [t for size in terms for t in combinations_with_replacement(range(inputs), size)]


def fold_duplicates(weight: Tensor, inputs: int, degree: int) -> Tensor:
    """Columns for repeated outer products (the published layout, 14 for 2 inputs and degree 3, in
    which xy and yx both stand) summed into columns for the distinct monomials (9)."""
    place = {term: k for k, term in enumerate(exponents(inputs, degree))}
    terms = [t for size in range(1, degree + 1) for t in product(range(inputs), repeat=size)]
    index = torch.tensor([place[tuple(sorted(term))] for term in terms], device=weight.device)
    return weight.new_zeros(weight.shape[0], len(place)).index_add(1, index, weight)


class KernelBasis(nn.Module):
    r"""Basis functions of the invariants a:
    :math:`b = \mathrm{GELU}(W_2\,\mathrm{GELU}(W_1\,m(a/\ell) + c_1) + c_2)`, m the monomials.

    Args:
        inputs: number of invariants.
        hidden: width between the two layers.
        basis: number of basis functions K.
        degree: highest total degree of the monomials.

    Shapes: (..., inputs) -> (..., basis). The first layer starts as the published one, which holds
    every ordering of a mixed monomial, with equal columns added.
    """

    def __init__(self, inputs: int, hidden: int, basis: int, degree: int) -> None:
        super().__init__()
        self.inputs, self.degree = inputs, degree
        self.first = nn.Linear(len(exponents(inputs, degree)), hidden)
        self.second = nn.Linear(hidden, basis)
        self.gelu = Gelu()
        published = nn.Linear(sum(inputs**size for size in range(1, degree + 1)), hidden)
        with torch.no_grad():
            self.first.weight.copy_(fold_duplicates(published.weight, inputs, degree))
            self.first.bias.copy_(published.bias)

    def forward(self, invariants: Tensor) -> Tensor:
        features = monomials(invariants, self.degree)
        basis: Tensor = self.gelu(self.second(self.gelu(self.first(features))))
        return basis
