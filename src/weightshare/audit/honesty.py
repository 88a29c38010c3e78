"""The honesty clause: carry unsharings out, train each a little, compare with what was promised.

A negative cosine is neither necessary nor sufficient for harm, and a prediction is first order with
one curvature. So an audit can be asked to prove itself: K suggestions and K random unsharings are
applied to copies of the model and trained for the same few steps as the model without them, and
realised gains are held against predicted ones.
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightshare.audit.examine import Audit
from weightshare.audit.layers import Layer
from weightshare.audit.steps import Loss
from weightshare.audit.suggest import REACH, Metric, Suggestion, predict
from weightshare.audit.unshare import apply
from weightshare.audit.unsharing import KINDS, Kind, Unsharing
from weightshare.errors import UserError
from weightshare.sharing import preserved
from weightshare.training import GradientUpdate, Loop, LoopConfig, Losses, Task, Term


@dataclass(frozen=True)
class ProbeConfig:
    """The fixed budget of every trial.

    Args:
        suggested: how many of the best suggestions to carry out.
        random: how many random unsharings beside them.
        steps: optimizer steps of each trial.
        learning_rate: of AdamW; the same for the trials with and without unsharing.
        metric, reach: of the predictions for the random ones; those of the audit. Not used where
            the suggestions come from a trial.
        seed: of the random unsharings and of training.
    """

    suggested: int = 4
    random: int = 4
    steps: int = 30
    learning_rate: float = 1e-3
    metric: Metric = "adam"
    reach: float = REACH
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """One unsharing carried out: what was promised and what came of it.

    ``realised``: held-out loss after training with the shared layer only, less that with the
    unsharing; the same steps, batches and learning rate.
    """

    suggestion: Suggestion
    origin: str  # "suggested" or "random"
    realised: float

    def row(self) -> dict[str, Any]:
        full = self.suggestion.row()
        return {
            "origin": self.origin,
            **{k: full[k] for k in ("shared weight", "do", "groups", "added", "predicted gain")},
            "realised gain": float(f"{self.realised:.3g}"),
            "per million": float(f"{1e6 * self.realised / max(1, self.suggestion.added):.3g}"),
        }


@dataclass(frozen=True)
class Probe:
    """Trials with the rank correlation of predicted and realised gain (Spearman).

    ``low`` to ``high`` is its 95 % bootstrap interval over trials; NaN below four trials.
    ``per_parameter`` is the correlation of the gains per added parameter.
    """

    trials: list[Trial]
    correlation: float
    low: float
    high: float
    per_parameter: float

    def mean_gain(self, origin: str, per_parameter: bool = False) -> float:
        """Mean realised gain of the suggested or the random unsharings."""
        gains = [
            t.realised / (t.suggestion.added if per_parameter else 1)
            for t in self.trials
            if t.origin == origin
        ]
        return sum(gains) / len(gains) if gains else math.nan


def probe(
    model: nn.Module,
    batches: Sequence[Any],
    heldout: Sequence[Any],
    loss: Loss,
    audited: Audit,
    config: ProbeConfig | None = None,
    progress: Callable[[str], None] | None = None,
    memo: Callable[[str, Callable[[], float]], float] | None = None,
) -> Probe:
    """Carry out suggestions and random unsharings on copies of ``model``.

    Each trial trains the shared weights of its layer and what was added, nothing else, so that the
    gain is that of the unsharing; the trial it is compared with trains the same layer unchanged.
    ``memo(key, compute)`` may keep held-out losses of trials, so that a killed probe goes on.

    Raises:
        UserError: when the audit suggests nothing to carry out, or there is no batch to train on or
            to hold out, or ``config`` asks for less than nothing.
    """
    config = config or ProbeConfig()
    if not batches or not heldout:
        raise UserError(
            f"a probe got {len(batches)} batches to train on and {len(heldout)} held out; "
            "it needs at least one of each."
        )
    if min(config.suggested, config.random) < 0 or config.steps < 1:
        raise UserError(
            f"a probe of {config.suggested} suggested and {config.random} random unsharings with "
            f"{config.steps} steps each cannot be carried out; give 0 or more, and at least 1 step."
        )

    def loss_after(tried: Suggestion | Unsharing) -> float:
        unsharing = tried.unsharing if isinstance(tried, Suggestion) else tried
        key = f"{unsharing.layer.name}: {unsharing.kind} {unsharing.rank} {unsharing.groups}"

        def compute() -> float:
            return _trained(model, tried, batches, heldout, loss, config)

        return compute() if memo is None else memo(key, compute)

    ready = [s for s in audited.suggestions if s.unsharing.kind != "nothing"]
    if not ready:
        raise UserError(
            "the audit has no unsharing to try: no shared weight has two users with a gradient."
        )
    suggested = ready[: config.suggested]
    layers = [finding.layer for finding in audited.findings]
    drawn = random_unsharings(
        layers,
        config.random,
        max(s.unsharing.rank for s in ready) or 4,
        config.seed,
        taken=[s.unsharing for s in suggested],
    )
    with preserved(model):
        if audited.apart is not None:
            others = audited.apart.predict(drawn)
        else:
            others = predict(model, batches, loss, drawn, metric=config.metric, reach=config.reach)
        bases: dict[Layer, float] = {}
        trials = []
        for origin, chosen in (("suggested", suggested), ("random", others)):
            for suggestion in chosen:
                layer = suggestion.unsharing.layer
                if layer not in bases:
                    kept = Unsharing("nothing", layer, (layer.users,))
                    bases[layer] = loss_after(kept)
                trials.append(Trial(suggestion, origin, bases[layer] - loss_after(suggestion)))
                if progress:
                    progress(f"probe {len(trials)} of {len(suggested) + len(others)}")
    return summarise(trials, config.seed)


def random_unsharings(
    layers: Sequence[Layer],
    count: int,
    rank: int,
    seed: int,
    kinds: Sequence[Kind] = KINDS,
    taken: Sequence[Unsharing] = (),
) -> list[Unsharing]:
    """Distinct unsharings drawn without looking at a gradient: layer, kind and two groups.

    Fewer than ``count`` where there are no more beside those ``taken``.
    """
    generator = random.Random(seed)
    seen = set(taken)
    drawn: list[Unsharing] = []
    for _ in range(50 * count):
        layer = generator.choice(list(layers))
        users = list(layer.users)
        generator.shuffle(users)
        cut = generator.randint(1, len(users) - 1)
        order = {user: number for number, user in enumerate(layer.users)}
        groups = [tuple(sorted(part, key=order.__getitem__)) for part in (users[:cut], users[cut:])]
        groups.sort(key=lambda group: order[group[0]])
        found = Unsharing(generator.choice(list(kinds)), layer, tuple(groups), rank)
        if found not in seen and len(drawn) < count:
            seen.add(found)
            drawn.append(found)
    return drawn


def summarise(trials: Sequence[Trial], seed: int = 0) -> Probe:
    """Spearman's correlation over trials, with a bootstrap interval."""
    added = [max(1, t.suggestion.added) for t in trials]
    pairs = [(t.suggestion.predicted, t.realised) for t in trials]
    each = [(p / a, r / a) for (p, r), a in zip(pairs, added, strict=True)]
    return Probe(list(trials), *rank_correlation([pairs], seed), rank_correlation([each], seed)[0])


def rank_correlation(
    sets: Sequence[Sequence[tuple[float, float]]], seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Spearman's correlation inside each set of pairs, averaged, and its 95 % bootstrap interval.

    Pairs are drawn anew inside their set; no interval below four pairs.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    arrays = [np.array(pairs, dtype=float).reshape(-1, 2) for pairs in sets]
    centre = float(np.mean([_spearman(pairs[None])[0] for pairs in arrays])) if arrays else math.nan
    if min(map(len, arrays), default=0) < 4:
        return centre, math.nan, math.nan
    drawn = [pairs[generator.integers(len(pairs), size=(draws, len(pairs)))] for pairs in arrays]
    means = np.mean([_spearman(pairs) for pairs in drawn], axis=0)
    if np.isnan(means).all():
        return centre, math.nan, math.nan
    low, high = np.nanquantile(means, (0.025, 0.975))
    return centre, float(low), float(high)


def _spearman(pairs: Any) -> Any:
    """Of each of ``(n, trials, 2)``; NaN below three trials or where one side does not vary."""
    import numpy as np
    from scipy.stats import rankdata

    if pairs.shape[1] < 3:
        return np.full(len(pairs), math.nan)
    ranks = rankdata(pairs, axis=1)
    ranks = ranks - ranks.mean(1, keepdims=True)
    products = np.einsum("nti,ntj->nij", ranks, ranks)
    spread = np.sqrt(products[:, 0, 0] * products[:, 1, 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, products[:, 0, 1] / spread, math.nan)


class _MeanLoss(Task):
    """The audited loss as a training task: every batch counts as one."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Losses:
        return {"loss": Term(self.loss(self.model, batch), 1.0)}


class _Cycle:
    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        return self.batches[step % len(self.batches)]


def _trained(
    model: nn.Module,
    unsharing: Suggestion | Unsharing,
    batches: Sequence[Any],
    heldout: Sequence[Any],
    loss: Loss,
    config: ProbeConfig,
) -> float:
    """Held-out loss of a copy that was unshared and trained."""
    student = copy.deepcopy(model)
    for parameter in student.parameters():
        parameter.grad = None
    layer = (unsharing.unsharing if isinstance(unsharing, Suggestion) else unsharing).layer
    shared = [student.get_parameter(name) for name in layer.tensors]
    before = {id(p) for p in student.parameters()}
    apply(student, unsharing, seed=config.seed)
    added = [p for p in student.parameters() if id(p) not in before]
    task = _MeanLoss(student, loss)
    settings = LoopConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=0.0,
        warmup_fraction=0.1,
        seed=config.seed,
    )
    update = GradientUpdate.from_config(task, settings, [*shared, *added])
    Loop(update, _Cycle(batches), settings, progress=False).fit()
    with torch.no_grad():
        return sum(float(loss(student, batch)) for batch in heldout) / len(heldout)
