r"""A look at every model on trusted samples before anybody is paid.

Mislabelling one class of ten leaves nine, and with them cosines like anyone's: a reputation learns
of it too late, when a good model has been handed out. So everyone trains for itself for some rounds
(``ReputationConfig.probation``), which drives its faults home, and is then examined: a model fails
where on a class of the trusted samples

.. math:: \tfrac{1}{n_c} \textstyle\sum_{y = c} -\log p(y \mid x) > 2 \log C,

twice the loss of a guess among C classes. Whoever passes goes on from the mean of the models that
passed, weighted by reputation; whoever fails begins with no reputation at all.
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
LIMIT = 2.0
"""Times the loss of a guess. On digits with 50 trusted samples, seeds 0 and 1, the worst class of
honest models had 0.2 to 1 of it and that of label flippers 3 to 5."""


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
    """The largest mean loss of a class on trusted samples, in losses of a guess."""
    inputs, labels = data
    set_weights(model, vector)
    with torch.no_grad():
        scores = model(inputs)
    losses = cross_entropy(scores, labels, reduction="none")
    classes = [c for c in labels.unique() if (labels == c).sum() >= LEAST]
    worst = max((float(losses[labels == c].mean()) for c in classes), default=0.0)
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
