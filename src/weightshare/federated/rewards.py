"""Every participant's reward as a prefix of one ordering of the aggregate's entries.

A reward keeps the ``k`` entries of largest magnitude. Larger quotas contain smaller ones, so one
selection serves all participants: where a sample, or the leading bits, place the k-th largest entry
of some quota, the few entries around are sorted. A reward is then one comparison.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil, floor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightshare.federated.vectors import Vector

MARGIN = 1e-12
BLOCK = 1 << 16
SAMPLE = 1 << 14
FEW = 4
"""Intervals up to which comparing with each is quicker than counting."""
MANY = 10_000
"""Entries that are sorted in no time."""
SHIFT = 16
"""Magnitudes are first compared by the upper 15 bits of their float32 pattern."""


def entries_for(quota: float, dimension: int) -> int:
    """``k(q) = ⌊q·D·(1 + 10⁻¹²)⌋``: entries that a quota in [0, 1] is worth.

    The margin is above the rounding of a quota and below any real difference, so that rational
    quotas are exact: 0.29 of 100 entries are 29, not 28, and a third of 135 million is 45 million.
    """
    return min(dimension, floor(quota * dimension * (1 + MARGIN)))


def layer_entries_for(quota: float, dimension: int) -> int:
    """``⌈q·D⌉`` for one tensor, as the reference's code."""
    return min(dimension, ceil(quota * dimension * (1 - MARGIN)))


class Order:
    """The entries by falling magnitude, known where the given quotas cut it.

    ``support(k)`` is exactly the ``k`` largest entries for each ``k`` of ``quotas``; equal
    magnitudes go to the lower index first. O(D), without a sort of all entries.

    Args:
        vector: float32, finite.
        quotas: the numbers of entries asked for.
    """

    def __init__(self, vector: Vector, quotas: Iterable[int]) -> None:
        self.vector = vector
        wanted = sorted({k for k in quotas if 0 < k < len(vector)})
        self._edges = dict(zip(wanted, _edges(vector, wanted), strict=True))

    def support(self, count: int, out: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """Which entries the ``count`` largest are, ``(D,)``; ``count`` is one of the quotas."""
        support = np.empty(len(self.vector), bool) if out is None else out
        if count in (0, len(self.vector)):
            support[:] = count > 0
            return support
        edge = self._edges[count]
        for place, magnitudes in _magnitudes(self.vector):
            np.greater_equal(magnitudes, edge.value, out=support[place])
        if edge.reached > count:
            ties = np.flatnonzero(np.abs(self.vector) == edge.value)
            support[ties[count - edge.larger :]] = False
        return support


class _Edge(NamedTuple):
    """The k-th largest magnitude, how many are larger and how many at least as large."""

    value: np.float32
    larger: int
    reached: int


def _magnitudes(vector: Vector) -> Iterator[tuple[slice, Vector]]:
    """Block by block through one buffer: fresh memory costs more than the arithmetic on it."""
    buffer = np.empty(min(len(vector), BLOCK), np.float32)
    for start in range(0, len(vector), BLOCK):
        part = vector[start : start + BLOCK]
        yield slice(start, start + len(part)), np.abs(part, out=buffer[: len(part)])


def _edges(vector: Vector, wanted: Sequence[int]) -> list[_Edge]:
    """The edge of each k; ``wanted`` rises."""
    if not wanted:
        return []
    return _by_sample(vector, wanted) or _by_counting(vector, wanted)


def _by_sample(vector: Vector, wanted: Sequence[int]) -> list[_Edge] | None:
    """Edges looked for where a sample says they are; None where these are many places, or wrong."""
    size = len(vector)
    step = max(1, size // SAMPLE)
    count = -(-size // step)
    places = (1 - np.array(wanted) / size) * count
    margin = 3 * count**0.5  # six standard deviations of a median's place
    new = np.flatnonzero([True, *(places[:-1] - places[1:] > 2 * margin)])
    ends = np.append(new[1:] - 1, -1)
    covered = (places[new] - places[ends] + 2 * margin).sum() / count * size
    if len(new) > FEW or covered > max(size / 10, MANY):
        return None
    sample = np.sort(np.abs(vector[::step]))
    low = sample[np.clip(places - margin, 0, count - 1).astype(int)]
    high = sample[np.clip(places + margin, 0, count - 1).astype(int)]
    low[places < margin], high[places + margin >= count] = 0, np.inf
    intervals = list(zip(low[ends], high[new], strict=True))
    near: list[list[Vector]] = [[] for _ in intervals]
    above = np.zeros(len(intervals), np.int64)
    for _, magnitudes in _magnitudes(vector):
        for number, (least, most) in enumerate(intervals):
            up = magnitudes >= least
            over = magnitudes > most
            above[number] += np.count_nonzero(over)
            np.not_equal(up, over, out=up)
            near[number].append(magnitudes.take(np.flatnonzero(up)))
    edges: list[_Edge] = []
    which = np.searchsorted(new, np.arange(len(wanted)), side="right") - 1
    for number, parts in enumerate(near):
        mine = np.array(wanted)[which == number]
        inside = np.sort(np.concatenate(parts))
        if mine[0] <= above[number] or mine[-1] > above[number] + len(inside):
            return None
        edges += _ranked(inside, above[number] + len(inside), mine)
    return edges


def _by_counting(vector: Vector, wanted: Sequence[int]) -> list[_Edge]:
    """Edges by the leading bits of all entries."""
    counts = np.zeros(1 << 15, np.int64)
    for _, magnitudes in _magnitudes(vector):
        counts += np.bincount(_coarse(magnitudes), minlength=1 << 15)
    counts = counts[::-1]
    falling = np.cumsum(counts)  # entries in the n + 1 largest coarse values
    places = np.searchsorted(falling, wanted)
    boundaries = np.unique(places)
    chosen = np.zeros(1 << 15, bool)
    chosen[(1 << 15) - 1 - boundaries] = True
    near = [
        magnitudes.take(np.flatnonzero(chosen.take(_coarse(magnitudes))))
        for _, magnitudes in _magnitudes(vector)
    ]
    inside = np.sort(np.concatenate(near))
    # Entries above a boundary's coarse value that are not themselves near a boundary.
    beyond = falling[boundaries] - np.cumsum(counts[boundaries])
    reach = len(inside) + beyond[np.searchsorted(boundaries, places)]
    return _ranked(inside, reach, np.array(wanted))


def _ranked(
    inside: Vector, reach: NDArray[np.int64] | np.int64, wanted: NDArray[np.int64]
) -> list[_Edge]:
    """Edges among sorted magnitudes, of which the smallest is the ``reach``-th largest of all."""
    values = inside[reach - wanted]
    larger = reach - inside.searchsorted(values, "right")
    reached = reach - inside.searchsorted(values)
    return [_Edge(*each) for each in zip(values, larger.tolist(), reached.tolist(), strict=True)]


def _coarse(magnitudes: Vector) -> NDArray[np.uint16]:
    # Bit patterns of positive floats are in the order of their values.
    return (magnitudes.view(np.uint32) >> SHIFT).astype(np.uint16)


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

    def support(self, name: str) -> NDArray[np.bool_]:
        """Which entries, ``(D,)``."""
        supports = [order.support(counts[name]) for order, counts in self._parts]
        return supports[0] if len(supports) == 1 else np.concatenate(supports)

    def cut(self, name: str, values: Vector | None = None) -> tuple[NDArray[np.bool_], Vector]:
        """The support, and the aggregate (or other ``values``) on it, in the order of indices.

        Both are views of memory that the next call uses again: fresh memory for everybody would
        cost more than all else.
        """
        if self._scratch is None:
            self._scratch = np.empty(len(self.aggregate), bool), np.empty_like(self.aggregate)
        support, result = self._scratch
        source = self.aggregate if values is None else values
        place = filled = 0
        for order, counts in self._parts:
            order.support(counts[name], support[place : place + len(order.vector)])
            place += len(order.vector)
        for start in range(0, len(source), BLOCK):
            kept = source[start : start + BLOCK].compress(support[start : start + BLOCK])
            result[filled : filled + len(kept)] = kept
            filled += len(kept)
        return support, result[:filled]

    def dense(self, name: str) -> Vector:
        """The reward: the aggregate on its support, zero elsewhere, ``(D,)``."""
        return np.where(self.support(name), self.aggregate, np.float32(0))
