"""Kernels from invariants: monomials, then a small network, evaluated once for all layers."""

from itertools import combinations_with_replacement, product

import torch
from torch import Tensor, nn

from weightshare.equivariant.pointwise import Gelu


def monomials(x: Tensor, degree: int) -> Tensor:
    """All distinct monomials of degree 1 to ``degree`` of the last axis, in lexicographic order."""
    columns = x.unbind(-1)
    found: dict[tuple[int, ...], Tensor] = {}
    for term in exponents(len(columns), degree):
        found[term] = columns[term[0]] if len(term) == 1 else found[term[:-1]] * columns[term[-1]]
    return torch.stack(list(found.values()), -1)


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
