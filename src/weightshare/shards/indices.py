"""Which shards make up a module's factors: draws that are the same everywhere and for ever.

Framework generators promise no stable stream between versions, and an adapter is worthless with
another index than it was trained with. So the generator and the shuffle are written out here:
SplitMix64 (Steele, Lea & Flood 2014), rejection sampling, Fisher-Yates. Nothing here may change
what is drawn; golden values are kept in the tests.
"""

import hashlib
from collections.abc import Iterable, Sequence

_MASK = (1 << 64) - 1


class SplitMix64:
    """A stream of 64-bit numbers, started from any sequence of printable parts."""

    def __init__(self, *key: object) -> None:
        text = "\x1f".join(map(str, key)).encode()
        self._state = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")

    def next(self) -> int:
        """The next number, uniform on 0 ... 2^64 - 1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, size: int) -> int:
        """A number uniform on 0 ... size - 1, without the bias of a bare remainder."""
        least = (1 << 64) % size
        while (value := self.next()) < least:
            pass
        return value % size


def draw(size: int, count: int, stream: SplitMix64) -> list[int]:
    """``count`` different numbers below ``size`` in random order: the head of a Fisher-Yates
    shuffle, in time and memory of ``count`` and not of ``size``."""
    moved: dict[int, int] = {}
    chosen = []
    for place in range(count):
        other = place + stream.below(size - place)
        chosen.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return chosen


def draw_balanced(used: list[int], count: int, stream: SplitMix64) -> list[int]:
    """``count`` different numbers below ``len(used)``, the least used first, ties at random.

    ``used`` holds how often each number has been drawn and is brought up to date. Drawn so again
    and again, no number is ever used twice more often than another.
    """
    order = draw(len(used), len(used), stream)
    rank = {number: place for place, number in enumerate(order)}
    # In the order of the shuffle: a sort by use would put the rare ones into the first rows.
    chosen = sorted(sorted(order, key=used.__getitem__)[:count], key=rank.__getitem__)
    for number in chosen:
        used[number] += 1
    return chosen


def checksum(indices: Iterable[Sequence[int]]) -> int:
    """63 bits that change with any index, its place or its module."""
    digest = hashlib.sha256()
    for index in indices:
        digest.update(len(index).to_bytes(8, "little"))
        for number in index:
            digest.update(int(number).to_bytes(4, "little"))
    return int.from_bytes(digest.digest()[:8], "little") >> 1
