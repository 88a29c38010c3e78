r"""What two points with orientations have in common with every moved copy of the pair.

:math:`\Delta = x_j - x_i` is sender minus receiver, :math:`o` the orientation at the receiver,
:math:`o'` at the sender, :math:`\Delta_\perp = \Delta - (o\cdot\Delta)\,o`. Three modes:

========== ============================= ==================================
mode       one orientation (space)       two orientations (sphere, full)
========== ============================= ==================================
reference  as published: lengths, no signs
smooth     the same in squared lengths, differentiable everywhere
complete   different orbits get different values; polynomial
========== ============================= ==================================

A grid tells its space by its shape: (N, 2) is the circle, (N, 3) the sphere, (N, 3, 3) the rotation
group, ``None`` positions alone.
"""

from typing import Literal

import torch
from torch import Tensor

Mode = Literal["reference", "smooth", "complete"]
MODES = ("reference", "smooth", "complete")


def spatial_invariants(delta: Tensor, grid: Tensor | None, mode: Mode) -> Tensor:
    r"""Invariants of :math:`\Delta` (..., d) and each orientation of the grid, (..., N, a).

    Positions: :math:`\lVert\Delta\rVert` (squared but for ``reference``), with N = 1.
    Circle: :math:`o\cdot\Delta,\ o^\perp\cdot\Delta`.
    Sphere: :math:`o\cdot\Delta,\ \lVert\Delta_\perp\rVert` (squared but for ``reference``).
    Rotations: :math:`R^T\Delta`, three numbers that see handedness.
    """
    if grid is None:
        squared = delta.square().sum(-1, keepdim=True)
        return (_length(squared) if mode == "reference" else squared).unsqueeze(-2)
    if grid.ndim == 3:
        return torch.einsum("...d,ndk->...nk", delta, grid)
    along = delta @ grid.T
    if grid.shape[-1] == 2:
        return torch.stack([along, delta @ _quarter_turn(grid).T], -1)
    # Not |Δ|² - (o·Δ)²: in float32 that is 0 for a bond a thousandth off the axis.
    across = (delta.unsqueeze(-2) - along.unsqueeze(-1) * grid).square().sum(-1)
    return torch.stack([along, _length(across) if mode == "reference" else across], -1)


def fibre_invariants(grid: Tensor, mode: Mode) -> Tensor:
    r"""Invariants of the orientations o (sender, first axis) and p (receiver), (N, N, a).

    :math:`o\cdot p`; on the circle ``complete`` adds the sine; for rotations :math:`R_o^T R_p`.
    """
    if grid.ndim == 3:
        return torch.einsum("ndk,mdl->nmkl", grid, grid).flatten(-2)
    cosine = grid @ grid.T
    if grid.shape[-1] == 2 and mode == "complete":
        return torch.stack([cosine, grid @ _quarter_turn(grid).T], -1)
    return cosine.unsqueeze(-1)


def full_invariants(delta: Tensor, grid: Tensor, mode: Mode, chiral: bool = False) -> Tensor:
    r"""Invariants of :math:`(\Delta, o', o)` for all pairs of orientations, (..., N', N, a).

    ``reference`` and ``smooth``: the spatial ones at the *sender's* orientation, then
    :math:`o'\cdot o`, so that the separable convolution is a special case. ``complete``, sphere:
    :math:`o\cdot\Delta,\ o'\cdot\Delta,\ \lVert\Delta\rVert^2,\ o\cdot o'`, the Gram matrix of the
    triple, complete for E(3); ``chiral`` adds :math:`\det[\Delta, o, o']`, complete for SE(3).
    ``complete``, circle: :math:`o'\cdot\Delta,\ o'^\perp\cdot\Delta`, cosine and sine.
    Rotations: :math:`R'^T\Delta` and :math:`R'^T R`.
    """
    n = grid.shape[0]
    shape = (*delta.shape[:-1], n, n)
    between = fibre_invariants(grid, mode)
    if grid.ndim == 2 and grid.shape[-1] == 3 and mode == "complete":
        along = delta @ grid.T
        squared = delta.square().sum(-1)[..., None, None]
        found = [along.unsqueeze(-2), along.unsqueeze(-1), squared, between[..., 0]]
        if chiral:
            cross = torch.linalg.cross(grid.unsqueeze(0), grid.unsqueeze(1))  # [o', o]: o x o'
            found.append(torch.einsum("...d,nmd->...nm", delta, cross))
        return torch.stack([one.expand(shape) for one in found], -1)
    at_sender = spatial_invariants(delta, grid, mode).unsqueeze(-2)
    parts = [at_sender.expand(*shape, -1), between.expand(*shape, -1)]
    return torch.cat(parts, -1)


def pair_invariants(
    delta: Tensor, receiver: Tensor, sender: Tensor, mode: Mode, chiral: bool = False
) -> Tensor:
    r"""Invariants of one pair of point-orientations each: (..., d) three times -> (..., a).

    As published the position is seen from the *receiver's* orientation here:
    :math:`o\cdot\Delta, \lVert\Delta_\perp\rVert, o\cdot o'`; ``complete`` as in
    ``full_invariants``.
    """
    along = (receiver * delta).sum(-1)
    between = (receiver * sender).sum(-1)
    if mode == "complete":
        found = [along, (sender * delta).sum(-1), delta.square().sum(-1), between]
        if chiral:
            found.append((delta * torch.linalg.cross(receiver, sender)).sum(-1))
        return torch.stack(found, -1)
    across = (delta - along.unsqueeze(-1) * receiver).square().sum(-1)
    return torch.stack([along, _length(across) if mode == "reference" else across, between], -1)


def window(delta: Tensor, cutoff: float) -> Tensor:
    r"""Envelope :math:`1 - 28 s^3 + 48 s^{7/2} - 21 s^4`, :math:`s=\lVert\Delta\rVert^2/r_c^2`.

    1 at :math:`\Delta = 0` and 0 from the cutoff on; value, first and second derivative vanish
    there (DimeNet's polynomial with p = 6). In s and not in the length, so that self-edges have
    finite second derivatives.
    """
    s = delta.square().sum(-1) / cutoff**2
    inside = s < 1
    s = torch.where(inside, s, torch.ones_like(s))
    return torch.where(inside, 1 - 28 * s**3 + 48 * s**3.5 - 21 * s**4, torch.zeros_like(s))


def _length(squared: Tensor) -> Tensor:
    """Square root whose derivatives at exactly 0 are 0: self-edges stay out of the branch."""
    off = squared > 0
    return torch.where(off, torch.where(off, squared, 1.0).sqrt(), 0.0)


def _quarter_turn(grid: Tensor) -> Tensor:
    return torch.stack([-grid[..., 1], grid[..., 0]], -1)
