r"""From updates to reputations, and from reputations to rewards: one round of RFFL.

With updates :math:`u_i` (new weights minus old) of the live participants :math:`R`:

.. math::
    g_i &= u_i \min(1, \Gamma / \|u_i\|), \qquad a = \textstyle\sum_i \omega_i g_i \\
    \varphi_i &= \langle g_i, a\rangle / (\|g_i\| \|a\|) \\
    r_i &\leftarrow \alpha r_i + (1 - \alpha)\,\varphi_i, \quad
        \text{not below 0, then divided by the sum} \\
    q_i &= r_i / \max_j r_j \quad (0 \text{ where } r_i < \beta = \kappa / |R|)

:math:`\omega` is uniform (or attested) in the first round, the last round's reputation afterwards.
Below :math:`\beta` after ``patience`` rounds, a participant is removed for good.

For constant :math:`\varphi`, sum :math:`S`, and :math:`\sum r^{(0)} = 1`, with
:math:`\lambda = \alpha / (\alpha + (1-\alpha) S)`:
:math:`r_i^{(t)} = \varphi_i/S + \lambda^t (r_i^{(0)} - \varphi_i/S)`. The sum of reputations is 1
while cosines are of order 1, so the memory :math:`\lambda` gets shorter with more participants.

Everything goes by a participant's name, in the order of names: positions and times of arrival have
no influence, not even on rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt, tanh

import numpy as np

from weightshare.errors import UserError
from weightshare.federated.config import ReputationConfig
from weightshare.federated.copies import copies_among
from weightshare.federated.standing import Standing, attested, shares
from weightshare.federated.turns import falls_after, usual_after
from weightshare.federated.vectors import Vector, combined, products, squared_norm, weighted_sum


@dataclass(frozen=True)
class Assessment:
    """One round, as it was judged. Mappings go by participant."""

    round: int
    aggregate: Vector
    """a, ``(D,)``."""
    scales: Mapping[str, float]
    """``g_i = scales_i · u_i``."""
    weights: Mapping[str, float]
    """ω; sums to 1."""
    cosines: Mapping[str, float]
    """φ in [-1, 1], after copies were made to share their credit, or lost it."""
    reputation: Mapping[str, float]
    """r of those who are still live."""
    quotas: Mapping[str, float]
    """q in [0, 1] of those who answered and are live."""
    threshold: float
    """β of this round."""
    below: tuple[str, ...] = ()
    """Who is below it, or has turned."""
    turned: tuple[str, ...] = ()
    """Whose cosines fell too far below what they used to be."""
    expelled: tuple[str, ...] = ()
    would_expel: tuple[str, ...] = ()
    """Who should have been removed and was not: observing, no budget left, or no quorum."""
    copies: tuple[tuple[str, ...], ...] = ()
    """Groups of participants whose updates are copies of each other."""
    flag: str = ""
    """What was unusual about the round as a whole."""


def assess(
    standing: Standing,
    updates: Mapping[str, Vector],
    config: ReputationConfig,
    *,
    sizes: Mapping[str, float] | None = None,
    reference: Vector | None = None,
    squares: Mapping[str, float] | None = None,
) -> tuple[Standing, Assessment]:
    """Judge the updates of one round.

    Args:
        standing: before the round; it is not changed.
        updates: ``(D,)`` float32 and finite, by participant; those of anyone who is not live are
            ignored. Live participants without one keep their reputation and get nothing.
        config: the rules.
        sizes: samples of each participant as the server knows them, never as a client claims.
        reference: ``(D,)``, an update computed from trusted data. Given, cosines are taken with it
            and the aggregate already has this round's weights.
        squares: squared norms of the updates, where they are known from checking them.

    Returns:
        The standing after the round, and how it came about.

    Raises:
        UserError: nobody is live, or an update is no finite vector of the others' length.
        ValueError: there is no update of a live participant (``missed`` counts such a round).
    """
    if not standing.reputation:
        raise UserError("No participant is left; readmit one or begin a new federation.")
    names = sorted(name for name in updates if name in standing.reputation)
    if not names:
        raise ValueError("a round without updates cannot be assessed")
    rows = [updates[name] for name in names]
    norms = _norms(names, rows, squares)
    rows, norms, factors = _tamed(rows, norms)
    scales = [_scale(norm, config) for norm in norms]
    groups = copies_among(names, rows, norms, config.duplicates)
    votes = {name: 1 / len(group) for group in groups for name in group}

    if reference is None:
        weights = _weights(standing, names, votes, config, sizes)
        aggregate, inner = combined(rows, _scaled(weights, scales))
        own = [
            sum(weights[names.index(other)] for group in groups if name in group for other in group)
            or weights[i]
            for i, name in enumerate(names)
        ]
        cosines = _cosines(
            inner.tolist(),
            norms,
            scales,
            squared_norm(aggregate),
            own if config.leave_one_out else None,
        )
    else:
        length = sqrt(squared_norm(reference))
        cosines = [
            _ratio(product, norm * length)
            for product, norm in zip(products(rows, reference), norms, strict=True)
        ]
    credit = votes if config.copies == "share" else dict.fromkeys(votes, 0.0)
    credited = {
        name: cosine * credit.get(name, 1.0) for name, cosine in zip(names, cosines, strict=True)
    }
    after, judged = smooth(standing, credited, config)
    if reference is not None:
        weights = _weights(after, names, votes, config, sizes)
        aggregate = weighted_sum(rows, _scaled(weights, scales))
    judged = replace(
        judged,
        aggregate=aggregate,
        scales={n: s * f for n, s, f in zip(names, scales, factors, strict=True)},
        weights=dict(zip(names, weights, strict=True)),
        copies=tuple(groups),
    )
    return after, judged


def smooth(
    standing: Standing, cosines: Mapping[str, float], config: ReputationConfig
) -> tuple[Standing, Assessment]:
    """The part of a round that follows the cosines: reputations, removals, quotas."""
    number = standing.round + 1
    earned = _positive_shares(cosines)
    mixed = earned if config.smooth_shares else cosines
    raw = {}
    for name, old in standing.reputation.items():
        keep = config.smoothing
        if config.falling and earned.get(name, old) < old:
            keep = config.falling
        raw[name] = (
            max(keep * old + (1 - keep) * mixed[name], config.clamp) if name in mixed else old
        )
    flag = ""
    if sum(raw.values()) > 0:
        reputation = shares(raw)
    else:
        reputation, flag = dict(standing.reputation), "no update agrees with the aggregate"
    threshold = config.threshold / len(reputation)
    # A round that says nothing about anybody is no reason to withhold or to remove.
    falls = falls_after(standing, cosines, config)
    turned = {n for n, fall in falls.items() if n in cosines and 0 < config.turn < fall}
    below = (
        [] if flag else sorted(n for n in reputation if reputation[n] < threshold or n in turned)
    )
    assessed = {**standing.assessed}
    for name in cosines:
        assessed[name] = assessed.get(name, 0) + 1

    due = [n for n in below if n in cosines and assessed[n] > config.patience]
    due.sort(key=lambda name: (reputation[name], name))
    recent = sum(e["round"] > number - config.window for e in standing.expelled.values())
    room = max(len(reputation) - max(config.quorum, 1), 0)
    if config.budget:
        room = min(room, max(config.budget - recent, 0))
    if config.observe:
        room = 0
    expelled, spared = due[:room], due[room:]
    record = {
        name: {"round": number, "reputation": reputation[name], "threshold": threshold}
        for name in expelled
    }
    left = {name: value for name, value in reputation.items() if name not in record}
    if record:
        left = shares(left)

    misses = {n: 0 if n in cosines else standing.misses.get(n, 0) + 1 for n in left}
    gone = {n: left[n] for n in left if misses[n] >= config.misses and len(left) > 1}
    if gone and len(gone) < len(left):
        left = {name: value for name, value in left.items() if name not in gone}
        left = shares(left) if sum(left.values()) > 0 else left
    else:
        gone = {}

    after = Standing(
        round=number,
        reputation=left,
        assessed=assessed,
        misses=misses,
        inactive={**standing.inactive, **gone},
        expelled={**standing.expelled, **record},
        usual=usual_after(standing, cosines, config),
        falls=falls,
    )
    withheld = set(below) if config.gate and not config.observe else set()
    if number <= config.probation:
        withheld = set(left)
    present = {name: value for name, value in left.items() if name in cosines}
    quotas = {
        name: 0.0 if name in withheld else quota for name, quota in _quotas(present, config).items()
    }
    return after, Assessment(
        round=number,
        aggregate=np.zeros(0, np.float32),
        scales={},
        weights={},
        cosines=dict(cosines),
        reputation=left,
        quotas=quotas,
        threshold=threshold,
        below=tuple(below),
        turned=tuple(sorted(turned)),
        expelled=tuple(expelled),
        would_expel=tuple(spared),
        flag=flag,
    )


def _positive_shares(cosines: Mapping[str, float]) -> dict[str, float]:
    positive = {name: max(value, 0.0) for name, value in cosines.items()}
    return shares(positive) if sum(positive.values()) > 0 else dict.fromkeys(cosines, 0.0)


def trajectory(cosine: float, total: float, start: float, smoothing: float, rounds: int) -> float:
    """Reputation after ``rounds`` of constant cosines that sum to ``total`` (the closed form)."""
    memory = smoothing / (smoothing + (1 - smoothing) * total)
    limit = cosine / total
    return limit + memory**rounds * (start - limit)


def _norms(
    names: Sequence[str], rows: Sequence[Vector], squares: Mapping[str, float] | None
) -> list[float]:
    size = rows[0].size
    for name, row in zip(names, rows, strict=True):
        if row.shape != (size,):
            raise UserError(
                f"The update of {name!r} has shape {row.shape}; give vectors of one length."
            )
    known = squares or {n: squared_norm(row) for n, row in zip(names, rows, strict=True)}
    for name in names:
        if not isfinite(known[name]):
            raise UserError(f"The update of {name!r} is not finite; leave it out.")
    return [sqrt(known[name]) for name in names]


def _tamed(
    rows: Sequence[Vector], norms: Sequence[float]
) -> tuple[list[Vector], list[float], list[float]]:
    """Rows whose products would leave float32 brought to length 1, with the factor it took."""
    safe, lengths, factors = [], [], []
    for row, norm in zip(rows, norms, strict=True):
        if norm == 0 or 1e-9 < norm < 1e15:
            safe.append(row)
            lengths.append(norm)
            factors.append(1.0)
        else:
            safe.append((row.astype(np.float64) / norm).astype(np.float32))
            lengths.append(1.0)
            factors.append(1 / norm)
    return safe, lengths, factors


def _scale(norm: float, config: ReputationConfig) -> float:
    if norm == 0 or not isfinite(config.norm):
        return 1.0
    if config.normalisation == "exact":
        return config.norm / norm
    return min(1.0, config.norm / norm)


def _weights(
    standing: Standing,
    names: Sequence[str],
    votes: Mapping[str, float],
    config: ReputationConfig,
    sizes: Mapping[str, float] | None,
) -> list[float]:
    """ω over those who answered; sums to 1."""
    if standing.round == 0:
        if config.first_weights == "uniform":
            raw = dict.fromkeys(names, 1.0)
        else:
            raw = attested(names, sizes)
            if config.first_weights == "capped":
                cap = 2 * sum(raw.values()) / len(raw)
                raw = {name: min(value, cap) for name, value in raw.items()}
    else:
        raw = {name: standing.reputation.get(name, 0.0) for name in names}
        if not sum(raw.values()) > 0:
            raw = dict.fromkeys(names, 1.0)
    voted = shares({name: raw[name] * votes.get(name, 1.0) for name in names})
    return [voted[name] for name in names]


def _scaled(weights: Sequence[float], scales: Sequence[float]) -> list[float]:
    return [weight * scale for weight, scale in zip(weights, scales, strict=True)]


def _cosines(
    products: Sequence[float],
    norms: Sequence[float],
    scales: Sequence[float],
    square: float,
    own: Sequence[float] | None,
) -> list[float]:
    result = []
    for i, product in enumerate(products):
        inner, length, rest = product * scales[i], norms[i] * scales[i], square
        if own is not None and own[i] < 1 - 1e-12:  # who is alone has only himself to compare with
            # ⟨g, a - ωg⟩ and ‖a - ωg‖² without forming a - ωg.
            rest = square - 2 * own[i] * inner + (own[i] * length) ** 2
            inner = inner - own[i] * length**2
        result.append(_ratio(inner, length * sqrt(max(rest, 0.0))))
    return result


def _ratio(product: float, lengths: float) -> float:
    return min(max(float(product) / lengths, -1.0), 1.0) if lengths > 0 else 0.0


def _quotas(reputation: Mapping[str, float], config: ReputationConfig) -> dict[str, float]:
    if config.reward == "full":
        return dict.fromkeys(reputation, 1.0)
    worth = dict(reputation)
    if config.reward == "tanh":
        worth = {name: tanh(config.altruism * value) for name, value in reputation.items()}
    best = max(worth.values(), default=0.0)
    return {name: value / best if best > 0 else 0.0 for name, value in worth.items()}
