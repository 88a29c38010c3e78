"""What sharing saves: parameters and bytes counted once, against counted at every use."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightshare.sharing.preserve import preserved
from weightshare.sharing.uses import count_calls, find_uses, run, used_elements


@dataclass(frozen=True)
class Size:
    """``unique`` parameters are stored, ``total`` take effect; ``bytes`` hold the unique ones.

    ``flops`` of one call (a multiply-add is two), or None when no example was given.
    """

    unique: int
    total: int
    bytes: int
    flops: int | None = None

    @property
    def saved(self) -> int:
        """Parameters that sharing saves."""
        return self.total - self.unique


def size(model: nn.Module, example: Any = None) -> Size:
    """Count ``model``, on any device, the meta device included.

    A parameter counts once towards ``unique`` and once per use towards ``total`` (see
    :func:`~weightshare.sharing.find_shared`, also for ``example``). Parameters that are views of
    one storage count by the elements they cover together: where two overlap, the overlap is one.
    Buffers are not parameters and do not count.
    """
    parameters = list(model.parameters())
    unique, stored = covered(parameters)
    calls = count_calls(model, example) if example is not None else None
    total = sum(
        used_elements(p, use) for p, uses in find_uses(model, calls).items() for use in uses
    )
    return Size(unique, total, stored, None if example is None else count_flops(model, example))


def covered(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Elements and bytes that ``tensors`` cover together, each stored element counted once."""
    by_storage: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_storage[tensor.untyped_storage()._cdata].append(tensor)
    elements = stored = 0
    for sharers in by_storage.values():
        first = sharers[0]
        if len(sharers) == 1 and first.is_contiguous():
            elements += first.numel()
            stored += first.numel() * first.element_size()
        else:
            bytes_covered = _bytes_covered(sharers)
            elements += bytes_covered // min(tensor.element_size() for tensor in sharers)
            stored += bytes_covered
    return elements, stored


def _bytes_covered(sharers: Sequence[Tensor]) -> int:
    """Mark every byte the tensors touch in their common storage: exact for any strides."""
    spans = [
        tensor.element_size()
        * (
            tensor.storage_offset()
            + 1
            + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        )
        for tensor in sharers
        if tensor.numel()
    ]
    touched = torch.zeros(max(spans, default=0), dtype=torch.bool)
    for tensor in sharers:
        width = tensor.element_size()
        touched.as_strided(
            (*tensor.shape, width),
            (*(s * width for s in tensor.stride()), 1),
            tensor.storage_offset() * width,
        ).fill_(True)
    return int(touched.sum())


def count_flops(model: nn.Module, example: Any) -> int:
    """FLOPs of one forward call; leaves the model as it was."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with preserved(model), torch.no_grad(), counter:
        run(model, example)
    return math.floor(counter.get_total_flops())
