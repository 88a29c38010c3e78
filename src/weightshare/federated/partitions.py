"""How samples are dealt to participants: the splits of RFFL's evaluation, and Dirichlet's."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from weightshare.errors import UserError
from weightshare.federated.config import SHORT, PartitionName

Rows = NDArray[np.int64]
POWER = 1.65911332899
"""Exponent of the power law whose quantiles are the sizes (the reference's code)."""


@dataclass(frozen=True)
class Shards:
    """Rows of the data set by participant; ``honest`` and ``adversaries`` share none."""

    honest: tuple[Rows, ...]
    adversaries: tuple[Rows, ...]


def deal(
    labels: Sequence[int] | NDArray[np.int64],
    partition: PartitionName,
    participants: int,
    adversaries: int = 0,
    *,
    samples: int = 0,
    concentration: float = 0.5,
    seed: int = 0,
) -> Shards:
    """Deal the rows of a data set.

    ``uniform``: equal parts of a seeded shuffle. ``power``: sizes on a straight line, the largest
    16 times the smallest. ``classes``: participant j holds the classes below ``int(linspace(1, C,
    N))_j``, equal totals, drawn with replacement within each class. ``dirichlet``: each class is
    spread by shares drawn from a Dirichlet law of the given concentration. Adversaries always get
    uniform parts of half an honest participant's mean size, from rows that no honest one holds.

    Args:
        labels: class of each row, ``(n,)``.
        partition: one of these names, or the paper's ``uni``, ``pow`` or ``cla``.
        participants: honest ones, at least 1.
        adversaries: others.
        samples: rows dealt in all; 0 for all there are.
        concentration: of the Dirichlet law, above 0; the smaller, the more uneven.
        seed: of the deal.

    Raises:
        UserError: no such partition, a number out of range, or too few rows for so many.
    """
    labels = np.asarray(labels)
    if partition not in get_args(PartitionName):
        raise UserError(
            f"{partition!r} is no partition; give one of {', '.join(get_args(PartitionName))}."
        )
    if participants < 1 or adversaries < 0 or not concentration > 0:
        raise UserError(
            f"A deal to {participants} participants and {adversaries} adversaries of concentration "
            f"{concentration}; give at least 1, at least 0 and a number above 0."
        )
    if not 0 <= samples <= len(labels):
        raise UserError(
            f"{samples} samples of {len(labels)} cannot be dealt; give fewer, or 0 for all."
        )
    partition = SHORT.get(partition, partition)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(labels))[: samples or len(labels)]
    each = int(len(order) / (participants + adversaries / 2))
    if each < 2:
        raise UserError(
            f"{len(order)} samples are too few for {participants} participants and {adversaries} "
            "adversaries; give at least 2 to each."
        )
    half = max(each // 2, 1)
    evil = order[len(order) - half * adversaries :] if adversaries else order[:0]
    rows = order[: len(order) - len(evil)]
    if partition == "uniform":
        honest = np.array_split(rows, participants)
    elif partition == "power":
        edges = np.cumsum(power_sizes(participants, len(rows)))[:-1]
        honest = np.split(rows, np.minimum(edges, len(rows)))
    elif partition == "classes":
        honest = _by_classes(labels, rows, participants, draw)
    else:
        honest = _dirichlet(labels, rows, participants, concentration, draw)
    if not all(map(len, honest)):
        # Each size but the last is rounded up, which can leave the last with nothing.
        raise UserError(
            f"{len(rows)} samples are too few for {participants} participants of unequal size; "
            "give more, or fewer participants."
        )
    return Shards(tuple(honest), tuple(np.array_split(evil, adversaries)) if adversaries else ())


def power_sizes(participants: int, total: int) -> list[int]:
    """Sizes in proportion to ``linspace(F⁻¹(.01), F⁻¹(.99), N)``, each rounded up but the last."""
    if participants == 1:
        return [total]
    line = np.linspace(0.01 ** (1 / POWER), 0.99 ** (1 / POWER), participants)
    sizes = [ceil(total * part) for part in line / line.sum()]
    return [*sizes[:-1], total - sum(sizes[:-1])]


def class_counts(participants: int, classes: int) -> list[int]:
    """How many classes each participant holds."""
    return [int(count) for count in np.linspace(1, classes, participants)]


def _by_classes(
    labels: NDArray[np.int64], rows: Rows, participants: int, draw: np.random.Generator
) -> list[Rows]:
    found = np.unique(labels[rows])
    total = len(rows) // participants
    shards = []
    for count in class_counts(participants, len(found)):
        sizes = [len(part) for part in np.array_split(np.arange(total), count)]
        shards.append(
            np.concatenate(
                [
                    draw.choice(rows[labels[rows] == label], size)
                    for label, size in zip(found, sizes, strict=False)
                ]
            )
        )
    return shards


def _dirichlet(
    labels: NDArray[np.int64],
    rows: Rows,
    participants: int,
    concentration: float,
    draw: np.random.Generator,
) -> list[Rows]:
    parts: list[list[Rows]] = [[] for _ in range(participants)]
    for label in np.unique(labels):
        mine = rows[labels[rows] == label]
        shares = draw.dirichlet([concentration] * participants)
        edges = np.round(np.cumsum(shares) * len(mine)).astype(int)[:-1]
        for part, piece in zip(parts, np.split(mine, edges), strict=True):
            part.append(piece)
    shards = [np.concatenate(part) for part in parts]
    for number, shard in enumerate(shards):
        # A law this uneven can leave someone with nothing; two samples come from the richest.
        if len(shard) < 2:
            rich = max(range(participants), key=lambda j: len(shards[j]))
            shards[number] = np.concatenate([shard, shards[rich][:2]])
            shards[rich] = shards[rich][2:]
    return shards
