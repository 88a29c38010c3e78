"""What every ranking returns: blocks by importance and the order in which they go."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ranking:
    """Blocks by importance. Block numbers are those of the ranked model.

    Args:
        method: the name of the ranking.
        scores: importance of every block, higher is more important; comparable within one ranking.
        order: blocks in the order of removal, least important first; at least as many as asked for.
        metadata: what the method found on the way, and ``block_runs``, its cost.
    """

    method: str
    scores: list[float]
    order: list[int]
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Ranking":
        """Read what ``to_dict`` wrote."""
        return cls(**data)


def ascending(scores: Sequence[float], protect: Sequence[int]) -> list[int]:
    """Blocks by score, protected ones last; equal scores go in order of depth."""
    return sorted(range(len(scores)), key=lambda block: (block in set(protect), scores[block]))
