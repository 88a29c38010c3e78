"""Train every use apart for a few steps, and see what of that was worth it.

Gradients at a fold say what the first step would gain. Dozens of steps of an optimizer later, while
all other weights moved too, other differences matter. So each use u of a shared tensor W is given a
weight of its own, W + D_u, and all of them are trained at once, with the rest of the model. Then

    W̄ = W + mean_u D_u,       v_u = D_u - mean_u D_u,       G_u = ∂L/∂v_u at W̄ + v / 2.

An unsharing can express a part o of v (its groups' means, their leading directions). Its credit for
the loss that training apart saved is

    gain = - Σ_u ⟨G_u, o_u⟩,

which adds up: the credits of all of v are L(W̄) - L(W̄ + v), exactly so where the loss is quadratic
(the Aumann-Shapley share of each part, by the midpoint rule). One backward pass for each batch that
judges prices every unsharing. Half of these batches choose the groups, the other half prices them.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightshare.audit.findings import Finding
from weightshare.audit.layers import Layer
from weightshare.audit.steps import Loss, Offsets, dense, slope_along, step
from weightshare.audit.suggest import Suggestion, by_rank, nothing
from weightshare.audit.unsharing import KINDS, Kind, Unsharing
from weightshare.errors import UserError
from weightshare.sharing import Use, displaced, partition, preserved
from weightshare.sharing.gradients import Gradients
from weightshare.training import GradientUpdate, Loop, LoopConfig, Losses, Task, Term


class Apart:
    """A model whose shared tensors were trained apart, and how far each use went.

    Args:
        model: stays as it is; a copy is trained, with a copy of every shared tensor for each use.
        batches: one step of AdamW each; the last step's learning rate is zero.
        judges: batches of other data that decide what was worth it.
        loss: as for :func:`~weightshare.audit.audit`.
        layers: what is trained apart.
        learning_rate: peak of the schedule; the one that later training will use.

    Raises:
        UserError: fewer than four judges, or no batch to train on.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        judges: Sequence[Any],
        loss: Loss,
        layers: Sequence[Layer],
        *,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        if len(judges) < 4 or not batches:
            raise UserError(
                f"a trial got {len(batches)} batches to train on and {len(judges)} to judge it; "
                "it needs at least one step and four judges."
            )
        self.loss, self.choosing, self.pricing = loss, judges[0::2], judges[1::2]
        with preserved(model):
            self.model = copy.deepcopy(model)
            moves = _trained(self.model, batches, loss, layers, learning_rate, seed)
        self.moves: Offsets = {}
        for name, each in moves.items():
            mean = torch.stack(list(each.values())).mean(0)
            self.model.get_parameter(name).data.add_(mean)
            self.moves[name] = {use: move - mean for use, move in each.items()}

    @torch.no_grad()
    def loss_at(self, share: float) -> float:
        """The pricing judges' loss where every use has gone this share of its way from the mean."""
        with displaced(self.model, self.moves, share):
            values = [float(self.loss(self.model, batch)) for batch in self.pricing]
        return sum(values) / len(values)

    def slopes(self, batch: Any) -> Offsets:
        """G of one batch."""
        half = {
            name: {use: (move / 2).requires_grad_() for use, move in each.items()}
            for name, each in self.moves.items()
        }
        flat = [(name, use, move) for name, each in half.items() for use, move in each.items()]
        with displaced(self.model, half):
            value = self.loss(self.model, batch)
        found = torch.autograd.grad(value, [move for *_, move in flat], allow_unused=True)
        result: Offsets = {}
        for (name, use, _), gradient in zip(flat, found, strict=True):
            if gradient is not None:
                result.setdefault(name, {})[use] = dense(gradient)
        return result

    def groups(self, layers: Sequence[Layer], count: int = 2) -> dict[Layer, Any]:
        """The groups of each layer's users that have most credit, None where there are none."""
        totals: dict[Layer, Any] = dict.fromkeys(layers, 0)
        for batch in self.choosing:
            slopes = self.slopes(batch)
            for layer in layers:
                totals[layer] = totals[layer] + self._credits(layer, slopes)
        return {layer: _grouped(layer, total, count) for layer, total in totals.items()}

    def _credits(self, layer: Layer, slopes: Offsets) -> Tensor:
        """``-⟨G_i, v_j⟩`` of a layer's users, ``(K, K)``; NaN for one without a gradient."""
        order = {user: number for number, user in enumerate(layer.users)}
        result = torch.zeros(len(order), len(order), dtype=torch.float64)
        missing = set(order.values())
        for name, users in layer.tensors.items():
            uses = [use for use in users if use in slopes.get(name, {})]
            if uses:
                moves = torch.stack([self.moves[name][use].flatten() for use in uses])
                found = torch.stack([slopes[name][use].flatten() for use in uses])
                at = torch.tensor([order[users[use]] for use in uses])
                result[at[:, None], at] -= (found @ moves.T).double().cpu()
                missing -= set(at.tolist())
        result[list(missing), list(missing)] = math.nan
        return result

    def predict(self, unsharings: Sequence[Unsharing]) -> list[Suggestion]:
        """The credit of each unsharing, beyond chance where it is above two standard errors."""
        # `step` turns gradients into descent: it gets the moves with their sign changed.
        against: Gradients[Use] = {
            name: {use: -move for use, move in each.items()} for name, each in self.moves.items()
        }
        steps = [step(self.model, unsharing, against, {}) for unsharing in unsharings]
        credits = torch.zeros(len(self.pricing), len(unsharings), dtype=torch.float64)
        for row, batch in zip(credits, self.pricing, strict=True):
            slopes = self.slopes(batch)
            for number, (offsets, _) in enumerate(steps):
                row[number] = -slope_along(slopes, offsets)
        errors = credits.std(dim=0) / math.sqrt(len(self.pricing))
        return [
            Suggestion(
                unsharing,
                added=unsharing.added(self.model),
                slope=-float(credit),
                curvature=0.0,
                endless=1.0,
                beyond_chance=bool(credit > 2 * error),
                directions=bases,
            )
            for unsharing, credit, error, (_, bases) in zip(
                unsharings, credits.mean(0), errors, steps, strict=True
            )
        ]


def suggest_apart(
    apart: Apart,
    findings: Sequence[Finding],
    *,
    groups: int = 2,
    rank: int = 4,
    kinds: Sequence[Kind] = KINDS,
) -> list[Suggestion]:
    """Every way to unshare every layer by its credit in a trial, and leaving it; best first."""
    layers = [found.layer for found in findings]
    chosen = apart.groups(layers, groups)
    wanted = [
        Unsharing(kind, layer, chosen[layer], rank)
        for layer in layers
        if chosen[layer] is not None
        for kind in kinds
    ]
    left = [nothing(layer, "no use has a gradient") for layer in layers if chosen[layer] is None]
    return sorted([*apart.predict(wanted), *left], key=by_rank)


def _grouped(layer: Layer, credits: Tensor, count: int) -> tuple[tuple[str, ...], ...] | None:
    """The partition with most credit: that of a group is its block's sum over its size."""
    credits = (credits + credits.T) / 2
    own = credits.diagonal()
    try:
        chosen = partition((own[:, None] + own) / 2 - credits, count)
    except UserError:
        return None
    return tuple(
        tuple(layer.users[u] for u in group if u not in chosen.undefined) for group in chosen.groups
    )


class _OwnWeights(Task):
    """The audited loss with a weight of its own for every use."""

    def __init__(self, model: nn.Module, loss: Loss, moves: Offsets) -> None:
        super().__init__()
        self.model, self.loss, self.moves = model, loss, moves
        self.own = nn.ParameterList(move for each in moves.values() for move in each.values())

    def forward(self, batch: Any) -> Losses:
        with displaced(self.model, self.moves):
            return {"loss": Term(self.loss(self.model, batch), 1.0)}


def _trained(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    layers: Sequence[Layer],
    learning_rate: float,
    seed: int,
) -> Offsets:
    """Train ``model`` in place, its shared tensors by moves of each use, which are returned."""
    moves: Offsets = {}
    for layer in layers:
        for name, users in layer.tensors.items():
            weight = model.get_parameter(name)
            # The shared tensor rests: every use has its own optimizer state, as a copy would.
            weight.requires_grad_(False)
            for use in users:
                wide = torch.promote_types(weight.dtype, torch.float32)
                moves.setdefault(name, {})[use] = nn.Parameter(torch.zeros_like(weight, dtype=wide))
    settings = LoopConfig(
        steps=len(batches),
        learning_rate=learning_rate,
        weight_decay=0.0,
        warmup_fraction=0.1,
        seed=seed,
    )
    task = _OwnWeights(model, loss, moves)
    update = GradientUpdate.from_config(task, settings)
    Loop(update, batches, settings, progress=False).fit()
    return {
        name: {use: move.detach() for use, move in each.items()} for name, each in moves.items()
    }
