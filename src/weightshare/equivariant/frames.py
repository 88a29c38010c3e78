"""Sets of structures as training data: splits, batches, errors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from weightshare.equivariant.ponita import DENSE_POINTS
from weightshare.equivariant.structures import (
    Structure,
    collate,
    pad_molecules,
    stack_molecules,
)
from weightshare.errors import UserError
from weightshare.training import EpochBatches, held_out


def split_frames(
    frames: Sequence[Structure],
    tests: Sequence[Structure] | None = None,
    train: int = 0,
    valid: int = 0,
    test: int = 0,
) -> dict[str, list[Structure]]:
    """Structures to train on, to watch, to test on: first, then, last in the file, because
    neighbours in a time series are nearly the same.

    Args:
        tests: structures of another file to test on.
        train, valid, test: how many; 0 for all that are left, a twentieth, a tenth.

    Raises:
        UserError: there are too few, a frame lacks energy or forces, or a test structure holds a
            species that is not trained on.
    """
    for number, frame in enumerate([*frames, *(tests or ())]):
        labels = (frame.energy, frame.forces)
        if any(label is None or not np.isfinite(label).all() for label in labels):
            raise UserError(
                f"Frame {number} has no finite energy or forces; leave it out, or give both."
            )
    known = {z for f in frames for z in f.numbers.tolist()}
    if strangers := {z for f in tests or () for z in f.numbers.tolist()} - known:
        raise UserError(
            f"The test file holds the species {sorted(strangers)}, which are not trained on; test "
            "on species that are."
        )
    n = len(frames)
    if n < 3:
        raise UserError(f"There are {n} structures; give at least 3, to train, watch and test on.")
    held = 0 if tests is not None else test or max(n // 10, 1)
    valid = valid or max(n // 20, 1)
    train = train or n - held - valid
    if train < 1 or train + valid + held > n:
        raise UserError(
            f"There are {n} structures, too few for {train} to train, {valid} to watch and {held} "
            "to test on; ask for fewer."
        )
    return {
        "train": list(frames[:train]),
        "valid": list(frames[train : train + valid]),
        "test": list(frames[n - held :] if tests is None else tests[: test or None]),
    }


class Frames:
    """Structures as batches of tensors: molecules without a cutoff stand side by side, padded to
    the largest where sizes differ; periodic, very large or cut-off ones one after another.

    Args:
        cutoff: of the neighbour list, or None.
        atoms: places for each molecule, at least as many as the largest has.
    """

    def __init__(
        self, frames: list[Structure], cutoff: float | None, atoms: int | None = None
    ) -> None:
        self.frames, self.cutoff = frames, cutoff
        sizes = {len(frame) for frame in frames} | ({atoms} if atoms else set())
        periodic = any(frame.cell is not None for frame in frames)
        self.dense = (
            cutoff is None and not periodic and (len(sizes) == 1 or max(sizes) <= DENSE_POINTS)
        )
        stack = stack_molecules if len(sizes) == 1 else pad_molecules
        options = {} if len(sizes) == 1 else {"atoms": max(sizes)}
        self.stacked = stack(frames, **options) if self.dense else {}

    def __len__(self) -> int:
        return len(self.frames)

    def batch(self, rows: Any, device: Any = "cpu") -> dict[str, Any]:
        """Some structures as tensors."""
        chosen = list(rows)
        if self.dense:
            found = {name: tensor[chosen] for name, tensor in self.stacked.items()}
        else:
            found = collate([self.frames[row] for row in chosen], self.cutoff)
        return {name: tensor.to(device) for name, tensor in found.items()}


class FrameBatches:
    """Batches of structures, drawn as ``EpochBatches`` draws rows."""

    def __init__(self, frames: Frames, rows: EpochBatches) -> None:
        self.frames, self.rows = frames, rows

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self.frames.batch(self.rows.indices(step).tolist())


def scores(task: nn.Module, frames: Frames, size: int = 50) -> dict[str, float]:
    """Mean absolute errors over all frames, meV, meV/Å (and eV/Å³ in thousandths for stress)."""
    parts = (range(low, min(low + size, len(frames))) for low in range(0, len(frames), size))
    found = held_out(task, (frames.batch(part) for part in parts))
    return {name: value for name, value in found.items() if "mae" in name}
