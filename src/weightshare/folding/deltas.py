"""What a use has of its own although it shares: a copy, scales or a low-rank delta of a weight."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightshare.errors import UserError

KINDS = ("own", "scale", "low_rank")
HEAD = "lm_head.weight"


@dataclass(frozen=True, order=True)
class Delta:
    """Some blocks of a group have, together, something of their own on one shared parameter.

    Args:
        parameter: its name inside a block, such as ``mlp.up_proj.weight``; ``lm_head.weight`` is
            the head where it shares the embedding's weight.
        blocks: original block numbers, all of one group; none for the head.
        kind: ``own``, a copy; ``scale``, a factor per output row; ``low_rank``, a delta ``B A``.
        rank: of a low-rank delta, else 0.
    """

    parameter: str
    blocks: tuple[int, ...]
    kind: str
    rank: int = 0

    def size(self, shape: Sequence[int]) -> int:
        """Parameters it adds to a parameter of that shape."""
        if self.kind == "own":
            return math.prod(shape)
        return shape[0] if self.kind == "scale" else self.rank * sum(shape)

    def cut(self, parts: Iterable[Iterable[int]]) -> list["Delta"]:
        """One delta for the blocks of each part."""
        inside = [tuple(sorted(set(self.blocks) & set(part))) for part in parts]
        return [Delta(self.parameter, blocks, self.kind, self.rank) for blocks in inside if blocks]


def check_deltas(
    deltas: Iterable[Delta], groups: Sequence[tuple[int, ...]], private: Sequence[str]
) -> tuple[Delta, ...]:
    """The deltas in their canonical order.

    Raises:
        UserError: one that has no meaning under these groups.
    """
    ordered = sorted(
        Delta(delta.parameter, tuple(sorted(delta.blocks)), delta.kind, delta.rank)
        for delta in deltas
    )
    for delta in ordered:
        about = f"The delta of {delta.parameter!r} for the blocks {list(delta.blocks)}"
        if delta.kind not in KINDS:
            raise UserError(f"{about} is {delta.kind!r}; a delta is one of {', '.join(KINDS)}.")
        if (delta.rank > 0) != (delta.kind == "low_rank"):
            raise UserError(
                f"{about} has rank {delta.rank}; only a low-rank delta has one, from 1."
            )
        if not delta.blocks and delta.parameter != HEAD:
            raise UserError(f"{about} names no block; only {HEAD!r} belongs to none.")
        if delta.blocks and any(part in delta.parameter for part in private):
            raise UserError(f"{about} has no meaning: every use has that parameter to itself.")
        group = next((set(group) for group in groups if set(delta.blocks) <= set(group)), None)
        if group is None:
            raise UserError(f"{about} spans several groups; give one delta per group.")
        same = [
            other
            for other in ordered
            if other.parameter == delta.parameter and (other.kind == "own") == (delta.kind == "own")
        ]
        if any(set(d.blocks) & set(delta.blocks) or not d.blocks for d in same if d is not delta):
            raise UserError(f"{about} is not the only one; a use has at most one of a kind.")
        covered = {block for other in same for block in other.blocks}
        if delta.kind == "own" and delta.blocks and group <= covered:
            raise UserError(
                f"{about} leaves no block of its group on the shared parameter; leave at least one."
            )
    return tuple(ordered)


def without_empty_groups(deltas: Iterable[Delta], groups: Sequence[tuple[int, ...]]) -> list[Delta]:
    """Where the blocks of a group have all left a parameter, the first copy is the shared one."""
    kept = list(deltas)
    for group in groups:
        for parameter in {delta.parameter for delta in kept}:
            own = [
                d
                for d in kept
                if d.kind == "own" and d.parameter == parameter and set(d.blocks) <= set(group)
            ]
            if own and set(group) == {block for delta in own for block in delta.blocks}:
                kept.remove(own[0])
    return kept
