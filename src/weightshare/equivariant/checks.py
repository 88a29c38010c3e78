"""What the networks refuse: one sentence where the input enters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weightshare.equivariant.invariants import MODES
from weightshare.errors import UserError


def check_graphs(
    positions: Tensor,
    inputs: Sequence[Tensor | None],
    channels: Sequence[int],
    dim: int,
    edges: Tensor | str | None,
    offsets: Tensor | None,
    batch: Tensor | None,
    graphs: int | None,
    mask: Tensor | None,
    *,
    has_cutoff: bool,
    dtype: torch.dtype,
) -> None:
    """Refuse arguments of ``Ponita.forward`` that do not fit together."""
    if positions.ndim not in (2, 3) or positions.shape[-1] != dim:
        raise UserError(
            f"positions have shape {tuple(positions.shape)}; give (points, {dim}), or "
            f"(graphs, points, {dim}) for fully connected graphs of one size."
        )
    lead = positions.shape[:-1]
    check_channels(positions, inputs, channels)
    check_precision(positions, inputs, dtype)
    if mask is not None and (tuple(mask.shape) != tuple(lead) or mask.dtype != torch.bool):
        raise UserError(
            f"mask has shape {tuple(mask.shape)} and type {mask.dtype}; give {tuple(lead)} bool, "
            "False at padding."
        )
    if mask is not None and positions.ndim == 2:
        raise UserError("A mask is for padded graphs (graphs, points, d); leave out the padding.")
    check_finite(positions, mask)
    if offsets is not None and not isinstance(edges, Tensor):
        raise UserError("offsets belong to edges; give edges (2, E), or leave the offsets out.")
    if positions.ndim == 3:
        if edges is not None or batch is not None:
            raise UserError(
                "Graphs given as (graphs, points, d) are fully connected; leave out edges and "
                "batch, or give points as (points, d)."
            )
        return
    check_batch(batch, lead[0], graphs)
    if isinstance(edges, Tensor):
        check_edges(edges, lead[0])
        if offsets is not None and tuple(offsets.shape) != (edges.shape[1], dim):
            raise UserError(
                f"offsets have shape {tuple(offsets.shape)}; give {(edges.shape[1], dim)}."
            )
    elif edges is None and not has_cutoff:
        raise UserError(
            "No edges: give edges (2, E), edges='full', or build the network with a cutoff."
        )
    elif edges is not None:
        check_word(edges)


def check_precision(positions: Tensor, inputs: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    """Refuse a mixture of precisions that autocast does not settle."""
    if torch.is_autocast_enabled(positions.device.type):
        return
    if positions.dtype != dtype:
        raise UserError(
            f"positions are {positions.dtype} and the network's weights {dtype}; convert one of "
            "them, for instance with network.to(positions.dtype)."
        )
    for name, one in zip(("scalars", "vectors", "tensors"), inputs, strict=False):
        if one is not None and one.dtype != dtype:
            raise UserError(f"{name} are {one.dtype} and positions {dtype}; convert one of them.")


def check_batch(batch: Tensor | None, points: int, graphs: int | None) -> None:
    """Refuse a batch vector that does not name one of the graphs for every point."""
    if batch is None:
        return
    if tuple(batch.shape) != (points,) or batch.dtype != torch.int64:
        raise UserError(
            f"batch has shape {tuple(batch.shape)} and type {batch.dtype}; give {(points,)} int64, "
            "the graph of every point."
        )
    if points and not batch.is_cuda:
        low, high = int(batch.min()), int(batch.max())
        if low < 0 or (graphs is not None and high >= graphs):
            raise UserError(
                f"batch names the graphs {low} to {high}; use 0 to "
                f"{'the number of graphs' if graphs is None else graphs} - 1."
            )


def check_word(edges: object) -> None:
    """Refuse any word for edges but "full"."""
    if edges != "full":
        raise UserError(f"edges is {edges!r}; give a tensor (2, E) or 'full'.")


def check_channels(
    positions: Tensor, given: Sequence[Tensor | None], channels: Sequence[int]
) -> None:
    """Refuse inputs at the points, scalars, vectors and tensors in turn, that are not (..., C),
    (..., C, d) and (..., C, d, d)."""
    lead, d = positions.shape[:-1], positions.shape[-1]
    names = ("scalars", "vectors", "tensors")
    for rank, (one, count) in enumerate(zip(given, channels, strict=True)):
        wanted = (*lead, count, *(d,) * rank)
        if (one is None) != (count == 0) or (one is not None and tuple(one.shape) != wanted):
            shape = "nothing" if one is None else tuple(one.shape)
            need = wanted if count else "nothing"
            raise UserError(f"{names[rank]}: the network takes {need} here and was given {shape}.")


def check_finite(positions: Tensor, mask: Tensor | None = None) -> None:
    """Refuse coordinates that are not finite, but for padding. Not looked at on a GPU, where the
    step would have to wait."""
    if not positions.is_cuda and not bool(torch.isfinite(positions).all()):
        good = torch.isfinite(positions).all(-1)
        if mask is None or bool((~good & mask).any()):
            raise UserError(
                "positions hold a coordinate that is not finite; remove or repair that point."
            )


def checked_grid(grid: Tensor, dim: int) -> Tensor:
    """The grid in float64, if it is (N, d) unit vectors or (N, 3, 3) rotations."""
    grid = grid.double()
    shapes = ((3,), (3, 3)) if dim == 3 else ((dim,),)
    if tuple(grid.shape[1:]) not in shapes or len(grid) == 0:
        rotations = " or (N, 3, 3) rotations" if dim == 3 else ""
        raise UserError(
            f"The grid has shape {tuple(grid.shape)}; give (N, {dim}) unit vectors{rotations}."
        )
    if grid.ndim == 2:
        wrong = (grid.norm(dim=-1) - 1).abs().max()
    else:
        turns = grid @ grid.mT - torch.eye(3, dtype=grid.dtype, device=grid.device)
        wrong = torch.maximum(turns.abs().max(), (torch.linalg.det(grid) - 1).abs().max())
    if not wrong < 1e-4:
        raise UserError(
            "The grid's orientations must have length 1 (rotations: be orthogonal, without a "
            "reflection)."
        )
    return grid


def check_positive(**lengths: float | None) -> None:
    """Refuse lengths that are given and not above 0."""
    for name, value in lengths.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value}; give a distance above 0.")


def check_sizes(
    inputs: Sequence[int],
    outputs: Sequence[int],
    sizes: Sequence[int],
    invariants: str,
    level: str,
) -> None:
    """Refuse what no network can have."""
    if not any(inputs) or not any(outputs):
        raise UserError("Give at least one input and one output channel (scalars, vectors...).")
    if min(*inputs, *outputs) < 0 or min(sizes) < 1:
        raise UserError(
            "Channels must be 0 or more, hidden, layers, basis, widening and degree 1 or more."
        )
    if invariants not in MODES:
        raise UserError(f"invariants is {invariants!r}; give {', '.join(MODES)}.")
    if level not in ("node", "graph"):
        raise UserError(f"level is {level!r}; give node or graph.")


def check_options(
    inputs: tuple[int, int, int],
    outputs: tuple[int, int, int],
    grid: Tensor | None,
    invariants: str,
    convolution: str,
    chiral: bool,
    recompute: str | None,
    sizes: Sequence[int],
    level: str,
) -> None:
    """Refuse a network on a grid that cannot be built."""
    check_sizes(inputs, outputs, sizes, invariants, level)
    if grid is None and any([*inputs[1:], *outputs[1:]]):
        raise UserError("Vectors and tensors need orientations; give orientations >= 1.")
    if recompute not in (None, "messages", "basis"):
        raise UserError(f"recompute is {recompute!r}; give messages, basis, or None.")
    if convolution not in ("separable", "full"):
        raise UserError(f"convolution is {convolution!r}; give separable or full.")
    if convolution == "full" and grid is None:
        raise UserError("A full convolution needs orientations; give orientations >= 1.")
    sphere = grid is not None and grid.ndim == 2 and grid.shape[-1] == 3
    if chiral and not (sphere and invariants == "complete" and convolution == "full"):
        raise UserError(
            "chiral needs a full convolution on the sphere with complete invariants; a separable "
            "one cannot see handedness."
        )


def check_edges(edges: Tensor, nodes: int) -> None:
    """Refuse what is no edge list of so many points."""
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype != torch.int64:
        raise UserError(
            f"edges have shape {tuple(edges.shape)} and type {edges.dtype}; give (2, E) int64 with "
            "senders in row 0 and receivers in row 1."
        )
    if edges.numel() and not edges.is_cuda and (edges.min() < 0 or edges.max() >= nodes):
        raise UserError(
            f"edges name points {int(edges.min())} to {int(edges.max())} of {nodes} points; "
            f"use 0 to {nodes - 1}."
        )
