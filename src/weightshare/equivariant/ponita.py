"""PONITA: an equivariant network on point clouds by weight sharing over positions and orientations.

After "Fast, Expressive SE(n) Equivariant Networks through Weight-Sharing in Position-Orientation
Space" (Bekkers et al., ICLR 2024, arXiv 2310.02970).
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightshare.equivariant import fields, grids
from weightshare.equivariant.checks import (
    check_graphs,
    check_options,
    check_positive,
    checked_grid,
)
from weightshare.equivariant.convolution import (
    BasisFunctions,
    ConvNextBlock,
    FullConv,
    Kernels,
    Recompute,
    SeparableConv,
    calibrating,
)
from weightshare.equivariant.fields import Readout
from weightshare.equivariant.invariants import Mode
from weightshare.equivariant.neighbours import radius_edges
from weightshare.equivariant.pairs import (
    Pairs,
    dense_pairs,
    edge_pairs,
    equal_sizes,
    full_edges,
)
from weightshare.errors import UserError

DENSE_POINTS = 64
"""Graphs up to this size take the dense path when they are fully connected."""


class Ponita(nn.Module):
    r"""A network from tensors at points to tensors at points or graphs.

    Every point carries a function on N orientations. A layer convolves it with kernels that depend
    on pairs of points and orientations only through invariants (see ``invariants``), so that moving
    the input moves the output. It is exactly equivariant to translations, to permutations, and to
    the rotations that permute the grid (``grids.symmetries``); to all rotations of input and grid
    together; approximately, the better the more orientations, to the rest. On the sphere
    reflections count as rotations: only ``chiral`` full convolutions and rotation grids see
    handedness.

    Args:
        scalars, vectors, tensors: input channels of each kind.
        scalars_out, vectors_out, tensors_out: output channels of each kind.
        orientations: N of the default grid, 0 for positions alone (PNITA). Paper: 16 (N-body), 20.
        grid: own grid instead: (N, d) unit vectors or (N, 3, 3) rotations.
        dim: 2 or 3.
        hidden, layers, basis, widening, degree: C, L, K, w and the degree of the monomials; the
            defaults are the published sizes.
        invariants: ``smooth`` unless stated; ``reference`` are the published ones, whose
            forces jump where a bond crosses an orientation.
        convolution: ``separable`` as published, or ``full``.
        chiral: add the determinant to the complete invariants of a full convolution.
        cutoff: radius of the neighbour list that is built when no edges are given, and of the
            window that fades messages out.
        window_cutoff: radius of the window alone; default the cutoff.
        self_loops: every point also hears itself.
        layer_scale: start of the factor on every residual branch; None for none.
        multiple_readouts: average a read-out of every layer (published for N-body and rMD17), else
            read the last.
        level: sum the read-outs over each graph, or not.
        quadrature: integrate over the sphere with the areas nearest to each orientation instead of
            equal weights.
        vector_scale: factor on vectors read out (d undoes the mean of o oᵀ).
        length: unit of length of the invariants.
        recompute: what is computed again in the backward passes instead of kept: ``messages`` (all
            but the values of the basis), ``basis`` (these, too: least memory, most time), or None.
        random_grid: turn the grid at random in every forward pass (Monte-Carlo symmetrisation);
            drawn on the CPU, so a captured update would repeat one draw.
    """

    grid: Tensor | None
    weights: Tensor

    def __init__(
        self,
        scalars: int = 0,
        vectors: int = 0,
        tensors: int = 0,
        *,
        scalars_out: int = 0,
        vectors_out: int = 0,
        tensors_out: int = 0,
        orientations: int = 20,
        grid: Tensor | None = None,
        dim: int = 3,
        hidden: int = 128,
        layers: int = 5,
        basis: int = 256,
        widening: int = 4,
        degree: int = 3,
        invariants: Mode = "smooth",
        convolution: Literal["separable", "full"] = "separable",
        chiral: bool = False,
        cutoff: float | None = None,
        window_cutoff: float | None = None,
        self_loops: bool = True,
        layer_scale: float | None = None,
        multiple_readouts: bool = True,
        level: Literal["node", "graph"] = "graph",
        quadrature: bool = False,
        vector_scale: float = 1.0,
        length: float = 1.0,
        recompute: Recompute = None,
        random_grid: bool = False,
    ) -> None:
        super().__init__()
        if grid is None and orientations != 0:
            grid = grids.make_grid(orientations, dim)
        if grid is not None:
            grid = checked_grid(grid, dim)
        self.inputs = (scalars, vectors, tensors)
        self.outputs = (scalars_out, vectors_out, tensors_out)
        check_options(
            self.inputs,
            self.outputs,
            grid,
            invariants,
            convolution,
            chiral,
            recompute,
            (hidden, layers, basis, widening, degree),
            level,
        )
        check_positive(cutoff=cutoff, window_cutoff=window_cutoff, length=length)
        self.dim, self.cutoff, self.self_loops = dim, cutoff, self_loops
        self.level, self.vector_scale, self.random_grid = level, vector_scale, random_grid
        self.quadrature = quadrature
        # Both are part of what was learnt: another grid is another network.
        self.register_buffer("grid", grid)
        self.register_buffer("weights", _measure(grid, quadrature))
        self._order: tuple[Tensor, int, Tensor | None] | None = None
        full = convolution == "full"
        self.functions = BasisFunctions(
            grid, invariants, chiral, full, hidden, basis, degree,
            cutoff if window_cutoff is None else window_cutoff, length, recompute,
        )  # fmt: skip
        self.embed = nn.Linear(fields.fibre_channels(grid, *self.inputs), hidden, bias=False)
        self.blocks = nn.ModuleList(
            ConvNextBlock(
                FullConv(hidden, basis) if full else SeparableConv(hidden, basis, grid is not None),
                hidden,
                widening,
                layer_scale,
            )
            for _ in range(layers)
        )
        channels = fields.fibre_channels(grid, *self.outputs)
        self.readouts = nn.ModuleList(
            nn.Linear(hidden, channels) if multiple_readouts or last else nn.Identity()
            for last in [False] * (layers - 1) + [True]
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the rest, but keep the grid exact, whatever the precision of the weights."""
        kept = {name: getattr(self, name) for name in ("grid", "weights")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if tensor is not None:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def forward(
        self,
        positions: Tensor,
        scalars: Tensor | None = None,
        vectors: Tensor | None = None,
        tensors: Tensor | None = None,
        *,
        edges: Tensor | Literal["full"] | None = None,
        offsets: Tensor | None = None,
        batch: Tensor | None = None,
        graphs: int | None = None,
        mask: Tensor | None = None,
        mutual: bool = False,
    ) -> Readout:
        """Read-outs of points or graphs.

        Either B graphs of m points each, all pairs connected: positions (B, m, d), scalars
        (B, m, S), ..., and ``mask`` (B, m), False at padding; or n points: positions (n, d),
        scalars (n, S), ..., with ``batch`` (n,) naming the graph of each (one graph without it).

        Args:
            edges: (2, E) senders and receivers, or "full"; without, the cutoff builds them.
            offsets: (E, d) added to the sender's position, for periodic images.
            graphs: number of graphs, where the last may be empty.
            mutual: the given edges hold with every edge its reverse (and the negative offset):
                on an antipodal grid half of the kernels are then enough.

        Raises:
            UserError: shapes do not fit, coordinates are not finite, edges are missing.
        """
        inputs = [scalars, vectors, tensors]
        check_graphs(
            positions, inputs, self.inputs, self.dim, edges, offsets, batch, graphs, mask,
            has_cutoff=self.cutoff is not None, dtype=self.embed.weight.dtype,
        )  # fmt: skip
        if positions.ndim == 3:
            if mask is not None:
                positions = _silenced(positions, mask)
                inputs = [None if one is None else _silenced(one, mask) for one in inputs]
            field, kernels = self._start(dense_pairs(positions, mask, self.self_loops), *inputs)
            return self._finish(field, kernels, mask=mask)
        points = len(positions)
        if batch is None:
            batch = torch.zeros(points, dtype=torch.int64, device=positions.device)
            graphs = 1 if graphs is None else graphs
        if graphs is None:
            graphs = int(batch.max()) + 1 if points else 0
        if isinstance(edges, str):
            size = equal_sizes(batch, graphs)
            if size is not None and size <= DENSE_POINTS:
                stacked = [None if x is None else x.unflatten(0, (graphs, size)) for x in inputs]
                pairs = dense_pairs(
                    positions.unflatten(0, (graphs, size)), self_loops=self.self_loops
                )
                field, kernels = self._start(pairs, *stacked)
                found = self._finish(field, kernels)
                if self.level == "graph":
                    return found
                return Readout(*(one.flatten(0, 1) for one in found))
            edges, mutual = full_edges(batch), True
        elif edges is None:
            assert self.cutoff is not None
            edges, mutual = radius_edges(positions.detach(), self.cutoff, batch), True
        pairs = edge_pairs(positions, edges, offsets, self.self_loops, mutual)
        field, kernels = self._start(pairs, *inputs)
        return self._finish(field, kernels, batch=batch, graphs=graphs)

    def _start(self, pairs: Pairs, *inputs: Tensor | None) -> tuple[Tensor, Kernels]:
        """The lifted, embedded field and the kernels' basis."""
        dtype = pairs.delta.dtype
        grid = None if self.grid is None else self.grid.to(dtype)
        if self.random_grid and grid is not None:
            turn = grids.random_rotations(1, self.dim)[0].to(grid)
            grid = grid @ turn.T if grid.ndim == 2 else turn @ grid
        weights, order = self.weights.to(dtype), self._antipodal_order()
        if order is not None and grid is not None:
            grid, weights = grid[order], weights[order]
        kernels: Kernels = self.functions(pairs, grid, weights, order is not None)
        return self.embed(fields.lift(grid, *inputs)), kernels

    def _antipodal_order(self) -> Tensor | None:
        """See ``grids.antipodal_order``; found again only when the grid has changed."""
        if self.grid is None:
            return None
        version = 0 if self.grid.is_inference() else self.grid._version
        if self._order is None or self._order[0] is not self.grid or self._order[1] != version:
            self._order = (self.grid, version, grids.antipodal_order(self.grid))
        return self._order[2]

    def _finish(
        self,
        field: Tensor,
        kernels: Kernels,
        mask: Tensor | None = None,
        batch: Tensor | None = None,
        graphs: int | None = None,
    ) -> Readout:
        total, count = None, 0
        for block, readout in zip(self.blocks, self.readouts, strict=True):
            field = block(field, kernels)
            if isinstance(readout, nn.Linear):
                said = readout(field)
                total, count = (said if total is None else total + said), count + 1
        assert total is not None
        found = fields.read(kernels.grid, kernels.weights, total / count, *self.outputs)
        if self.vector_scale != 1:
            found = found._replace(vectors=found.vectors * self.vector_scale)
        if mask is not None:
            found = Readout(*(_silenced(one, mask) for one in found))
        if self.level == "node":
            return found
        if batch is None:
            return Readout(found.scalars.sum(-2), found.vectors.sum(-3), found.tensors.sum(-4))
        return Readout(*(_per_graph(one, batch, graphs or 0) for one in found))

    @torch.no_grad()
    def calibrate_(self, *inputs: Tensor, **options: object) -> None:
        """Scale the kernels, layer by layer, so that every convolution keeps the spread of its
        input on this batch (arguments as for the forward pass). Called once, before training; the
        forward pass never changes weights. With several processes, broadcast the weights after."""
        with calibrating(self):
            self(*inputs, **options)

    def regridded(self, grid: Tensor) -> "Ponita":
        """A copy on another grid of the same space: weights are functions of invariants, so that
        they mean the same on any number of orientations."""
        if self.grid is None or grid.ndim != self.grid.ndim:
            raise UserError("Only a network with orientations can change to other orientations.")
        other = copy.deepcopy(self)
        grid = checked_grid(grid, self.dim)
        other.grid = grid.to(self.grid.device)
        other.weights = _measure(grid, self.quadrature).to(self.weights.device)
        return other


def _measure(grid: Tensor | None, quadrature: bool) -> Tensor:
    """Weights of the mean over the orientations, (N,)."""
    if quadrature and grid is not None and grid.ndim == 2:
        return grids.quadrature_weights(grid)
    n = 1 if grid is None else len(grid)
    return torch.full((n,), 1 / n, dtype=torch.float64)


def _silenced(x: Tensor, mask: Tensor) -> Tensor:
    """Zero at padding, whatever stands there (NaN included)."""
    return torch.where(mask[(...,) + (None,) * (x.ndim - mask.ndim)], x, torch.zeros_like(x))


def _per_graph(x: Tensor, batch: Tensor, graphs: int) -> Tensor:
    return x.new_zeros(graphs, *x.shape[1:]).index_add(0, batch, x)
