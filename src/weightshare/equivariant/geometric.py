"""PyTorch Geometric: graphs in, read-outs out, the convolution as a layer, and two transforms.

Nothing here changes a graph that it is given: ``BaseTransform`` hands over a shallow copy, whose
attributes are replaced and never written into.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.transforms import BaseTransform

from weightshare.equivariant.checks import (
    check_edges,
    check_finite,
    check_positive,
    check_precision,
    check_sizes,
    checked_grid,
)
from weightshare.equivariant.convolution import BasisFunctions, SeparableConv
from weightshare.equivariant.fields import Readout
from weightshare.equivariant.grids import make_grid, random_rotations
from weightshare.equivariant.invariants import Mode
from weightshare.equivariant.neighbours import radius_edges
from weightshare.equivariant.pairs import edge_pairs
from weightshare.errors import UserError


class PonitaGraph(nn.Module):
    """A network on ``Data`` or ``Batch``: ``pos``, ``x`` as scalars, ``vectors``, ``edge_index``
    (row 0 sends, row 1 receives), ``batch``.

    Args:
        network: a ``Ponita`` or ``PonitaPoints``.
        scalars, vectors: attributes of the graph that hold (n, S) and (n, V, d).
        fully_connected: connect all points of each graph and ignore ``edge_index``.
    """

    def __init__(
        self,
        network: nn.Module,
        scalars: str = "x",
        vectors: str = "vectors",
        fully_connected: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.scalars, self.vectors = network, scalars, vectors
        self.fully_connected = fully_connected

    def forward(self, data: Data) -> Readout:
        """Read-outs of the graph's points or of the graphs."""
        edges = "full" if self.fully_connected else data.edge_index
        graphs = data.num_graphs if isinstance(data, Batch) else None
        found: Readout = self.network(
            _positions(data),
            data.get(self.scalars),
            data.get(self.vectors),
            edges=edges,
            batch=data.batch,
            graphs=graphs,
        )
        return found


class PonitaConv(nn.Module):
    r"""The separable convolution as a layer: ``conv(x, pos, edge_index)``.

    .. math::
        x_1[i,o] = \sum_{j\to i} k_s(p_j - p_i, o) \odot x[j,o], \qquad
        x'[i,p] = \tfrac1N \sum_o k_f(o \cdot p) \odot x_1[i,o] + \text{bias}

    Every layer has kernels of its own; ``Ponita`` computes the basis of all its layers once.

    Args:
        channels: of the field, in and out; they are not mixed.
        orientations, grid, dim: see ``Ponita``; ``conv.grid`` is what ``lift`` and ``read`` take.
        hidden, basis, degree, invariants: of the kernels.
        cutoff: distance at which messages have faded to zero, or None.
        self_loops: every point also hears itself.

    Shapes: x (n, N, C), pos (n, d), edge_index (2, E) with senders in row 0 -> (n, N, C).
    """

    grid: Tensor
    weights: Tensor

    def __init__(
        self,
        channels: int,
        orientations: int = 20,
        *,
        grid: Tensor | None = None,
        dim: int = 3,
        hidden: int = 128,
        basis: int = 256,
        degree: int = 3,
        invariants: Mode = "smooth",
        cutoff: float | None = None,
        self_loops: bool = True,
    ) -> None:
        super().__init__()
        check_sizes([channels], [channels], (hidden, basis, degree), invariants, "node")
        check_positive(cutoff=cutoff)
        chosen = checked_grid(make_grid(orientations, dim) if grid is None else grid, dim)
        self.self_loops = self_loops
        self.register_buffer("grid", chosen)
        self.register_buffer("weights", chosen.new_full((len(chosen),), 1 / len(chosen)))
        self.functions = BasisFunctions(
            chosen, invariants, False, False, hidden, basis, degree, cutoff, 1.0, None
        )
        self.conv = SeparableConv(channels, basis, True)

    def forward(self, x: Tensor, pos: Tensor, edge_index: Tensor) -> Tensor:
        check_edges(edge_index, len(pos))
        wanted = (len(pos), len(self.grid), self.conv.bias.shape[0])
        if tuple(x.shape) != wanted:
            raise UserError(f"x has shape {tuple(x.shape)}; give (points, N, C), here {wanted}.")
        check_precision(pos, (), self.conv.bias.dtype)
        check_finite(pos)
        pairs = edge_pairs(pos, edge_index, self_loops=self.self_loops)
        kernels = self.functions(pairs, self.grid.to(pos), self.weights.to(pos))
        found: Tensor = self.conv(x, kernels)
        return found


def _positions(data: Data) -> Tensor:
    if data.pos is None:
        raise UserError("The graph has no positions; set data.pos to (points, d).")
    return data.pos


@functional_transform("random_rotation_so")
class RandomRotation(BaseTransform):
    """Rotate every graph by its own random rotation: positions and all named vectors.

    Args:
        attributes: vectors (..., d) at points, or one row per graph.
    """

    def __init__(self, attributes: Sequence[str] = ("pos",)) -> None:
        self.attributes = tuple(attributes)

    def forward(self, data: Data) -> Data:
        pos, batch = _positions(data), data.batch
        if batch is None:
            batch = torch.zeros(len(pos), dtype=torch.int64, device=pos.device)
        graphs = (
            data.num_graphs
            if isinstance(data, Batch)
            else int(batch.max()) + 1
            if len(batch)
            else 0
        )
        turns = random_rotations(graphs, pos.shape[-1]).to(pos)
        for name in self.attributes:
            x = data[name]
            rows = turns[batch] if len(x) == len(batch) else turns
            data[name] = torch.einsum("n...d,ned->n...e", x, rows)
        return data


@functional_transform("radius_edges")
class RadiusEdges(BaseTransform):
    """``edge_index`` of all points of a graph nearer than ``radius``, in plain torch."""

    def __init__(self, radius: float) -> None:
        check_positive(radius=radius)
        self.radius = radius

    def forward(self, data: Data) -> Data:
        data.edge_index = radius_edges(_positions(data), self.radius, data.batch)
        return data
