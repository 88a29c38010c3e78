"""Sources of batches: ``batches[step]`` depends on seed, step and rank alone."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from weightshare.errors import UserError
from weightshare.training.randomness import mix
from weightshare.training.trees import map_tensors


class Batches(Protocol):
    """Anything that gives the batch of a step; asked twice, it gives the same batch."""

    def __getitem__(self, step: int, /) -> Any: ...


@runtime_checkable
class StatefulBatches(Protocol):
    """Batches that change at named steps (adaptive sampling): their state is checkpointed."""

    def state(self) -> Any: ...
    def load(self, state: Any, /) -> None: ...


class EpochBatches:
    """Every example once per epoch, each epoch in a fresh order, every batch of the same size.

    Batch ``step`` holds places ``step * batch_size ... (step + 1) * batch_size - 1`` of the endless
    row permutation 0, permutation 1, ...; a batch may thus reach into the next epoch, nothing is
    dropped, and a batch larger than the data set holds some examples more than once.

    Args:
        data: a tensor, an array, or a mapping/tuple of them with one first axis (rows are
            gathered in one go); or a map-style ``Dataset`` (examples are collated by torch).
        batch_size: examples per update, over all ranks together, so that a run is the same run
            however many processes share it.
        seed: start of the permutations.
        rank, world: this process takes its near-equal share of every batch.

    Raises:
        UserError: the data set is empty, or a rank would get no example.
    """

    def __init__(
        self, data: Any, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.columns = _columns(data)
        self.data = data if self.columns is None else None
        self.size = len(data) if self.columns is None else _rows(self.columns)
        if self.size == 0:
            raise UserError("The data set is empty; give at least one example to train on.")
        if batch_size < world:
            raise UserError(
                f"batch_size is {batch_size} for {world} processes; give each at least one example."
            )
        self.batch_size, self.seed = batch_size, seed
        self._share = batch_size * rank // world, batch_size * (rank + 1) // world
        self._orders: dict[int, Tensor] = {}

    def __getitem__(self, step: int) -> Any:
        rows = self.indices(step)
        if self.columns is None:
            return default_collate([self.data[row] for row in rows.tolist()])  # type: ignore[index]
        return map_tensors(lambda column: column[rows], self.columns)

    def indices(self, step: int) -> Tensor:
        """Rows of the data set in this rank's share of batch ``step``."""
        low, high = (step * self.batch_size + edge for edge in self._share)
        rows = []
        while low < high:
            epoch, place = divmod(low, self.size)
            taken = min(high - low, self.size - place)
            rows.append(self._order(epoch)[place : place + taken])
            low += taken
        return torch.cat(rows)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            generator = torch.Generator().manual_seed(mix(self.seed, epoch, 2))
            self._orders[epoch] = torch.randperm(self.size, generator=generator)
        return self._orders[epoch]


class Zipped:
    """The batches of several sources side by side, for ``Sequence``: a tuple per step."""

    def __init__(self, *sources: Batches) -> None:
        self.sources = sources

    def __getitem__(self, step: int) -> tuple[Any, ...]:
        return tuple(source[step] for source in self.sources)


def _columns(data: Any) -> Any:
    """``data`` as (a tree of) tensors, or None where it must be read example by example."""
    if isinstance(data, Tensor | np.ndarray):
        return torch.as_tensor(data)
    if isinstance(data, Mapping) and data:
        columns: Any = {key: _columns(value) for key, value in data.items()}
        return None if any(value is None for value in columns.values()) else columns
    if isinstance(data, tuple) and data:
        columns = tuple(_columns(value) for value in data)
        return None if any(value is None for value in columns) else columns
    return None


def _rows(columns: Any) -> int:
    sizes: set[int] = set()
    map_tensors(lambda column: sizes.add(column.shape[0]), columns)
    if len(sizes) != 1:
        raise UserError(f"The tensors have {sorted(sizes)} rows; give tensors of one length.")
    return sizes.pop()
