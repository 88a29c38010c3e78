"""Between tensors at the points and functions on their orientations: lifting and read-out.

A field has the shape (..., N, C): at every point a function of N orientations with C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from weightshare.errors import UserError


class Readout(NamedTuple):
    """What a network says of points or graphs; a kind that was not asked for has 0 channels."""

    scalars: Tensor
    """(..., S)"""
    vectors: Tensor
    """(..., V, d)"""
    tensors: Tensor
    """(..., T, d, d), symmetric and traceless on the circle and the sphere"""


def fibre_channels(grid: Tensor | None, scalars: int, vectors: int, tensors: int) -> int:
    """Channels that so many tensors take on an orientation: one each, on the rotation group as many
    as they have components."""
    d = grid.shape[-1] if grid is not None and grid.ndim == 3 else 1
    return scalars + d * vectors + d * d * tensors


def lift(
    grid: Tensor | None,
    scalars: Tensor | None = None,
    vectors: Tensor | None = None,
    tensors: Tensor | None = None,
) -> Tensor:
    r"""Functions of the orientation, scalars first: :math:`s`, :math:`o\cdot v`, :math:`o^T T o`.

    On the rotation group :math:`R^T v` and :math:`R^T T R`, three and nine channels.

    Shapes: scalars (..., S), vectors (..., V, d), tensors (..., T, d, d) -> (..., N, C). Of a
    tensor the sphere sees the symmetric part.
    """
    parts = []
    n = 1 if grid is None else grid.shape[0]
    if scalars is not None:
        parts.append(scalars.unsqueeze(-2).expand(*scalars.shape[:-1], n, -1))
    if grid is None:
        if vectors is not None or tensors is not None:
            raise UserError("Vectors and tensors need orientations; give orientations >= 1.")
    elif grid.ndim == 2:
        if vectors is not None:
            parts.append(torch.einsum("...vd,nd->...nv", vectors, grid))
        if tensors is not None:
            parts.append(torch.einsum("...tde,nd,ne->...nt", tensors, grid, grid))
    else:
        if vectors is not None:
            parts.append(torch.einsum("...vd,ndk->...nvk", vectors, grid).flatten(-2))
        if tensors is not None:
            moved = torch.einsum("...tde,ndk,nel->...ntkl", tensors, grid, grid)
            parts.append(moved.flatten(-3))
    if not parts:
        raise UserError("The points carry nothing; give scalars, vectors or tensors.")
    return torch.cat(parts, -1)


def read(
    grid: Tensor | None, weights: Tensor, field: Tensor, scalars: int, vectors: int, tensors: int
) -> Readout:
    r"""Means over the orientations with quadrature weights w:
    :math:`\sum_n w_n y_n`, :math:`\sum_n w_n y_n o_n`, :math:`\sum_n w_n y_n (o_n o_n^T - I/d)`.

    Reading a lifted vector gives v/d on a grid with :math:`\sum w\,oo^T = I/d`; no factor d
    compensates it.
    """
    shape, dim = field.shape[:-2], (3 if grid is None else grid.shape[-1])
    parts = field.split(
        [scalars, *(fibre_channels(grid, *k) for k in ((0, vectors, 0), (0, 0, tensors)))], -1
    )
    mean = torch.einsum("...ns,n->...s", parts[0], weights)
    v = field.new_zeros(*shape, vectors, dim)
    t = field.new_zeros(*shape, tensors, dim, dim)
    if grid is not None and grid.ndim == 2:
        if vectors:
            v = torch.einsum("...nv,nd->...vd", parts[1], weights[:, None] * grid)
        if tensors:
            square = torch.einsum("nd,ne->nde", grid, grid)
            square = square - torch.eye(dim, dtype=grid.dtype, device=grid.device) / dim
            t = torch.einsum("...nt,nde->...tde", parts[2], weights[:, None, None] * square)
    elif grid is not None:
        turned = weights[:, None, None] * grid
        if vectors:
            v = torch.einsum("...nvk,ndk->...vd", parts[1].unflatten(-1, (vectors, dim)), turned)
        if tensors:
            y = parts[2].unflatten(-1, (tensors, dim, dim))
            t = torch.einsum("...ntkl,ndk,nel->...tde", y, turned, grid)
    return Readout(mean, v, t)
