"""What a fold does to a model's blocks: which are removed, which share one set of weights.

Block numbers are always those of the original model, counted from 0.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weightshare.errors import UserError
from weightshare.folding.deltas import Delta, check_deltas

REPRESENTATIVES = ("first", "last", "best", "mean", "whitened")


@dataclass(frozen=True)
class FoldPlan:
    """Remove some blocks, let groups of the others share their weights.

    Args:
        blocks: number of blocks of the original model.
        removed: blocks that are deleted.
        groups: blocks that share one set of weights. Blocks named nowhere run on their own weights,
            so only the groups of two and more need be given. Every use keeps its own depth, its
            norms and its key/value cache slot.
        representative: whose weights stand for a group: ``first`` (as the paper), ``last``,
            ``best`` (lowest calibration loss), ``mean``, or ``whitened`` (least error on the
            activations of all uses); ``best`` and ``whitened`` need calibration text when the plan
            is carried out.
        representatives: the block chosen for each group, in the order of ``groups``; filled in when
            a plan with a block-valued ``representative`` is carried out, or given by hand.
        private: parts of parameter names that stay private to each use.
        deltas: what some blocks of a group have of their own on top, such as a low-rank delta.

    Raises:
        UserError: a block number is out of range or named twice, nothing is left, or a delta has
            no meaning.
    """

    blocks: int
    removed: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    representative: str = "first"
    representatives: tuple[int, ...] | None = None
    private: tuple[str, ...] = ("norm",)
    deltas: tuple[Delta, ...] = ()

    def __post_init__(self) -> None:
        removed = tuple(sorted(self.removed))
        named = [*removed, *(block for group in self.groups for block in group)]
        wrong = sorted({block for block in named if not 0 <= block < self.blocks})
        if wrong:
            raise UserError(
                f"The plan names block {wrong[0]}, but the model has blocks 0 to {self.blocks - 1}."
            )
        twice = sorted({block for block in named if named.count(block) > 1})
        if twice:
            raise UserError(
                f"The plan names block {twice[0]} more than once; "
                "a block is either removed or in exactly one group."
            )
        if len(removed) == self.blocks:
            raise UserError(
                f"The plan removes all {self.blocks} blocks; leave at least one of them."
            )
        if self.representative not in REPRESENTATIVES:
            raise UserError(
                f"The representative {self.representative!r} is not known; "
                f"use one of {', '.join(REPRESENTATIVES)}."
            )
        singles = set(range(self.blocks)) - set(named)
        groups = [tuple(sorted(group)) for group in self.groups if group]
        chosen = self.representatives
        if chosen is not None:
            if len(chosen) != len(groups) or any(
                block not in group for block, group in zip(chosen, groups, strict=True)
            ):
                raise UserError(
                    f"The representatives {list(chosen)} do not fit the groups "
                    f"{[list(group) for group in groups]}; give one block out of each group."
                )
            choice = dict(zip(groups, chosen, strict=True)) | {(b,): b for b in singles}
        groups = sorted([*groups, *((block,) for block in singles)])
        object.__setattr__(self, "removed", removed)
        object.__setattr__(self, "groups", tuple(groups))
        object.__setattr__(self, "private", tuple(self.private))
        object.__setattr__(self, "deltas", check_deltas(self.deltas, groups, self.private))
        if chosen is not None:
            object.__setattr__(self, "representatives", tuple(choice[group] for group in groups))

    @property
    def remaining(self) -> tuple[int, ...]:
        """The blocks that still run, in order."""
        return tuple(sorted(block for group in self.groups for block in group))

    @property
    def shared_groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups of two and more blocks."""
        return tuple(group for group in self.groups if len(group) > 1)

    @property
    def is_stock(self) -> bool:
        """Whether the result is an ordinary model: blocks removed at most, nothing shared."""
        return not self.shared_groups and not self.deltas

    @property
    def unique_blocks(self) -> int:
        """Sets of block weights that are stored."""
        return len(self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``from_dict`` reads it back to an equal plan."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "FoldPlan":
        """Read what ``to_dict`` wrote.

        Raises:
            UserError: a field is missing, unknown or of the wrong kind.
        """
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown or not isinstance(data.get("blocks"), int):
            fault = f"the unknown field {min(unknown)!r}" if unknown else "no number of blocks"
            raise UserError(
                f"The plan has {fault}; it may hold {', '.join(cls.__dataclass_fields__)}."
            )
        try:
            return cls(
                **{
                    **data,
                    "removed": tuple(int(block) for block in data.get("removed", ())),
                    "groups": tuple(
                        tuple(int(block) for block in group) for group in data.get("groups", ())
                    ),
                    "representatives": None
                    if data.get("representatives") is None
                    else tuple(int(block) for block in data["representatives"]),
                    "private": tuple(str(part) for part in data.get("private", ("norm",))),
                    "deltas": tuple(
                        Delta(**{**delta, "blocks": tuple(map(int, delta["blocks"]))})
                        for delta in data.get("deltas", ())
                    ),
                }
            )
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"The plan cannot be read ({error}); removed is a list of block numbers, "
                "groups a list of such lists, deltas a list of objects."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "FoldPlan":
        """Read a plan from a JSON file.

        Raises:
            UserError: no such file, no JSON, or no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The plan {path} cannot be read: {error}.") from error
        except json.JSONDecodeError as error:
            raise UserError(f"The plan {path} is not valid JSON: {error}.") from error
        if not isinstance(data, dict):
            raise UserError(f"The plan {path} holds a {type(data).__name__}; it must be an object.")
        return cls.from_dict(data)


@dataclass(frozen=True)
class BlockSizes:
    """Parameters of a model, for counting what a plan leaves without building it."""

    blocks: int
    shared: int
    """Parameters of one block that a group stores once."""
    private: int
    """Parameters of one block that every use keeps (norms)."""
    other: int
    """Embeddings, head and final norm."""
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Of the parameters of one block, and of the head: for deltas."""

    def total(self, plan: FoldPlan | None = None) -> int:
        """Unique parameters of the model, before or after ``plan``."""
        uses = self.blocks if plan is None else len(plan.remaining)
        unique = self.blocks if plan is None else plan.unique_blocks
        deltas = () if plan is None else plan.deltas
        added = sum(delta.size(self.shapes[delta.parameter]) for delta in deltas)
        return self.other + unique * self.shared + uses * self.private + added


def count_removed(fraction: float, blocks: int) -> int:
    """Blocks to remove for a fraction, rounded half up (Python's ``round`` goes half to even).

    Raises:
        UserError: the fraction is not in [0, 1), or nothing would be left.
    """
    if not 0 <= fraction < 1:
        raise UserError(
            f"The fraction of blocks to remove is {fraction:g}; give one from 0 up to, but not, 1."
        )
    count = int(fraction * blocks + 0.5)
    if count >= blocks:
        raise UserError(
            f"Removing {fraction:g} of {blocks} blocks leaves none; give at most "
            f"{(blocks - 1) / blocks:.3g}."
        )
    return count


def take(order: Iterable[int], count: int, protect: Sequence[int] = ()) -> list[int]:
    """The first ``count`` blocks of a removal order that are not protected.

    Raises:
        UserError: too few unprotected blocks are left to remove.
    """
    allowed = [block for block in order if block not in set(protect)]
    if len(allowed) < count:
        raise UserError(
            f"{count} blocks should go, but only {len(allowed)} may; remove or protect fewer."
        )
    return allowed[:count]


def adjacent_groups(remaining: Sequence[int], size: int) -> list[list[int]]:
    """Cut the remaining blocks, in order, into groups of ``size`` (the last may be short)."""
    return [list(remaining[start : start + size]) for start in range(0, len(remaining), size)]


def merge_adjacent(remaining: Sequence[int], merges: int, size: int, ends: int) -> list[list[int]]:
    """Groups of at most ``size`` in the middle that save exactly ``merges`` sets of weights.

    The first and last ``ends`` blocks stay alone: they are the hardest to replace.

    Raises:
        UserError: the middle is too short for that many merges.
    """
    middle = list(remaining[ends : len(remaining) - ends]) if ends else list(remaining)
    most = len(middle) - -(-len(middle) // size)
    if merges > most:
        raise UserError(
            f"Groups of {size} over the {len(middle)} unprotected blocks save {most} sets of "
            f"weights, but {merges} must be saved; share more blocks per group, remove more or "
            "protect fewer."
        )
    sizes = [size] * (merges // (size - 1))
    if merges % (size - 1):
        sizes.append(merges % (size - 1) + 1)
    start = (len(middle) - sum(sizes)) // 2
    groups = []
    for length in sizes:
        groups.append(middle[start : start + length])
        start += length
    return groups
