"""Who sends what cannot be used, or loses its model too often, and is suspended for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Conduct:
    """Counts by participant, and who is suspended until the operator readmits it."""

    strike_limit: int = 3
    """Invalid replies after which a participant is suspended."""
    resync_limit: int = 3
    """Times it may ask for its model."""
    strikes: dict[str, int] = field(default_factory=dict)
    resyncs: dict[str, int] = field(default_factory=dict)
    suspended: set[str] = field(default_factory=set)

    def strike(self, name: str) -> tuple[int, bool]:
        """Count an invalid reply; how many that makes, and whether it is one too many."""
        count = self.strikes[name] = self.strikes.get(name, 0) + 1
        return count, count >= self.strike_limit

    def resync(self, name: str) -> tuple[int, bool]:
        """Count a request for the model; how many that makes, and whether it is one too many."""
        count = self.resyncs[name] = self.resyncs.get(name, 0) + 1
        return count, count > self.resync_limit

    def pardon(self, name: str) -> None:
        """Begin with a clean sheet."""
        self.strikes.pop(name, None)
        self.resyncs.pop(name, None)
        self.suspended.discard(name)

    def state(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "strikes": self.strikes,
            "resyncs": self.resyncs,
            "suspended": sorted(self.suspended),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.strikes, self.resyncs = dict(state["strikes"]), dict(state["resyncs"])
        self.suspended = set(state["suspended"])
