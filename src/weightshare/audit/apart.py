"""Train every use apart for a few steps, and see what of that was worth it.

Gradients at a fold say what the first step would gain. Dozens of steps of an optimizer later, while
all other weights moved too, other differences matter, and a few scales may have gone further than
many deltas. So each kind of unsharing is tried: every use u of every shared tensor W gets something
of its own, W + D_u, and all of it is trained at once, with the rest of the model. Then

    W̄ = W + mean_u D_u,       v_u = D_u - mean_u D_u,       G_u = ∂L/∂v_u at W̄ + v / 2.

An unsharing can express a part o of v (its groups' means, their leading directions). Its credit for
the loss that training apart saved is

    gain = - Σ_u ⟨G_u, o_u⟩,

which adds up: the credits of all of v are L(W̄) - L(W̄ + v), exactly so where the loss is quadratic
(the Aumann-Shapley share of each part, by the midpoint rule). They are scaled to what the trial
gained over as many steps with nothing unshared. One backward pass for each batch that judges prices
every unsharing of a kind. Half of these batches choose the groups, the other half prices them.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightshare.audit.findings import Finding
from weightshare.audit.layers import Layer
from weightshare.audit.steps import Loss, Offsets, Progress, dense, silent, step
from weightshare.audit.suggest import Suggestion, by_rank, nothing
from weightshare.audit.unshare import LowRank, Moved, Scaled
from weightshare.audit.unsharing import KINDS, Kind, Unsharing
from weightshare.errors import UserError
from weightshare.sharing import Use, displaced, partition
from weightshare.sharing.gradients import Gradients
from weightshare.sharing.preserve import preserved
from weightshare.training import GradientUpdate, Loop, LoopConfig, Losses, Task, Term

Groups = tuple[tuple[str, ...], ...]


class Apart:
    """Trials of a model whose uses were trained apart, one for each kind of unsharing.

    Args:
        model: stays as it is; copies are trained, one after another.
        batches: one step of AdamW each, in every trial; the last step's learning rate is zero.
        judges: batches of other data that decide what was worth it.
        loss: as for :func:`~weightshare.audit.audit`.
        layers: what is trained apart.
        rank: of the low-rank deltas.
        learning_rate: peak of the schedule; best that of later training.

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
        kinds: Sequence[Kind] = KINDS,
        rank: int = 4,
        learning_rate: float = 1e-3,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        if len(judges) < 4 or not batches:
            raise UserError(
                f"a trial got {len(batches)} batches to train on and {len(judges)} to judge it; "
                "it needs at least one step and four judges."
            )
        settings = LoopConfig(
            steps=len(batches),
            learning_rate=learning_rate,
            weight_decay=0.0,
            warmup_fraction=0.1,
            seed=seed,
        )

        def trial(kind: Kind) -> OneKind:
            progress(f"trial of {len(batches)} steps: {kind}")
            return OneKind(model, batches, judges, loss, layers, kind, rank, settings)

        with preserved(model):
            self.together = trial("nothing").loss_at(0.0)
            self.trials: dict[Kind, OneKind] = {kind: trial(kind) for kind in kinds}

    def groups(self, layers: Sequence[Layer], count: int = 2) -> dict[Kind, dict[Layer, Groups]]:
        """The groups of each layer's users with most credit; layers without any are left out."""
        return {kind: trial.groups(layers, count) for kind, trial in self.trials.items()}

    def predict(self, unsharings: Sequence[Unsharing]) -> list[Suggestion]:
        """The credit of each unsharing, beyond chance where it is above two standard errors."""
        found: dict[Unsharing, Suggestion] = {}
        for kind, trial in self.trials.items():
            mine = [unsharing for unsharing in unsharings if unsharing.kind == kind]
            found |= zip(mine, trial.predict(mine, self.together), strict=True)
        return [found[unsharing] for unsharing in unsharings]


class OneKind:
    """One kind of unsharing, trained for every use of every layer at once.

    ``moves`` are the v of every use around the ``model``'s weights, which are the W̄.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        judges: Sequence[Any],
        loss: Loss,
        layers: Sequence[Layer],
        kind: Kind,
        rank: int,
        settings: LoopConfig,
    ) -> None:
        self.loss, self.choosing, self.pricing = loss, judges[0::2], judges[1::2]
        self.model = copy.deepcopy(model)
        own = _own(self.model, layers, kind, rank, torch.Generator().manual_seed(settings.seed))
        task = _Apart(self.model, loss, own)
        update = GradientUpdate.from_config(task, settings)
        Loop(update, batches, settings, progress=False).fit()
        self.moves: Offsets = {}
        with torch.no_grad():
            for name, each in task.offsets().items():
                mean = torch.stack(list(each.values())).mean(0)
                self.model.get_parameter(name).add_(mean)
                self.moves[name] = {use: move - mean for use, move in each.items()}

    @torch.no_grad()
    def loss_at(self, share: float) -> float:
        """The judges' loss where every use has gone this share of its way from the mean."""
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

    def groups(self, layers: Sequence[Layer], count: int = 2) -> dict[Layer, Groups]:
        """The partition of each layer's users with most credit."""
        totals: dict[Layer, Any] = dict.fromkeys(layers, 0)
        for batch in self.choosing:
            slopes = self.slopes(batch)
            for layer in layers:
                totals[layer] = totals[layer] + self._credits(layer, slopes)
        found = {layer: _grouped(layer, total, count) for layer, total in totals.items()}
        return {layer: groups for layer, groups in found.items() if groups is not None}

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

    def predict(self, unsharings: Sequence[Unsharing], together: float) -> list[Suggestion]:
        """Credits, scaled by what the trial gained over ``together``, the loss without it."""
        # `step` turns gradients into descent: it gets the moves with their sign changed.
        against: Gradients[Use] = {
            name: {use: -move for use, move in each.items()} for name, each in self.moves.items()
        }
        steps = [step(self.model, unsharing, against, {}) for unsharing in unsharings]
        apart = self.loss_at(1.0)
        saved = self.loss_at(0.0) - apart
        factor = max(0.0, together - apart) / saved if saved > 0 else 0.0
        credits = torch.zeros(len(self.pricing), len(unsharings), dtype=torch.float64)
        for row, batch in zip(credits, self.pricing, strict=True):
            slopes = self.slopes(batch)
            for number, (offsets, _) in enumerate(steps):
                row[number] = -factor * _inner(slopes, offsets)
        errors = credits.std(dim=0) / math.sqrt(len(self.pricing))
        return [
            Suggestion(
                unsharing,
                added=unsharing.added(self.model),
                slope=-float(credit),
                curvature=0.0,
                longest=1.0,
                beyond_chance=bool(credit > 2 * error),
                directions=bases,
            )
            for unsharing, credit, error, (_, bases) in zip(
                unsharings, credits.mean(0), errors, steps, strict=True
            )
        ]


def suggest_apart(
    apart: Apart, findings: Sequence[Finding], *, groups: int = 2, rank: int = 4
) -> list[Suggestion]:
    """Every way to unshare every layer by its credit in a trial, and leaving it; best first."""
    layers = [found.layer for found in findings]
    wanted = [
        Unsharing(kind, layer, mine, rank)
        for kind, by_layer in apart.groups(layers, groups).items()
        for layer, mine in by_layer.items()
    ]
    moved = {unsharing.layer for unsharing in wanted}
    left = [nothing(layer, "no use has a gradient") for layer in layers if layer not in moved]
    return sorted([*apart.predict(wanted), *left], key=by_rank)


def _grouped(layer: Layer, credits: Tensor, count: int) -> Groups | None:
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


def _inner(slopes: Mapping[str, Mapping[Any, Tensor]], offsets: Offsets) -> float:
    return sum(
        float((slopes[name][use] * offset).sum(dtype=torch.float64))
        for name, each in offsets.items()
        for use, offset in each.items()
        if use in slopes.get(name, {})
    )


Own = dict[str, dict[Use, nn.Module]]
"""What each use has of its own: modules that make its weight from the shared one."""


def _own(
    model: nn.Module, layers: Iterable[Layer], kind: Kind, rank: int, generator: torch.Generator
) -> Own:
    """One kind of unsharing for every use, as :func:`~weightshare.audit.apply` makes it."""
    own: Own = {}
    for layer in layers if kind != "nothing" else ():
        for name, users in layer.tensors.items():
            weight = model.get_parameter(name)
            wide = dense(weight.detach())
            copies = kind == "unshare" or (kind == "scale" and weight.ndim < 2)
            if copies:
                # The shared tensor rests: each copy is moved by its own gradient alone.
                weight.requires_grad_(False)
                own[name] = {use: Moved(wide) for use in users}
            elif kind == "scale":
                own[name] = {use: Scaled(wide) for use in users}
            elif weight.ndim > 1:
                shape = Unsharing(kind, layer, (), rank).rank_of(weight), weight[0].numel()
                own[name] = {
                    use: LowRank(wide, torch.randn(shape, generator=generator)) for use in users
                }
    return own


class _Apart(Task):
    """The audited loss with something of its own for every use."""

    def __init__(self, model: nn.Module, loss: Loss, own: Own) -> None:
        super().__init__()
        self.model, self.loss, self.own = model, loss, own
        self.parts = nn.ModuleList(part for each in own.values() for part in each.values())

    def offsets(self) -> Offsets:
        result: Offsets = {}
        for name, each in self.own.items():
            weight = self.model.get_parameter(name)
            wide = dense(weight)
            result[name] = {use: part(wide) - wide for use, part in each.items()}
        return result

    def forward(self, batch: Any) -> Losses:
        with displaced(self.model, self.offsets()):
            return {"loss": Term(self.loss(self.model, batch), 1.0)}
