"""Neighbour lists in plain torch: all pairs within a cutoff, in periodic cells of any size.

Conventions are ASE's: for an edge from sender j to receiver i with shift S,
``delta = positions[j] - positions[i] + S @ cell``. Periodic images of a point are its neighbours
too, also of itself, also where the cutoff exceeds the cell; a point and itself without a shift is
no edge here (networks add self-loops themselves).
"""

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from weightshare.equivariant.checks import check_finite
from weightshare.errors import UserError

BRUTE_FORCE = 512
"""Up to this many points all distances are computed; beyond, points are sorted into cells."""


class Neighbours(NamedTuple):
    """``edges`` (2, E) int64, senders then receivers, sorted by receiver; ``shifts`` (E, d)."""

    edges: Tensor
    shifts: Tensor


def radius_edges(positions: Tensor, cutoff: float, batch: Tensor | None = None) -> Tensor:
    """Edges (2, E) between different points of one graph that are nearer than ``cutoff``."""
    receiver, sender = _within(positions, positions, cutoff, batch, batch)
    different = receiver != sender
    return torch.stack([sender[different], receiver[different]])


def neighbour_list(
    positions: Tensor, cutoff: float, cell: Tensor | None = None, pbc: Tensor | None = None
) -> Neighbours:
    """All neighbours of every point nearer than ``cutoff``.

    Args:
        positions: (n, 3), inside the cell or not.
        cell: (3, 3), lattice vectors in rows; rows that are zero are allowed where not periodic.
        pbc: (3,) bool; default periodic in all directions where a cell is given.

    Raises:
        UserError: the cutoff is not a finite distance, a coordinate is not finite, there is no cell
            to repeat, or the lattice vectors of a periodic direction are linearly dependent.
    """
    if not 0 < cutoff < math.inf:
        raise UserError(f"The cutoff is {cutoff}; give a finite distance above 0.")
    positions = positions.detach()
    check_finite(positions)
    periodic = torch.tensor([cell is not None] * 3) if pbc is None else pbc.cpu().bool()
    if not bool(periodic.any()):
        edges = radius_edges(positions, cutoff)
        return Neighbours(edges, edges.new_zeros(edges.shape[1], positions.shape[1]))
    if cell is None or tuple(cell.shape) != (3, 3) or not bool(torch.isfinite(cell).all()):
        given = "nothing" if cell is None else cell.tolist()
        raise UserError(f"The cell is {given}; give (3, 3) finite lattice vectors in rows.")
    cell = completed(cell.detach().to(positions), periodic)
    inverse = torch.linalg.inv(cell)
    home = (positions @ inverse).floor() * periodic.to(positions)
    wrapped = positions - home @ cell
    # The distance between two lattice planes is one over the length of the reciprocal vector.
    reach = (cutoff * inverse.norm(dim=0)).ceil().long().cpu()
    ranges = [
        range(-int(r), int(r) + 1) if p else range(1) for r, p in zip(reach, periodic, strict=True)
    ]
    images = torch.tensor(list(product(*ranges)), dtype=positions.dtype, device=positions.device)
    ghosts = wrapped + (images @ cell)[:, None]
    low = wrapped.amin(0) - cutoff if len(wrapped) else wrapped.new_zeros(3)
    high = wrapped.amax(0) + cutoff if len(wrapped) else wrapped.new_zeros(3)
    image, atom = ((ghosts >= low) & (ghosts <= high)).all(-1).nonzero().T
    receiver, ghost = _within(wrapped, ghosts[image, atom], cutoff, None, None)
    sender = atom[ghost]
    shifts = images[image[ghost]] - home[sender] + home[receiver]
    itself = (sender == receiver) & (shifts == 0).all(-1)
    edges = torch.stack([sender, receiver])[:, ~itself]
    return Neighbours(edges, shifts[~itself].round().long())


def completed(cell: Tensor, periodic: Tensor) -> Tensor:
    """The cell (3, 3) with the directions that are not ``periodic`` (3,) replaced by orthogonal
    unit vectors."""
    rows = cell[periodic.to(cell.device)]
    if torch.linalg.matrix_rank(rows) < len(rows):
        raise UserError(
            f"The lattice vectors {rows.tolist()} are linearly dependent; give a cell with a "
            "volume, or set pbc to False."
        )
    full = cell.clone()
    if len(rows) < 3:
        free = torch.linalg.svd(rows, full_matrices=True).Vh[len(rows) :]
        full[~periodic.to(cell.device)] = free
    return full


def _within(
    targets: Tensor,
    sources: Tensor,
    cutoff: float,
    target_graph: Tensor | None,
    source_graph: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Indices of all (target, source) in one graph that are nearer than the cutoff, by target."""
    if len(targets) == 0 or len(sources) == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=targets.device)
        return empty, empty
    if max(len(targets), len(sources)) <= BRUTE_FORCE:
        near = (targets[:, None] - sources[None]).square().sum(-1) < cutoff**2
        if target_graph is not None and source_graph is not None:
            near &= target_graph[:, None] == source_graph[None]
        receiver, sender = near.nonzero().unbind(1)
        return receiver, sender
    return _in_cells(targets, sources, cutoff, target_graph, source_graph)


def _in_cells(
    targets: Tensor,
    sources: Tensor,
    cutoff: float,
    target_graph: Tensor | None,
    source_graph: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same by a cell list: only points in the 3^d cells around a target are compared."""
    low = torch.minimum(targets.amin(0), sources.amin(0))
    target_cell = ((targets - low) / cutoff).long()
    source_cell = ((sources - low) / cutoff).long()
    # A margin of one cell on each side keeps neighbouring cells from wrapping into the next row.
    sizes = torch.maximum(target_cell.amax(0), source_cell.amax(0)) + 3

    def key(cells: Tensor, graph: Tensor | None) -> Tensor:
        number = torch.zeros(len(cells), dtype=torch.int64, device=cells.device)
        number = number if graph is None else graph.clone()
        for axis in range(cells.shape[1]):
            number = number * sizes[axis] + cells[:, axis] + 1
        return number

    sorted_keys, order = key(source_cell, source_graph).sort()
    found: list[tuple[Tensor, Tensor]] = []
    here = torch.arange(len(targets), device=targets.device)
    for step in product((-1, 0, 1), repeat=targets.shape[1]):
        wanted = key(target_cell + torch.tensor(step, device=targets.device), target_graph)
        first = torch.searchsorted(sorted_keys, wanted)
        count = torch.searchsorted(sorted_keys, wanted, right=True) - first
        receiver = here.repeat_interleave(count)
        within = torch.arange(len(receiver), device=targets.device)
        within = within - (count.cumsum(0) - count).repeat_interleave(count)
        sender = order[first.repeat_interleave(count) + within]
        near = (targets[receiver] - sources[sender]).square().sum(-1) < cutoff**2
        found.append((receiver[near], sender[near]))
    receiver, sender = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = receiver.argsort(stable=True)
    return receiver[order], sender[order]
