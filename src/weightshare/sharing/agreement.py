"""Do the users of a weight agree? The Gram matrix of their gradients, and what follows from it.

For users i, j of a tensor and batches b, b' of one context c,

    M[b i, b' j] = ⟨g_i^b, g_j^b'⟩

Everything else is read off M. With *contexts* (what the rest of a model does: the other choices of
a path; for a fixed model there is one) of n batches each:

    paper       mean over (c, b) of  M[b i, b j] / √(M[b i, b i] M[b j, b j])       mean of cosines
    debiased    Î_ij = Σ_c Σ_{b≠b'∈c} M[b i, b' j] / (n (n-1)),   cos = Î_ij / √(Î_ii Î_jj)

Users that share a batch share its noise, which lifts the paper's mean; users with batches of their
own lower it. Distinct batches share nothing, so the debiased estimate has neither fault. It is
debiased inside a context and summed over contexts: across contexts it would cancel real conflict.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightshare.errors import UserError
from weightshare.sharing.gradients import Kept
from weightshare.sharing.products import inner_products, to_cpu

Estimate = Literal["debiased", "paper"]


@dataclass
class Context:
    """One context of one tensor: M ``(n, K, n, K)`` float64 and who used it in which batch."""

    products: Tensor
    used: Tensor  # (n, K) bool

    def __len__(self) -> int:
        return len(self.used)

    def within(self) -> Tensor:
        """``(n, K, K)``: products of users on the same batch."""
        n = len(self)
        return self.products[torch.arange(n), :, torch.arange(n)]

    def across(self) -> tuple[Tensor, Tensor]:
        """Sum of products over pairs of distinct batches, and the number of pairs: ``(K, K)``."""
        used = self.used.double()
        counts = used.sum(0)
        pairs = counts[:, None] * counts - used.T @ used
        return self.products.sum((0, 2)) - self.within().sum(0), pairs

    def take(self, batches: Tensor) -> "Context":
        return Context(self.products[batches][:, :, batches], self.used[batches])


class Gram:
    """Inner products of the users' gradients: one block per tensor, with a mask of who used it.

    ``update`` takes the gradients of one batch, ``close`` ends a context. Products are accumulated
    in float64, so that gradients of any scale give the same cosines. A user without a gradient, or
    whose gradient is zero, is masked: its cosines are NaN, never a number.

    Rows are kept until the context closes: n·K gradients (or sketches) of each tensor.

    Args:
        labels: the K users, in the order of the matrices' rows. ``update`` finds a user's gradient
            under its label.
    """

    def __init__(self, labels: Iterable[Hashable]) -> None:
        self.labels = tuple(labels)
        if len(set(self.labels)) != len(self.labels):
            raise UserError("two users have the same label; give each its own.")
        self.blocks: dict[str, list[Context]] = {}
        self._lengths: list[int] = []  # batches of the closed contexts
        self._rows: dict[str, list[list[Kept | None]]] = {}  # of the open context
        self._chunks: list[int] = []  # batches of it whose products were taken together
        self._columns: dict[str, list[Tensor | None]] = {}  # these products
        self._open: dict[str, Context] = {}  # the same as matrices

    def update(self, gradients: Mapping[str, Mapping[Hashable, Kept]]) -> "Gram":
        """Add one batch, ``gradients[tensor][user]``; returns itself.

        Products are taken when they are asked for, of all batches since then together.
        """
        done = max(map(len, self._rows.values()), default=0)
        for name in dict.fromkeys([*self.blocks, *self._rows, *gradients]):
            # A tensor first met now was not used before.
            if name not in self.blocks:
                self.blocks[name] = [_unused(n, len(self.labels)) for n in self._lengths]
            if name not in self._rows:
                self._rows[name] = [[None] * len(self.labels) for _ in range(done)]
            found = gradients.get(name, {})
            self._rows[name].append([found.get(label) for label in self.labels])
        self._open = {}
        return self

    def close(self) -> "Gram":
        """End the context: its rows are dropped, the next ``update`` begins another."""
        for name, context in self._opened().items():
            self.blocks[name].append(context)
        if self._rows:
            self._lengths.append(len(next(iter(self._rows.values()))))
        self._rows, self._chunks, self._columns, self._open = {}, [], {}, {}
        return self

    def _opened(self) -> dict[str, Context]:
        """The open context of each tensor."""
        if self._rows and not self._open:
            self._multiply()
            made = [c for columns in self._columns.values() for c in columns if c is not None]
            moved = iter(to_cpu(made))
            for name, columns in self._columns.items():
                here = [None if c is None else next(moved) for c in columns]
                self._open[name] = _assembled(here, self._chunks, len(self.labels))
        return self._open

    def _multiply(self) -> None:
        """The products of the batches that came since the last time with all of the context."""
        new = len(next(iter(self._rows.values()))) - sum(self._chunks)
        flat = {name: [row for b in rows for row in b] for name, rows in self._rows.items()}
        for name, column in inner_products(flat, new * len(self.labels)).items():
            self._columns.setdefault(name, [None] * len(self._chunks)).append(column)
        self._chunks.append(new)

    # Reading ------------------------------------------------------------------------------------

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(self.blocks)

    def select(self, tensors: Collection[str]) -> "Gram":
        """The same measurement on some of the tensors: one layer, one matrix."""
        part = Gram(self.labels)
        for name in self.tensors:
            if name in tensors:
                part.blocks[name] = self._contexts(name)
        return part

    def restrict(self, users: Sequence[int], factors: Tensor | None = None) -> "Gram":
        """The same measurement of some users, each gradient times its user's factor."""
        at = torch.tensor(list(users), dtype=torch.long)
        by = torch.ones(len(self.labels)).double() if factors is None else factors.double()
        part = Gram(self.labels[u] for u in users)
        for name in self.tensors:
            part.blocks[name] = [
                Context(
                    c.products[:, at][..., at] * by[at, None, None] * by[at],
                    c.used[:, at],
                )
                for c in self._contexts(name)
            ]
        return part

    def contexts(self) -> list[Context]:
        """The total over tensors, per context: over those that all unmasked users used.

        A sum over each pair's own tensors would not be a Gram matrix (it can be indefinite).
        """
        return [_total(blocks) for blocks in zip(*map(self._contexts, self.tensors), strict=True)]

    def _contexts(self, name: str) -> list[Context]:
        opened = self._opened()
        return [*self.blocks.get(name, []), *([opened[name]] if name in opened else [])]

    def products(self, estimate: Estimate = "debiased") -> Tensor:
        """Estimated inner products of the users' mean gradients, ``(K, K)``: a mean over contexts.

        "paper" takes them on common batches: positive semidefinite, noise included.
        """
        total = torch.zeros(len(self.labels), len(self.labels), dtype=torch.float64)
        seen = torch.zeros_like(total)
        for context in self.contexts():
            if estimate == "paper":
                used = context.used.double()
                value, pairs = context.within().sum(0), used.T @ used
            else:
                value, pairs = context.across()
            total += torch.where(pairs > 0, value / pairs.clamp(min=1), 0.0)
            seen += pairs > 0
        if estimate == "debiased" and max(map(len, self.contexts()), default=0) < 2:
            raise UserError(
                "the debiased estimate compares distinct batches, but every context has one; "
                "update() with at least two batches before close()."
            )
        return torch.where(seen > 0, total / seen.clamp(min=1), torch.nan)

    def cosine(self, pairwise: bool = False) -> Tensor:
        """The paper's mean of cosines, ``(K, K)`` in [-1, 1]; NaN where a pair never met.

        ``pairwise`` compares each pair on the tensors that this pair used, as the paper does; it is
        for the paper's objective only.
        """
        if pairwise:
            return self._mean([c for b in self._batchwise() for c in b])
        return self._mean([c for context in self.contexts() for c in _cosines(context)])

    def debiased(self) -> Tensor:
        """The debiased cosine, ``(K, K)``; NaN where a squared norm is not above zero.

        Not bounded by ±1 and not positive semidefinite: the price of no bias.
        """
        return normalised(self.products("debiased"))

    def similarity(self, estimate: Estimate = "debiased") -> Tensor:
        return self.debiased() if estimate == "debiased" else self.cosine()

    def distance(self, estimate: Estimate = "debiased", unit: bool = True) -> Tensor:
        """``D_ij = ½‖g_i - g_j‖²`` for :func:`~weightshare.sharing.partition`, ``(K, K)``.

        Of unit gradients (``1 - cosine``: how much users disagree) or, with ``unit=False``, of the
        gradients themselves (what separate weights would gain at first order).
        """
        if unit:
            return 1 - self.similarity(estimate)
        products = self.products(estimate)
        square = products.diagonal()
        return (square[:, None] + square) / 2 - products

    def norms(self, estimate: Estimate = "debiased") -> Tensor:
        """Norm of each user's mean gradient, ``(K,)``; NaN where its square is not above zero."""
        square = self.products(estimate).diagonal()
        return torch.where(square > 0, square.clamp(min=0).sqrt(), torch.nan)

    def conflict_rate(self) -> Tensor:
        """Share of batches on which two users pull apart (cosine < 0), ``(K, K)``."""
        cosines = [c for context in self.contexts() for c in _cosines(context)]
        return self._mean([torch.where(c.isnan(), c, (c < 0).double()) for c in cosines])

    def _mean(self, matrices: Sequence[Tensor]) -> Tensor:
        """Mean of what is defined: NaN where no batch, or no batch at all, defines it."""
        undefined = torch.full([len(self.labels)] * 2, torch.nan, dtype=torch.float64)
        mean = torch.stack(list(matrices) or [undefined]).nanmean(0)
        return (mean + mean.T) / 2  # symmetric to the last bit, whatever order entries are added in

    def _batchwise(self) -> Iterable[list[Tensor]]:
        """Cosines per batch, each pair on the tensors that both of its users used."""
        for blocks in zip(*map(self._contexts, self.tensors), strict=True):
            n, k = blocks[0].used.shape
            top, left = torch.zeros(2, n, k, k, dtype=torch.float64)
            for block in blocks:
                both = (block.used[:, :, None] & block.used[:, None]).double()
                within = block.within()
                top += both * within
                left += both * within.diagonal(dim1=1, dim2=2)[:, :, None]
            scale = (left * left.mT).sqrt()
            yield [torch.where(s > 0, t / s, torch.nan) for t, s in zip(top, scale, strict=True)]

    # Resampling ---------------------------------------------------------------------------------

    @property
    def units(self) -> int:
        """What the jackknife leaves out: contexts where there are several, else batches."""
        contexts = self.contexts()
        return len(contexts) if len(contexts) > 1 else len(contexts[0])

    def without(self, unit: int) -> "Gram":
        """The measurement without one context, or without one batch of the only context."""
        several = len(self._contexts(self.tensors[0])) > 1
        part = Gram(self.labels)
        for name in self.tensors:
            contexts = self._contexts(name)
            if several:
                part.blocks[name] = contexts[:unit] + contexts[unit + 1 :]
            else:
                n = len(contexts[0])
                rest = torch.tensor([b for b in range(n) if b != unit], dtype=torch.long)
                part.blocks[name] = [contexts[0].take(rest)]
        return part

    def permuted(self, generator: torch.Generator) -> "Gram":
        """Labels permuted independently in each (context, batch): what agreement chance gives."""
        part = Gram(self.labels)
        orders = [
            torch.stack([torch.randperm(len(self.labels), generator=generator) for _ in c.used])
            for c in self._contexts(self.tensors[0])
        ]
        for name in self.tensors:
            part.blocks[name] = [
                Context(_relabelled(c.products, order), c.used.gather(1, order))
                for c, order in zip(self._contexts(name), orders, strict=True)
            ]
        return part

    def jackknife(self, statistic: Callable[["Gram"], Tensor]) -> Tensor:
        """Standard error of any statistic of the measurement, elementwise."""
        n = self.units
        if n < 2:
            raise UserError("an interval needs at least two contexts, or one of two batches.")
        left_out = torch.stack([torch.as_tensor(statistic(self.without(u))) for u in range(n)])
        return (left_out - left_out.mean(0)).square().sum(0).mul((n - 1) / n).sqrt()

    def interval(
        self, level: float = 0.95, estimate: Estimate = "debiased"
    ) -> tuple[Tensor, Tensor]:
        """Jackknife interval of the cosines: two ``(K, K)`` matrices, lower and upper.

        A Student-t interval around the estimate; NaN where a leave-one-out cosine is undefined.
        """
        from scipy.stats import t

        centre = self.similarity(estimate)
        reach = float(t.ppf(0.5 + level / 2, self.units - 1))
        error = self.jackknife(lambda gram: gram.similarity(estimate))
        return centre - reach * error, centre + reach * error


def _unused(batches: int, users: int) -> Context:
    return Context(
        torch.zeros(batches, users, batches, users, dtype=torch.float64),
        torch.zeros(batches, users, dtype=torch.bool),
    )


def _assembled(columns: Sequence[Tensor | None], chunks: Sequence[int], users: int) -> Context:
    """M from its columns: those of a chunk of batches hold the products with all up to them."""
    context, end = _unused(sum(chunks), users), 0
    for column, new in zip(columns, chunks, strict=True):
        start, end = end, end + new
        if column is not None:
            column = column.view(end, users, new, users)
            own = column[start:]
            own[:] = (own + own.permute(2, 3, 0, 1)) / 2  # symmetric to the last bit
            context.products[:end, :, start:end] = column
            context.products[start:end, :, :end] = column.permute(2, 3, 0, 1)
            squares = own.reshape(new * users, new * users).diagonal()
            context.used[start:end] = squares.view(new, users) > 0
    return context


def normalised(products: Tensor) -> Tensor:
    """Cosines of a Gram matrix; NaN where a squared norm is not above zero."""
    square = products.diagonal()
    scale = torch.where(square > 0, square.clamp(min=0).sqrt(), torch.nan)
    return products / scale[:, None] / scale


def _total(blocks: Sequence[Context]) -> Context:
    users = torch.stack([block.used.any(0) for block in blocks])  # (tensors, K)
    alive = users.any(0)
    common = [b for b, who in zip(blocks, users, strict=True) if bool(who[alive].all())]
    if not common or not bool(alive.any()):
        empty = torch.zeros_like(blocks[0].products)
        return Context(empty, torch.zeros_like(blocks[0].used))
    products = torch.stack([block.products for block in common]).sum(0)
    return Context(products, torch.stack([block.used for block in common]).any(0))


def _cosines(context: Context) -> Tensor:
    """``(n, K, K)`` cosines on common batches."""
    within = context.within()
    norms = within.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms[:, :, None] * norms[:, None]
    return torch.where(scale > 0, (within / scale).clamp(-1, 1), torch.nan)


def _relabelled(products: Tensor, order: Tensor) -> Tensor:
    n, k = order.shape
    flat = (torch.arange(n)[:, None] * k + order).reshape(-1)
    return products.reshape(n * k, n * k)[flat][:, flat].view(n, k, n, k)


def opposed(similarity: Tensor) -> tuple[int, int] | None:
    """The pair of users with the lowest cosine; None where no pair is defined."""
    k = len(similarity)
    upper = torch.triu(torch.ones(k, k, dtype=torch.bool), 1) & ~similarity.isnan()
    if not upper.any():
        return None
    at = int(torch.where(upper, similarity, math.inf).argmin())
    return at // k, at % k


def mean_agreement(similarity: Tensor) -> float:
    """Mean cosine over pairs of distinct users, undefined pairs left out."""
    off = similarity[~torch.eye(len(similarity), dtype=torch.bool)]
    return float(off.nanmean())
