"""The pools of a model and what is gathered from them: what the tuner and its layers share."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weightshare.shards.gather import Table, gather_all, gather_one

Made = TypeVar("Made")
Versions = tuple[int, ...]
Rows = dict[tuple[str, str], tuple[tuple[Tensor, ...], Versions]]
"""By adapter and pool: shards of every module, and the pools' versions they were gathered from."""


class PoolStore:
    """Pools by adapter and key, with their tables of uses.

    ``pools`` is the one registered home of the parameters (on the tuner): a layer that registered
    them too would be saved, counted and cast once more. Layers hold this object instead, which is
    no module. Inside ``gathered`` the shards of all modules are at hand; outside, a module gathers
    its own.

    What was gathered for training is kept until the next time, for activation checkpointing: it
    recomputes the modules when the forward pass is long over. Not for its reentrant kind, which
    runs a backward pass of its own for each part and would walk through the common gather each
    time.

    Without gradients, what modules make of gathered shards is kept as long as these are.
    """

    def __init__(self, pools: nn.ModuleDict) -> None:
        self.pools = pools
        self.tables: dict[str, dict[str, Table]] = {}
        self.lenders: dict[str, str] = {}
        self._rows: Rows | None = None
        self._kept: Rows = {}
        self._made: dict[Hashable, tuple[int, Any]] = {}
        self._gathered: frozenset[str] = frozenset()
        self._watched: list[Tensor] = []
        self._reentrant = False

    def __getstate__(self) -> dict[str, Any]:
        # Intermediate results can be neither copied nor pickled.
        return self.__dict__ | {"_rows": None, "_kept": {}, "_made": {}, "_watched": []}

    def pool(self, adapter: str, key: str) -> Tensor:
        """What an adapter has of its own in a pool, (rows, width)."""
        return self.pools[adapter][key]  # type: ignore[index,return-value]

    def parts(self, adapter: str, key: str) -> tuple[Tensor, ...]:
        """The pool an adapter's indices point into: its own, or borrowed rows and its own."""
        own, table = self.pool(adapter, key), self.tables[adapter][key]
        if not table.borrowed:
            return (own,)
        return self.pool(self.lenders[adapter], key).narrow(0, 0, table.borrowed), own

    def forget(self, adapter: str | None = None) -> None:
        """Build the tables again at their next use."""
        self._kept, self._made = {}, {}
        for name, tables in self.tables.items():
            if adapter in (None, name):
                for table in tables.values():
                    table.forget()

    def remove(self, adapter: str) -> None:
        """Drop an adapter's pools and tables."""
        self.tables.pop(adapter, None)
        self.lenders.pop(adapter, None)
        self._kept, self._made = {}, {}
        if adapter in self.pools:
            del self.pools[adapter]

    @contextmanager
    def gathered(self, adapters: Iterable[str], dtype: torch.dtype) -> Iterator[None]:
        """Inside, one gather per pool serves every module. Nested, the outer one serves."""
        if self._rows is not None:
            yield
            return
        self._kept, self._reentrant = {}, False
        adapters = [adapter for adapter in adapters if adapter in self.pools]
        rows: Rows = {}
        for adapter in adapters:
            for key, table in self.tables.get(adapter, {}).items():
                pools = self.parts(adapter, key)
                pool = _whole(pools)
                parts = gather_all(pool, table.prepare(pool.device), dtype)
                rows[adapter, key] = parts, _versions(pools)
        self._rows = rows
        self._gathered = frozenset(adapters)
        sources = self._gathered | {self.lenders[a] for a in adapters if a in self.lenders}
        self._watched = [pool for name in sources for pool in self.pools[name].parameters()]
        try:
            yield
        finally:
            self._rows, self._made = None, {}
            if torch.is_grad_enabled() and not self._reentrant:
                self._kept = rows

    def rows(
        self, adapter: str, key: str, member: int, index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The shards of one module, (r * l, width) in ``dtype``."""
        pools = self.parts(adapter, key)
        rows = self._kept if self._rows is None else self._rows
        if (adapter, key) in rows:
            parts, version = rows[adapter, key]
            part, differentiable = parts[member], torch.is_grad_enabled()
            self._reentrant |= part.requires_grad and not differentiable
            # Gathered before the pool changed, in another type, or without a gradient: no use.
            trained = any(pool.requires_grad for pool in pools)
            usable = part.requires_grad or not (trained and differentiable)
            if version == _versions(pools) and part.dtype == dtype and usable:
                return part
        pool = _whole(pools)
        table = self.tables[adapter][key]
        scale = None
        if table.scale_by_use:
            table.prepare(pool.device)
            assert table.scale is not None
            scale = table.scale[table.span(member)]
        return gather_one(pool, index.to(pool.device), dtype, scale)

    def kept(self, key: Hashable, adapters: Iterable[str], make: Callable[[], Made]) -> Made:
        """``make()``, once for all forward passes without gradients that one gather serves, until a
        pool of the adapters' changes."""
        if self._rows is None or torch.is_grad_enabled() or not self._gathered.issuperset(adapters):
            return make()
        version = sum(pool._version for pool in self._watched)
        found = self._made.get(key)
        if found is None or found[0] != version:
            found = self._made[key] = version, make()
        made: Made = found[1]
        return made


def _whole(pools: tuple[Tensor, ...]) -> Tensor:
    return pools[0] if len(pools) == 1 else torch.cat([pool.to(pools[-1]) for pool in pools])


def _versions(pools: tuple[Tensor, ...]) -> Versions:
    return tuple(pool._version for pool in pools)
