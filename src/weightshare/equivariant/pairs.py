"""Which points speak to which: every pair of small graphs of one size, or a list of edges."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Sender minus receiver for every pair that exchanges a message, and how messages are summed.

    *Dense*: ``delta`` (B, m, m, d) with receivers on the first m; ``weight`` (B, m, m) is 0 where
    the two do not speak; ``mask`` (B, m) is False at padding. *Edges*: ``delta`` (E, d) with
    ``source`` and ``target`` (E,). Both give equal numbers. ``mutual``: with every pair the reverse
    one is there too.
    """

    delta: Tensor
    nodes: int = 0
    source: Tensor | None = None
    target: Tensor | None = None
    weight: Tensor | None = None
    mutual: bool = False
    mask: Tensor | None = None

    def senders(self, field: Tensor) -> Tensor:
        """The field at the sender of every pair: (..., pairs, N, C)."""
        return field.unsqueeze(-4) if self.source is None else field[self.source]

    def sum(self, messages: Tensor) -> Tensor:
        """Messages summed at their receiver."""
        if self.target is None:
            return messages.sum(-3)
        out = messages.new_zeros(self.nodes, *messages.shape[1:])
        return out.index_add(0, self.target, messages)

    def present(self, field: Tensor) -> Tensor:
        """The field without padding."""
        return field if self.mask is None else field[self.mask]

    def pieces(self, size: int, field: Tensor) -> Iterator[tuple["Pairs", Tensor]]:
        """About ``size`` pairs at a time, with the field they read. Dense pieces are different
        graphs, whose sums stand one after another; pieces of an edge list are to be added up."""
        if self.source is None or self.target is None:
            graphs = max(size // (self.delta.shape[-2] ** 2 or 1), 1)
            for low in range(0, max(len(self.delta), 1), graphs):
                rows = slice(low, low + graphs)
                weight = None if self.weight is None else self.weight[rows]
                yield replace(self, delta=self.delta[rows], weight=weight), field[rows]
            return
        for low in range(0, max(len(self.delta), 1), size):
            rows = slice(low, low + size)
            source, target = self.source[rows], self.target[rows]
            yield replace(self, delta=self.delta[rows], source=source, target=target), field

    def reversed(self) -> "Pairs":
        """The same pairs with senders and receivers exchanged; only for ``senders`` and ``sum``."""
        if self.source is None:
            return _Transposed(self.delta)
        return replace(self, source=self.target, target=self.source)

    def at(self, delta: Tensor) -> "Pairs":
        """The same pairs with other differences (for recomputation)."""
        return replace(self, delta=delta)


class _Transposed(Pairs):
    """Dense pairs with receivers on the second axis."""

    def senders(self, field: Tensor) -> Tensor:
        return field.unsqueeze(-3)

    def sum(self, messages: Tensor) -> Tensor:
        return messages.sum(-4)


def dense_pairs(positions: Tensor, mask: Tensor | None = None, self_loops: bool = True) -> Pairs:
    """All pairs within each of B graphs of m points, (B, m, d)."""
    delta = positions.unsqueeze(-3) - positions.unsqueeze(-2)
    speak = None if mask is None else mask.unsqueeze(-2) & mask.unsqueeze(-1)
    if not self_loops:
        others = ~torch.eye(positions.shape[-2], dtype=torch.bool, device=positions.device)
        speak = others.expand(delta.shape[:-1]) if speak is None else speak & others
    weight = None if speak is None else speak.to(positions.dtype)
    return Pairs(delta, weight=weight, mutual=True, mask=mask)


def edge_pairs(
    positions: Tensor,
    edges: Tensor,
    offsets: Tensor | None = None,
    self_loops: bool = True,
    mutual: bool = False,
) -> Pairs:
    """Pairs of an edge list (2, E), row 0 the sender and row 1 the receiver.

    ``offsets`` (E, d) is added to the sender's position (periodic images). With ``self_loops``
    every point also hears itself, once, whether or not the list holds that edge.
    ``mutual`` promises that with every edge the list holds its reverse.
    """
    if self_loops:
        keep = edges[0] != edges[1]
        if offsets is not None:
            keep = keep | (offsets != 0).any(-1)
            offsets = torch.cat(
                [offsets[keep], offsets.new_zeros(len(positions), offsets.shape[1])]
            )
        loops = torch.arange(len(positions), device=edges.device).expand(2, -1)
        edges = torch.cat([edges[:, keep], loops], 1)
    source, target = edges
    delta = positions[source] - positions[target]
    if offsets is not None:
        delta = delta + offsets
    return Pairs(delta, len(positions), source, target, mutual=mutual)


def full_edges(batch: Tensor) -> Tensor:
    """Every ordered pair of different points of the same graph, (2, E)."""
    same = batch[:, None] == batch[None, :]
    same.fill_diagonal_(False)
    return same.nonzero().T


def equal_sizes(batch: Tensor, graphs: int) -> int | None:
    """Points per graph where all have as many and stand one after another, else None."""
    if graphs == 0 or len(batch) % graphs or len(batch) == 0:
        return None
    size = len(batch) // graphs
    expected = torch.arange(graphs, device=batch.device).repeat_interleave(size)
    return size if torch.equal(batch, expected) else None
