"""Group convolutions over positions and orientations whose kernels are shared over equal pairs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightshare.equivariant.basis import KernelBasis
from weightshare.equivariant.invariants import (
    Mode,
    fibre_invariants,
    full_invariants,
    spatial_invariants,
    window,
)
from weightshare.equivariant.pairs import Pairs
from weightshare.equivariant.pointwise import Gelu, LayerNorm, contiguous
from weightshare.equivariant.recomputed import recomputed

Recompute = Literal["basis", "messages"] | None
PAIRS_AT_ONCE = 8192
"""Pairs whose basis is held while a message is recomputed: about 1 GB at the published size."""


@dataclass
class Kernels:
    """Basis functions of one input, shared by all layers.

    ``spatial`` (pairs, N, K), or (pairs, N', N, K) for the full convolution; of the first half of
    the orientations where the second is its opposite; None where every layer computes it again to
    save memory. ``fibre`` (N, N, K) or None. ``weights`` (N,) integrate over the sender's
    orientation. ``seen`` are the orientations of ``spatial``.
    """

    pairs: Pairs
    spatial: Tensor | None
    fibre: Tensor | None
    weights: Tensor
    source: "BasisFunctions | None"
    grid: Tensor | None
    seen: Tensor | None = None


class BasisFunctions(nn.Module):
    """The networks behind the kernels: one of space and one of the sphere, or one of both.

    Args:
        grid: orientations, or None.
        mode, chiral: see ``invariants``.
        full: one basis of all invariants of a pair instead of a product of two.
        hidden, basis, degree: see ``KernelBasis``.
        window_cutoff: distance at which messages have faded to zero, or None.
        length: unit in which differences of positions are measured.
        recompute: ``messages``: keep the values of the basis and nothing else, neither what led to
            them nor the kernels of the layers; ``basis``: not even these, every layer evaluates
            them again in all passes; None: keep all.
    """

    def __init__(
        self,
        grid: Tensor | None,
        mode: Mode,
        chiral: bool,
        full: bool,
        hidden: int,
        basis: int,
        degree: int,
        window_cutoff: float | None,
        length: float,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.mode, self.chiral, self.full = mode, chiral, full
        self.window_cutoff, self.length, self.recompute = window_cutoff, length, recompute
        dim = 3 if grid is None else grid.shape[-1]
        example = torch.ones(1, dim, dtype=torch.float64)
        inputs = self._invariants(example, None if grid is None else grid.double()).shape[-1]
        self.spatial = KernelBasis(inputs, hidden, basis, degree)
        self.fibre: KernelBasis | None = None
        if grid is not None and not full:
            inputs = fibre_invariants(grid, mode).shape[-1]
            self.fibre = KernelBasis(inputs, hidden, basis, degree)

    def _invariants(self, delta: Tensor, grid: Tensor | None) -> Tensor:
        delta = delta if self.length == 1 else delta / self.length
        if self.full:
            assert grid is not None
            return full_invariants(delta, grid, self.mode, self.chiral)
        return spatial_invariants(delta, grid, self.mode)

    def evaluate(
        self, pairs: Pairs, grid: Tensor | None, parameters: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Basis of every pair, faded by the window and zero for padded senders."""
        invariants = self._invariants(pairs.delta, grid)
        if parameters is None:
            basis: Tensor = self.spatial(invariants)
        else:
            names = [name for name, _ in self.spatial.named_parameters()]
            chosen = dict(zip(names, parameters, strict=True))
            basis = functional_call(self.spatial, chosen, (invariants,))
        fade = pairs.weight
        if self.window_cutoff is not None:
            u = window(pairs.delta, self.window_cutoff)
            fade = u if fade is None else fade * u
        if fade is None:
            return basis
        return basis * fade[(...,) + (None,) * (basis.ndim - fade.ndim)]

    def forward(
        self, pairs: Pairs, grid: Tensor | None, weights: Tensor, antipodal: bool = False
    ) -> Kernels:
        """Everything the layers need of one input; ``antipodal``: the grid's second half is minus
        its first."""
        seen = grid
        if grid is not None and antipodal and pairs.mutual and not self.full:
            seen = grid[: len(grid) // 2]
        spatial = None
        if self.recompute is None:
            spatial = self.evaluate(pairs, seen)
        elif self.recompute == "messages":

            def whole(delta: Tensor, *parameters: Tensor) -> Tensor:
                return self.evaluate(pairs.at(delta), seen, parameters)

            spatial = recomputed(whole, pairs.delta, *self.spatial.parameters())
        fibre = None
        if self.fibre is not None and grid is not None:
            fibre = self.fibre(fibre_invariants(grid, self.mode))
        return Kernels(pairs, spatial, fibre, weights, self, grid, seen)


def spatial_message(field: Tensor, weight: Tensor, pairs: Pairs, basis: Tensor) -> Tensor:
    r""":math:`x_1[i,o,c] = \sum_{j \to i} (W b_{ij,o})_c\, x[j,o,c]`.

    The one place where pairs, orientations and channels meet: nearly all time and memory go here.
    On an antipodal grid the kernel from j to i at -o is that from i to j at o: a basis of the first
    half of the orientations is enough.
    """
    kernel = basis @ weight.T
    if kernel.shape[-2] == field.shape[-2]:
        return pairs.sum(kernel * pairs.senders(field))
    ahead, behind = field.chunk(2, -2)
    back = pairs.reversed()
    return torch.cat(
        [pairs.sum(kernel * pairs.senders(ahead)), back.sum(kernel * back.senders(behind))], -2
    )


def full_message(
    field: Tensor, weight: Tensor, pairs: Pairs, basis: Tensor, measure: Tensor
) -> Tensor:
    r""":math:`x_2[i,p,c] = \sum_{j\to i}\sum_o w_o\,(W b_{ij,o,p})_c\, x[j,o,c]`."""
    kernel = basis @ weight.T
    senders = pairs.senders(field) * measure[:, None]
    return pairs.sum(torch.einsum("...opc,...oc->...pc", kernel, senders))


def send(
    message: Callable[..., Tensor], field: Tensor, weight: Tensor, kernels: Kernels, *more: Tensor
) -> Tensor:
    """A message with what the network keeps of it; a basis that is not kept is computed for this
    message alone, and again in every backward pass, for ``PAIRS_AT_ONCE`` pairs at a time."""
    source, grid = kernels.source, kernels.seen
    if kernels.spatial is not None:
        if source is None or source.recompute is None:
            return message(field, weight, kernels.pairs, kernels.spatial, *more)

        def of_basis(field: Tensor, weight: Tensor, basis: Tensor) -> Tensor:
            return message(field, weight, kernels.pairs, basis, *more)

        return recomputed(of_basis, field, weight, kernels.spatial)
    assert source is not None
    parameters = tuple(source.spatial.parameters())

    def one(pairs: Pairs, field: Tensor) -> Tensor:
        def whole(field: Tensor, weight: Tensor, delta: Tensor, *parameters: Tensor) -> Tensor:
            moved = pairs.at(delta)
            return message(field, weight, moved, source.evaluate(moved, grid, parameters), *more)

        return recomputed(whole, field, weight, pairs.delta, *parameters)

    pieces = [one(*piece) for piece in kernels.pairs.pieces(PAIRS_AT_ONCE, field)]
    if kernels.pairs.source is None:
        return torch.cat(pieces)
    return sum(pieces[1:], start=pieces[0])


class SeparableConv(nn.Module):
    r"""Depth-wise convolution that is a product of space and sphere.

    .. math::
        x_1[i,o] = \sum_{j\to i} (W_s b_{ij,o}) \odot x[j,o], \qquad
        x_2[i,p] = \sum_o w_o\,(W_f \beta_{o,p}) \odot x_1[i,o] + \text{bias}

    Without orientations only the first step. Sums over senders are not divided by their number.

    Shapes: field (..., N, C) -> (..., N, C).
    """

    def __init__(self, channels: int, basis: int, fibre: bool) -> None:
        super().__init__()
        self.spatial = nn.Linear(basis, channels, bias=False)
        self.fibre = nn.Linear(basis, channels, bias=False) if fibre else None
        self.bias = nn.Parameter(torch.zeros(channels))

    def over_space(self, field: Tensor, kernels: Kernels) -> Tensor:
        """The first step."""
        return send(spatial_message, field, self.spatial.weight, kernels)

    def over_sphere(self, field: Tensor, kernels: Kernels) -> Tensor:
        """The second step, without bias."""
        if self.fibre is None or kernels.fibre is None:
            return field
        kernel = self.fibre(kernels.fibre) * kernels.weights[:, None, None]
        # One matrix product per channel, on contiguous copies: einsum on the strided layout is
        # several times slower on a CPU, and so is what comes before and after in either pass.
        by_channel = contiguous(field.flatten(0, -3)).permute(2, 0, 1).contiguous()
        found = torch.bmm(by_channel, kernel.permute(2, 0, 1).contiguous())
        return contiguous(found.permute(1, 2, 0)).view(field.shape)

    def forward(self, field: Tensor, kernels: Kernels) -> Tensor:
        return self.over_sphere(self.over_space(field, kernels), kernels) + self.bias

    @torch.no_grad()
    def calibrate_(self, field: Tensor, kernels: Kernels) -> None:
        """Scale both kernels so that input and output have the same standard deviation."""
        first = self.over_space(field, kernels)
        self.spatial.weight.mul_(_ratio(field, first, kernels))
        if self.fibre is not None:
            first = self.over_space(field, kernels)
            self.fibre.weight.mul_(_ratio(first, self.over_sphere(first, kernels), kernels))


class FullConv(nn.Module):
    r"""Depth-wise convolution with one kernel of all invariants of a pair of point-orientations.

    .. math:: x_2[i,p] = \sum_{j\to i}\sum_o w_o\,(W b_{ij,o,p}) \odot x[j,o] + \text{bias}

    N times the cost of the separable one; with ``complete`` invariants it can express every
    equivariant depth-wise kernel.
    """

    def __init__(self, channels: int, basis: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(basis, channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def _message(self, field: Tensor, kernels: Kernels) -> Tensor:
        return send(full_message, field, self.kernel.weight, kernels, kernels.weights)

    def forward(self, field: Tensor, kernels: Kernels) -> Tensor:
        return self._message(field, kernels) + self.bias

    @torch.no_grad()
    def calibrate_(self, field: Tensor, kernels: Kernels) -> None:
        """Scale the kernel so that input and output have the same standard deviation."""
        self.kernel.weight.mul_(_ratio(field, self._message(field, kernels), kernels))


def _ratio(wanted: Tensor, found: Tensor, kernels: Kernels) -> Tensor:
    """Quotient of the standard deviations over real points; 1 where either vanishes, as for a zero
    input."""
    a, b = (kernels.pairs.present(field).std() for field in (wanted, found))
    usable = (a > 0) & (b > 0) & torch.isfinite(a / b)
    return torch.where(usable, a / b, torch.ones_like(a))


@contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Inside, every convolution of ``module`` calibrates itself on what it is given, then runs."""

    def before(conv: Any, given: tuple[Any, ...]) -> None:
        conv.calibrate_(*given)

    convolutions = [m for m in module.modules() if isinstance(m, SeparableConv | FullConv)]
    hooks = [conv.register_forward_pre_hook(before) for conv in convolutions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class ConvNextBlock(nn.Module):
    r"""``x + γ · MLP(LayerNorm(conv(x)))``, the norm over channels, the MLP C → wC → C with GELU.

    Args:
        conv: a convolution of this file.
        channels: C.
        widening: w.
        layer_scale: start of γ (ConvNeXt; 1e-6 for N-body), or None for no γ.
    """

    def __init__(
        self,
        conv: SeparableConv | FullConv,
        channels: int,
        widening: int,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.conv = conv
        self.norm = LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, widening * channels),
            Gelu(),
            nn.Linear(widening * channels, channels),
        )
        self.layer_scale = (
            None if layer_scale is None else nn.Parameter(torch.full((channels,), layer_scale))
        )

    def forward(self, field: Tensor, kernels: Kernels) -> Tensor:
        change: Tensor = self.mlp(self.norm(self.conv(field, kernels)))
        return field + (change if self.layer_scale is None else self.layer_scale * change)
