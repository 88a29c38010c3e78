"""Every participant's reward as a prefix of one ordering of the aggregate's entries.

A reward keeps the ``k`` entries of largest magnitude. Larger quotas contain smaller ones, so one
selection serves all participants: entries are put in classes between consecutive quotas by their
leading bits, and only the few entries that share those bits with a boundary are compared exactly.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightshare.federated.vectors import Vector

Classes = NDArray[np.uint8] | NDArray[np.uint16]
MARGIN = 1e-12
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
    """Entries by falling magnitude, sorted as far as the given quotas can tell.

    ``indices[:k]`` are exactly the ``k`` largest entries for each ``k`` of ``quotas``; equal
    magnitudes go to the lower index first. O(D), without a sort of all entries.

    Args:
        vector: float32, finite, fewer than 2³¹ entries.
        quotas: the numbers of entries asked for.
    """

    def __init__(self, vector: Vector, quotas: Iterable[int]) -> None:
        self.vector = vector
        size = len(vector)
        wanted = sorted({k for k in quotas if 0 < k < size})
        self._whole: NDArray[np.int32] | None = None
        self.ends = [*wanted, size]
        """Ends of the classes in the ordering."""
        self.classes = _classes(vector, wanted)
        """Class of each entry: 0 for the smallest quota's, the last for what nobody gets."""

    @property
    def indices(self) -> NDArray[np.int32]:
        """The ordering, up to the largest quota below the dimension."""
        if self._whole is None:
            count = self.ends[-2] if len(self.ends) > 1 else 0
            order = np.argsort(self.classes, kind="stable")[:count]
            self._whole = order.astype(np.int32)
        return self._whole

    def support(self, count: int) -> NDArray[np.bool_]:
        """Which entries the ``count`` largest are, ``(D,)``; ``count`` is one of the quotas."""
        if count == 0:
            return np.zeros(len(self.vector), bool)
        return self.classes <= self.ends.index(count)


def _classes(vector: Vector, wanted: Sequence[int]) -> Classes:
    kind: Any = np.uint8 if len(wanted) < 256 else np.uint16
    if not wanted:
        return np.zeros(len(vector), kind)
    bits = np.abs(vector).view(np.uint32)
    coarse = (bits >> SHIFT).astype(np.uint16)
    counts = np.bincount(coarse, minlength=1 << 15)
    falling = np.cumsum(counts[::-1])
    above = falling[::-1]  # entries of this coarse value or larger
    # A coarse value whose entries all fall between two quotas has one class; else it is a boundary.
    first = _passed(np.searchsorted(falling, wanted, side="left") + 1)
    last = _passed(np.searchsorted(falling, wanted, side="right"))
    classes = first.astype(kind).take(coarse)
    split = (first != last) & (counts > 0)
    if not split.any():
        return classes
    marks = np.flatnonzero(split.take(coarse))
    values = np.flatnonzero(split)
    ordinal = np.zeros(1 << 15, np.uint16)
    ordinal[values] = np.arange(len(values), dtype=np.uint16)
    by_value = np.argsort(ordinal.take(coarse.take(marks)), kind="stable")
    marks = marks[by_value]
    stops = np.cumsum(counts[values])
    for value, stop in zip(values, stops, strict=True):
        count = int(counts[value])
        places = marks[stop - count : stop]  # ascending, as both selections kept the order
        larger = int(above[value]) - count
        magnitudes = bits[places]
        inside = [k - larger for k in wanted if larger < k < larger + count]
        classes[places] = _exact(magnitudes, inside, int(first[value]), kind)
    return classes


def _passed(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of ``places`` lie at or before each coarse value, counted from the largest."""
    return np.cumsum(np.bincount(places, minlength=(1 << 15) + 1)[: 1 << 15])[::-1]


def _exact(magnitudes: NDArray[np.uint32], quotas: Sequence[int], base: int, kind: Any) -> Classes:
    """Classes of entries in index order, cut after each number in ``quotas``."""
    size = len(magnitudes)
    result: Classes = np.full(size, base + len(quotas), kind)
    ranked = np.partition(magnitudes, [size - k for k in quotas])
    for number, k in reversed(list(enumerate(quotas))):
        edge = ranked[size - k]
        inside = magnitudes > edge
        ties = np.flatnonzero(magnitudes == edge)
        inside[ties[: k - int(inside.sum())]] = True
        result[inside] = base + number
    return result


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
        for start, size in zip(edges, sizes, strict=False):
            counts = {name: entries(quota, size) if quota else 0 for name, quota in quotas.items()}
            part = aggregate[start : start + size]
            self._parts.append((Order(part, counts.values()), counts))

    def count(self, name: str) -> int:
        """How many entries the participant gets."""
        return sum(counts[name] for _, counts in self._parts)

    def support(self, name: str) -> NDArray[np.bool_]:
        """Which entries, ``(D,)``."""
        return np.concatenate([order.support(counts[name]) for order, counts in self._parts])

    def dense(self, name: str) -> Vector:
        """The reward: the aggregate on its support, zero elsewhere, ``(D,)``."""
        return np.where(self.support(name), self.aggregate, np.float32(0))
