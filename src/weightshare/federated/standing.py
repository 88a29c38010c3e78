"""What the server remembers of its participants between rounds, and who comes and goes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from weightshare.errors import UserError
from weightshare.federated.config import ReputationConfig


@dataclass(frozen=True)
class Standing:
    """The server's memory; JSON holds it exactly."""

    round: int = 0
    """Rounds done."""
    reputation: Mapping[str, float] = field(default_factory=dict)
    """Of the live participants; sums to 1 (or is all 0 before the first round)."""
    assessed: Mapping[str, int] = field(default_factory=dict)
    """Rounds in which a participant's update was assessed."""
    misses: Mapping[str, int] = field(default_factory=dict)
    """Rounds in a row without a valid answer."""
    inactive: Mapping[str, float] = field(default_factory=dict)
    """Participants that stopped answering, with the reputation they had."""
    expelled: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Removed participants: round, reputation and threshold."""
    usual: Mapping[str, float] = field(default_factory=dict)
    """Mean cosine of a participant's first rounds."""
    falls: Mapping[str, float] = field(default_factory=dict)
    """How far cosines fell below it since, added up (:mod:`~weightshare.federated.turns`)."""

    @classmethod
    def begin(
        cls,
        names: Iterable[str],
        config: ReputationConfig,
        sizes: Mapping[str, float] | None = None,
    ) -> "Standing":
        """The standing before the first round.

        Raises:
            UserError: no participants, or attested sizes are asked for and not given.
        """
        names = sorted(names)
        if not names:
            raise UserError("A federation needs at least one participant; none is admitted.")
        if config.start == "zero":
            first = dict.fromkeys(names, 0.0)
        elif config.start == "uniform":
            first = dict.fromkeys(names, 1 / len(names))
        else:
            first = shares(attested(names, sizes))
        return cls(reputation=first)

    @property
    def live(self) -> list[str]:
        """Participants that take part."""
        return sorted(self.reputation)

    def state(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> "Standing":
        """The inverse of ``state``."""
        return cls(**state)


def missed(standing: Standing, config: ReputationConfig) -> Standing:
    """A round in which nobody gave a valid answer: it counts as missed for all, no more."""
    misses = {name: standing.misses.get(name, 0) + 1 for name in standing.reputation}
    return replace(standing, round=standing.round + 1, misses=misses)


def admit(standing: Standing, name: str, config: ReputationConfig) -> Standing:
    """Let a newcomer, a returning or a wrongly removed participant in, at the threshold.

    Never at the mean: whoever comes back under a new name must not gain by it.
    """
    if name in standing.reputation:
        return standing
    share = config.threshold / (len(standing.reputation) + 1)
    share = min(share, standing.inactive.get(name, inf))
    old = standing.reputation
    scale = 1 - share if sum(old.values()) > 0 else 1.0
    joined = {other: value * scale for other, value in old.items()} | {name: share}
    return replace(
        standing,
        reputation=shares(joined) if sum(joined.values()) > 0 else joined,
        assessed={n: c for n, c in standing.assessed.items() if n != name},
        misses={**standing.misses, name: 0},
        inactive={n: r for n, r in standing.inactive.items() if n != name},
        expelled={n: e for n, e in standing.expelled.items() if n != name},
        usual={n: m for n, m in standing.usual.items() if n != name},
        falls={n: s for n, s in standing.falls.items() if n != name},
    )


def without(standing: Standing, name: str) -> Standing:
    """``name`` takes no part for the time being; the others keep their proportions."""
    left = dict(standing.reputation)
    before = left.pop(name)
    return replace(
        standing,
        reputation=shares(left) if sum(left.values()) > 0 else left,
        inactive={**standing.inactive, name: before},
    )


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """``values`` divided by their sum."""
    total = sum(values.values())
    return {name: value / total for name, value in values.items()}


def attested(names: Iterable[str], sizes: Mapping[str, float] | None) -> dict[str, float]:
    """The sizes of ``names``; refused where one is missing or no size."""
    names = list(names)
    if sizes is None or any(name not in sizes for name in names):
        raise UserError(
            "The rules weigh participants by attested numbers of samples, which are not given for "
            "all; give sizes, or use first_weights='uniform' and start='zero'."
        )
    found = {name: float(sizes[name]) for name in names}
    if not (all(0 <= size < inf for size in found.values()) and sum(found.values()) > 0):
        raise UserError(f"The attested sizes are {found}; give numbers >= 0 that are not all 0.")
    return found


def _plain(value: Any) -> Any:
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
