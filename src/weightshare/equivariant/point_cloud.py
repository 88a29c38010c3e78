"""PONITA on a point cloud in position-orientation space: every bond is a point with a direction."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from weightshare.equivariant.basis import KernelBasis
from weightshare.equivariant.checks import (
    check_batch,
    check_channels,
    check_edges,
    check_finite,
    check_precision,
    check_sizes,
    check_word,
)
from weightshare.equivariant.convolution import ConvNextBlock, Kernels, SeparableConv
from weightshare.equivariant.fields import Readout
from weightshare.equivariant.invariants import Mode, pair_invariants
from weightshare.equivariant.pairs import Pairs, full_edges
from weightshare.errors import UserError


class LiftedCloud(NamedTuple):
    """Bonds as points with an orientation."""

    atom: Tensor
    """(M,) the atom where the bond stands: its receiver."""
    orientation: Tensor
    """(M, d) unit vector from the receiver to the sender."""
    edges: Tensor
    """(2, E) pairs of bonds whose atoms are bonded or the same, senders first."""


def lift_bonds(positions: Tensor, edges: Tensor) -> LiftedCloud:
    """Every directed bond becomes a point at its receiving atom, pointing to the sender.

    Two such points are connected when their atoms are connected or equal. Edges from an atom to
    itself are left out.

    Raises:
        UserError: bonded atoms stand in one place, so that the bond has no direction.
    """
    check_edges(edges, len(positions))
    edges = edges[:, edges[0] != edges[1]]
    source, atom = edges
    gap = positions[source] - positions[atom]
    length = gap.norm(dim=-1, keepdim=True)
    if not length.is_cuda and bool((length == 0).any()):
        row = int((length == 0).nonzero()[0, 0])
        raise UserError(
            f"Points {int(source[row])} and {int(atom[row])} stand in one place, so that the edge "
            "between them has no direction; move one or remove the edge."
        )
    here = torch.arange(len(positions), device=edges.device)
    # Atom pairs that exchange messages, each with all bonds at the one and all at the other.
    senders, receivers = torch.cat([edges, here.expand(2, -1)], 1).unique(dim=1)
    order = atom.argsort(stable=True)
    count = torch.bincount(atom, minlength=len(positions))
    first = count.cumsum(0) - count
    ways = count[senders] * count[receivers]
    pair = torch.arange(len(ways), device=edges.device).repeat_interleave(ways)
    number = torch.arange(len(pair), device=edges.device)
    number = number - (ways.cumsum(0) - ways).repeat_interleave(ways)
    width = count[receivers][pair]
    a = order[first[senders][pair] + number.div(width, rounding_mode="floor")]
    b = order[first[receivers][pair] + number.remainder(width)]
    return LiftedCloud(atom, gap / length, torch.stack([a, b]))


class PonitaPoints(nn.Module):
    r"""The network on the cloud of bonds: one orientation per point instead of a grid.

    .. math:: x'[i] = \sum_{j\to i} (W\,b(\Delta_{ij}, o_i, o_j)) \odot x[j]

    with the ConvNeXt block of ``Ponita``. It is exactly equivariant to all rotations and
    reflections (``chiral``: to rotations alone), since orientations move with the points. Scalars
    of a bond are those of its receiving atom, vectors their component along the bond; an atom reads
    the mean over its bonds, 0 without any.

    Args:
        scalars, vectors, scalars_out, vectors_out: channels.
        hidden, layers, basis, widening, degree: as for ``Ponita``.
        invariants: ``reference``: :math:`o_i\cdot\Delta, \lVert\Delta_\perp\rVert, o_i\cdot o_j`;
            ``smooth`` the same with the square; ``complete`` also :math:`o_j\cdot\Delta`.
        chiral: adds the determinant to the complete ones.
        mean: average the messages of a point instead of summing them (as published).
        level: sum over each graph, or not.
    """

    def __init__(
        self,
        scalars: int = 0,
        vectors: int = 0,
        *,
        scalars_out: int = 0,
        vectors_out: int = 0,
        hidden: int = 128,
        layers: int = 5,
        basis: int = 256,
        widening: int = 4,
        degree: int = 3,
        invariants: Mode = "smooth",
        chiral: bool = False,
        mean: bool = False,
        layer_scale: float | None = None,
        level: str = "graph",
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = (scalars, vectors), (scalars_out, vectors_out)
        sizes = (hidden, layers, basis, widening, degree)
        check_sizes(self.inputs, self.outputs, sizes, invariants, level)
        if chiral and invariants != "complete":
            raise UserError("chiral adds the determinant to complete invariants; ask for these.")
        self.mode, self.chiral, self.mean, self.level = invariants, chiral, mean, level
        count = 3 if invariants != "complete" else 5 if chiral else 4
        self.basis = KernelBasis(count, hidden, basis, degree)
        self.embed = nn.Linear(scalars + vectors, hidden, bias=False)
        self.blocks = nn.ModuleList(
            ConvNextBlock(SeparableConv(hidden, basis, False), hidden, widening, layer_scale)
            for _ in range(layers)
        )
        self.readouts = nn.ModuleList(
            nn.Linear(hidden, scalars_out + vectors_out) for _ in range(layers)
        )

    def forward(
        self,
        positions: Tensor,
        scalars: Tensor | None = None,
        vectors: Tensor | None = None,
        *,
        edges: Tensor | Literal["full"],
        batch: Tensor | None = None,
        graphs: int | None = None,
    ) -> Readout:
        """Read-outs of atoms or graphs; shapes as for ``Ponita`` with an edge list, or "full"."""
        if positions.ndim != 2:
            raise UserError(
                f"positions have shape {tuple(positions.shape)}; give (points, dimensions)."
            )
        check_channels(positions, (scalars, vectors), self.inputs)
        check_precision(positions, (scalars, vectors), self.embed.weight.dtype)
        check_finite(positions)
        check_batch(batch, len(positions), graphs)
        points, dim = positions.shape
        if self.chiral and dim != 3:
            raise UserError(
                f"positions have {dim} dimensions; handedness by a determinant needs 3."
            )
        if not isinstance(edges, Tensor):
            check_word(edges)
            alone = torch.zeros(points, dtype=torch.int64, device=positions.device)
            edges = full_edges(alone if batch is None else batch)
        cloud = lift_bonds(positions, edges)
        parts = [] if scalars is None else [scalars[cloud.atom]]
        if vectors is not None:
            parts.append(torch.einsum("mvd,md->mv", vectors[cloud.atom], cloud.orientation))
        field = self.embed(torch.cat(parts, -1)).unsqueeze(-2)
        sender, receiver = cloud.edges
        delta = positions[cloud.atom[sender]] - positions[cloud.atom[receiver]]
        o = cloud.orientation
        features = pair_invariants(delta, o[receiver], o[sender], self.mode, self.chiral)
        spatial = self.basis(features).unsqueeze(-2)
        bonds = len(cloud.atom)
        if self.mean:
            heard = torch.bincount(receiver, minlength=bonds).clamp(min=1).to(spatial)
            spatial = spatial / heard[receiver, None, None]
        pairs = Pairs(delta, bonds, sender, receiver)
        kernels = Kernels(pairs, spatial, None, spatial.new_ones(1), None, None)
        said = torch.zeros((), dtype=field.dtype, device=field.device)
        for block, readout in zip(self.blocks, self.readouts, strict=True):
            field = block(field, kernels)
            said = said + readout(field).squeeze(-2) / len(self.blocks)
        share = 1 / torch.bincount(cloud.atom, minlength=points).clamp(min=1).to(said)
        s, v = said.split(list(self.outputs), -1)
        v = v.unsqueeze(-1) * o.unsqueeze(-2)
        s = s.new_zeros(points, s.shape[1]).index_add(0, cloud.atom, s * share[cloud.atom, None])
        v = v.new_zeros(points, *v.shape[1:]).index_add(
            0, cloud.atom, v * share[cloud.atom, None, None]
        )
        t = s.new_zeros(points, 0, dim, dim)
        if self.level == "node":
            return Readout(s, v, t)
        if batch is None:
            return Readout(s.sum(0, True), v.sum(0, True), t.sum(0, True))
        graphs = int(batch.max()) + 1 if graphs is None else graphs
        return Readout(
            *(x.new_zeros(graphs, *x.shape[1:]).index_add(0, batch, x) for x in (s, v, t))
        )
