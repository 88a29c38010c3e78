"""One way to give some users of a layer something of their own."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from weightshare.audit.layers import Layer

Kind = Literal["nothing", "scale", "low_rank", "unshare"]
KINDS: tuple[Kind, ...] = ("scale", "low_rank", "unshare")
SAYS = {
    "nothing": "leave it shared",
    "scale": "private scales",
    "low_rank": "low-rank deltas",
    "unshare": "weights of their own",
}


@dataclass(frozen=True)
class Unsharing:
    """One way to give groups of a layer's users something of their own.

    The first group keeps the shared weight; every other group gets, for each tensor,

    * ``scale``: a factor per row, the first dimension: an output of a linear layer, an input of a
      transposed one such as GPT-2's (a vector, such as a norm, is copied),
    * ``low_rank``: a delta of that ``rank`` (vectors stay shared),
    * ``unshare``: a copy.
    """

    kind: Kind
    layer: Layer
    groups: tuple[tuple[str, ...], ...]
    rank: int = 0

    def added(self, model: nn.Module) -> int:
        """Parameters it adds."""
        each = sum(self._added(model.get_parameter(name)) for name in self.layer.tensors)
        return each * (len(self.groups) - 1)

    def _added(self, weight: Tensor) -> int:
        if self.kind == "nothing":
            return 0
        if self.kind == "unshare" or (self.kind == "scale" and weight.ndim < 2):
            return weight.numel()
        if self.kind == "scale":
            return len(weight)
        return self.rank_of(weight) * (len(weight) + weight[0].numel()) if weight.ndim > 1 else 0

    def rank_of(self, weight: Tensor) -> int:
        """The rank a delta of ``weight`` has: never so much that a copy would be smaller."""
        rows, columns = len(weight), weight[0].numel()
        return max(1, min(self.rank, rows * columns // (rows + columns)))

    def group_of(self, user: str) -> int | None:
        """The group a user belongs to; None for one that never received a gradient."""
        for number, group in enumerate(self.groups):
            if user in group:
                return number
        return None
