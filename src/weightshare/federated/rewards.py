"""Every participant's reward as a prefix of one ordering of the aggregate's entries.

A reward keeps the ``k`` entries of largest magnitude. Larger quotas contain smaller ones, so one
selection serves all participants: a few partitions, each within what the one before has left open,
find the k-th largest magnitude of every quota. A reward is then one comparison.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from weightshare.federated.vectors import Vector

MARGIN = 1e-12
BLOCK = 1 << 16


def entries_for(quota: float, dimension: int) -> int:
    """``k(q) = ⌊q·D·(1 + 10⁻¹²)⌋``: entries that a quota in [0, 1] is worth.

    The margin is above the rounding of a quota and below any real difference, so that rational
    quotas are exact: 0.29 of 100 entries are 29, not 28, and a third of 135 million is 45 million.
    """
    return min(dimension, floor(quota * dimension * (1 + MARGIN)))


def layer_entries_for(quota: float, dimension: int) -> int:
    """``⌈q·D⌉`` for one tensor, as the reference's code."""
    return min(dimension, ceil(quota * dimension * (1 - MARGIN)))


def bytes_of(count: int, dimension: int) -> int:
    """Of a reward of ``count`` entries as it is sent; see ``Rewards.cut``."""
    if 2 * count > dimension:
        return 4 * dimension
    return 4 * count + -(-dimension // 8) if count else 0


class Order:
    """The entries by falling magnitude, known where the given quotas cut it.

    ``support(k)`` is exactly the ``k`` largest entries for each ``k`` of ``quotas``; equal
    magnitudes go to the lower index first. O(D log N) for N quotas, without a sort of all entries.

    Args:
        vector: float32, finite.
        quotas: the numbers of entries asked for.
    """

    def __init__(self, vector: Vector, quotas: Iterable[int]) -> None:
        self._magnitudes = np.abs(vector)
        wanted = sorted({k for k in quotas if 0 < k < len(vector)}, reverse=True)
        self._edges: dict[int, np.float32] = {}
        """The k-th largest magnitude."""
        self._tied: set[int] = set()
        """Quotas beyond which the same magnitude goes on."""
        if wanted:
            places = [len(vector) - k for k in wanted]
            magnitudes = self._magnitudes.copy()
            _partition(magnitudes, places, 0)
            before = 0
            for k, place in zip(wanted, places, strict=True):
                self._edges[k] = magnitudes[place]
                # What lies left of a place is not larger; between two places, all that could tie.
                if magnitudes[before:place].max() == magnitudes[place]:
                    self._tied.add(k)
                before = place

    def support(self, count: int, out: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """Which entries the ``count`` largest are, ``(D,)``; ``count`` is one of the quotas."""
        size = len(self._magnitudes)
        support = np.empty(size, bool) if out is None else out
        if count in (0, size):
            support[:] = count > 0
            return support
        edge = self._edges[count]
        np.greater_equal(self._magnitudes, edge, out=support)
        if count in self._tied:
            larger = int(np.count_nonzero(self._magnitudes > edge))
            support[np.flatnonzero(self._magnitudes == edge)[count - larger :]] = False
        return support

    def __len__(self) -> int:
        return len(self._magnitudes)


def _partition(magnitudes: Vector, places: Sequence[int], start: int) -> None:
    """Put at each of the rising ``places`` what a sort would; ``magnitudes`` begin at ``start``.

    One place at a time, because NumPy's vectorised selection takes one: with all at once it took
    six times as long.
    """
    if not places:
        return
    middle = len(places) // 2
    place = places[middle] - start
    magnitudes.partition(place)
    _partition(magnitudes[:place], places[:middle], start)
    _partition(magnitudes[place + 1 :], places[middle + 1 :], start + place + 1)


class Rewards:
    """What each participant gets of one aggregate.

    Args:
        aggregate: ``(D,)`` float32.
        quotas: share of the entries, in [0, 1], by participant.
        layers: sizes of the tensors; given, each tensor has the quota for itself.
    """

    def __init__(
        self,
        aggregate: Vector,
        quotas: Mapping[str, float],
        layers: Sequence[int] | None = None,
    ) -> None:
        self.aggregate = aggregate
        sizes = [len(aggregate)] if layers is None else list(layers)
        entries = entries_for if layers is None else layer_entries_for
        edges = np.cumsum([0, *sizes])
        self._parts: list[tuple[Order, dict[str, int]]] = []
        self._scratch: tuple[NDArray[np.bool_], Vector] | None = None
        for start, size in zip(edges, sizes, strict=False):
            counts = {name: entries(quota, size) if quota else 0 for name, quota in quotas.items()}
            part = aggregate[start : start + size]
            self._parts.append((Order(part, counts.values()), counts))

    def count(self, name: str) -> int:
        """How many entries the participant gets."""
        return sum(counts[name] for _, counts in self._parts)

    def support(self, name: str, out: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """Which entries, ``(D,)``."""
        support = np.empty(len(self.aggregate), bool) if out is None else out
        place = 0
        for order, counts in self._parts:
            order.support(counts[name], support[place : place + len(order)])
            place += len(order)
        return support

    def cut(
        self, name: str, values: Vector | None = None
    ) -> tuple[NDArray[np.bool_] | None, Vector]:
        """What is sent: the support and the aggregate (or other ``values``) on it, in the order of
        indices; or None and the whole reward, where that is more than half of the entries.

        Zeros are written in a third of the time that it takes to close the gaps; a reward is never
        longer than an update. Both results are views of memory that the next call uses again: fresh
        memory for everybody would cost more than all else.
        """
        if self._scratch is None:
            self._scratch = np.empty(len(self.aggregate), bool), np.empty_like(self.aggregate)
        support, result = self._scratch
        source = self.aggregate if values is None else values
        if 2 * self.count(name) > len(source):
            return None, self.dense(name, values, result)
        self.support(name, support)
        filled = 0
        for start in range(0, len(source), BLOCK):
            kept = source[start : start + BLOCK].compress(support[start : start + BLOCK])
            result[filled : filled + len(kept)] = kept
            filled += len(kept)
        return support, result[:filled]

    def dense(self, name: str, values: Vector | None = None, out: Vector | None = None) -> Vector:
        """The reward: the aggregate (or other ``values``) on its support, zero elsewhere."""
        source = self.aggregate if values is None else values
        result = np.empty_like(source) if out is None else out
        if self._scratch is None:
            self._scratch = np.empty(len(source), bool), np.empty_like(source)
        support = self.support(name, self._scratch[0])
        # Bit patterns times 0 or 1: a negative entry leaves no -0 behind, and a choice takes twice
        # as long.
        np.multiply(source.view(np.uint32), support, out=result.view(np.uint32))
        return result
