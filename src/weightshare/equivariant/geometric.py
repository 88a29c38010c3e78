"""PyTorch Geometric: graphs in, read-outs out, and two transforms.

Nothing here changes a graph that it is given: ``BaseTransform`` hands over a shallow copy, whose
attributes are replaced and never written into.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.transforms import BaseTransform

from weightshare.equivariant.fields import Readout
from weightshare.equivariant.grids import random_rotations
from weightshare.equivariant.neighbours import radius_edges
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
        if data.pos is None:
            raise UserError("The graph has no positions; set data.pos to (points, d).")
        edges = "full" if self.fully_connected else data.edge_index
        graphs = data.num_graphs if data.batch is not None else None
        found: Readout = self.network(
            data.pos,
            data.get(self.scalars),
            data.get(self.vectors),
            edges=edges,
            batch=data.batch,
            graphs=graphs,
        )
        return found


@functional_transform("random_rotation_so")
class RandomRotation(BaseTransform):
    """Rotate every graph by its own random rotation: positions and all named vectors.

    Args:
        attributes: vectors (..., d) at points, or one row per graph.
    """

    def __init__(self, attributes: Sequence[str] = ("pos",)) -> None:
        self.attributes = tuple(attributes)

    def forward(self, data: Data) -> Data:
        graphs = 1 if data.batch is None else data.num_graphs
        turns = random_rotations(graphs, data.pos.shape[-1]).to(data.pos)
        batch = data.batch
        if batch is None:
            batch = torch.zeros(len(data.pos), dtype=torch.int64, device=data.pos.device)
        for name in self.attributes:
            x = data[name]
            rows = turns[batch] if len(x) == len(batch) else turns
            data[name] = torch.einsum("n...d,ned->n...e", x, rows)
        return data


@functional_transform("radius_edges")
class RadiusEdges(BaseTransform):
    """``edge_index`` of all points of a graph nearer than ``radius``, in plain torch."""

    def __init__(self, radius: float) -> None:
        if not radius > 0:
            raise UserError(f"The radius is {radius}; give a distance above 0.")
        self.radius = radius

    def forward(self, data: Data) -> Data:
        data.edge_index = radius_edges(data.pos, self.radius, data.batch)
        return data
