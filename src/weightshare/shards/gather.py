"""Rows of a pool by index, and the way back: a deterministic sum over each shard's uses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Table:
    """The indices of all modules of one pool, one after another, and the uses of each shard.

    ``sources`` are the layers' containers of indices by adapter: they are saved and loaded, this
    is made from them. ``order`` lists the entries of ``index`` shard by shard; those of shard s
    begin at ``starts[s]``. ``borrowed`` rows in front are another adapter's, and the ``public``
    ones after them may be lent in turn.
    """

    adapter: str
    rows: int
    sources: Sequence[Any]
    scale_by_use: bool = False
    borrowed: int = 0
    public: int = 0
    index: Tensor | None = None
    order: Tensor = field(default_factory=lambda: torch.empty(0))
    starts: Tensor = field(default_factory=lambda: torch.empty(0))
    scale: Tensor | None = None
    sizes: list[int] = field(default_factory=list)

    def forget(self) -> None:
        """Build again at the next use: an index or the device has changed."""
        self.index = None

    def prepare(self, device: torch.device) -> "Table":
        """Build what is missing, on ``device``."""
        if self.index is None or self.index.device != device:
            parts = [source[self.adapter] for source in self.sources]
            self.sizes = [len(part) for part in parts]
            self.index = torch.cat([part.to(device) for part in parts]).long()
            self.order = torch.argsort(self.index, stable=True)
            counts = torch.bincount(self.index, minlength=self.rows)
            self.starts = counts.cumsum(0) - counts
            scale = counts.clamp(min=1).float().rsqrt().index_select(0, self.index)
            self.scale = scale.unsqueeze(1) if self.scale_by_use else None
        return self

    def span(self, member: int) -> slice:
        """Where the entries of one module lie."""
        start = sum(self.sizes[:member])
        return slice(start, start + self.sizes[member])


def gather_all(pool: Tensor, table: Table, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The shards of every module of a pool, each (r * l, width), gathered in one go.

    Splitting, and not slicing, matters: the gradient of n slices is n arrays of full size.
    """
    rows = _GatherAll.apply(pool, table, dtype)
    return tuple(rows.split(table.sizes))


def gather_one(pool: Tensor, index: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """The shards of one module, (r * l, width). No shard may stand twice in ``index``."""
    if torch.compiler.is_compiling():
        rows = pool.to(dtype).index_select(0, index.long())
        return rows if scale is None else rows * scale.to(dtype)
    return _GatherOne.apply(pool, index.long(), dtype, scale)


# Neither function saves a tensor for backward through autograd: what they need are constants. So
# activation checkpointing finds the same number of saved tensors whether a module takes its rows
# from the common gather, as in the first pass, or gathers for itself, as when it is recomputed.


class _GatherAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pool: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
        assert table.index is not None
        ctx.constants = table.order, table.starts, table.scale, pool.dtype
        rows = pool.to(dtype).index_select(0, table.index)
        return rows if table.scale is None else rows * table.scale.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, starts, scale, dtype = ctx.constants
        if scale is not None:
            gradient = gradient * scale.to(gradient.dtype)
        # A bag is a shard, its items are the shard's uses: each sum runs in one fixed order.
        summed = F.embedding_bag(order, gradient.contiguous(), starts, mode="sum")
        return summed.to(dtype), None, None


class _GatherOne(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pool: Tensor, index: Tensor, dtype: torch.dtype, scale: Tensor | None
    ) -> Tensor:
        ctx.constants = index, scale, pool.shape, pool.dtype
        rows = pool.to(dtype).index_select(0, index)
        return rows if scale is None else rows * scale.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        index, scale, shape, dtype = ctx.constants
        if scale is not None:
            gradient = gradient * scale.to(gradient.dtype)
        whole = gradient.new_zeros(shape).index_copy_(0, index, gradient)
        return whole.to(dtype), None, None, None
