r"""A look at every model on trusted samples before anybody is paid.

Mislabelling one class of ten leaves nine, and with them cosines like anyone's: a reputation learns
of it too late, when a good model has been handed out. So everyone trains for itself for some rounds
(``ReputationConfig.probation``), which drives its faults home, and is then examined: a model fails
where a class has no trusted sample to which it gives the probability of a guess,

.. math:: \max_{x:\, y(x) = c} p(c \mid x) < 1 / C.

The best sample of a class counts, not the mean: with few trusted samples some class has one that is
unlike the others, and honest models fail on that too. Whoever passes goes on from the mean of the
models that passed, weighted by reputation; whoever fails begins with no reputation at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from weightshare.federated.local import Examples, set_weights
from weightshare.federated.standing import shares
from weightshare.federated.vectors import Vector, weighted_sum

LEAST = 2
"""Trusted samples below which a class says nothing."""
LIMIT = 1.0
"""In losses of a guess. With 50 trusted samples the worst class of honest models had at most 0.74
on digits (seeds 0 to 4) and 0.66 on Fashion-MNIST (seeds 0 and 1), that of label flippers at least
2.2 and 3.2."""


@dataclass(frozen=True)
class Outcome:
    """What an examination has decided."""

    reputation: Mapping[str, float]
    """Of everybody; sums to 1."""
    failed: tuple[str, ...]
    entitled: tuple[str, ...]
    """Who goes on from the common model; nobody where nobody passed."""
    model: Vector | None
    """``(D,)``; None where nobody passed."""


def worst_class(model: nn.Module, vector: Vector, data: Examples) -> float:
    """The loss on the best trusted sample of the worst class, in losses of a guess."""
    inputs, labels = data
    set_weights(model, vector)
    with torch.no_grad():
        scores = model(inputs)
    losses = cross_entropy(scores, labels, reduction="none")
    classes = [c for c in labels.unique() if (labels == c).sum() >= LEAST]
    worst = max((float(losses[labels == c].min()) for c in classes), default=0.0)
    return worst / log(scores.shape[1])


def examine(
    models: Mapping[str, Vector],
    reputation: Mapping[str, float],
    threshold: float,
    passes: Callable[[Vector], bool],
) -> Outcome:
    """Examine everybody; whoever passes and is not below the threshold gets the common model."""
    failed = tuple(name for name in sorted(models) if not passes(models[name]))
    left = {name: 0.0 if name in failed else value for name, value in reputation.items()}
    if not sum(left.values()) > 0:
        return Outcome(reputation, failed, (), None)
    after = shares(left)
    entitled = tuple(name for name in sorted(after) if after[name] >= threshold)
    weights = shares({name: after[name] for name in entitled})
    common = weighted_sum([models[name] for name in entitled], list(weights.values()))
    return Outcome(after, failed, entitled, common)
