"""Where an update runs: device, precision, and its rank among the processes that train together."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from weightshare.errors import UserError

LARGE = 1 << 20
"""Elements from which a gradient is reduced in place; smaller ones travel together."""


def device_of(name: str) -> torch.device:
    """The device of this name; ``auto`` is CUDA where there is one.

    Raises:
        UserError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"The device is {name!r}; use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device is {name!r}, but torch sees no CUDA device; use cpu.")
    return device


@dataclass(frozen=True)
class Place:
    """Device, autocast precision and rank. The default is one process on the CPU in fp32.

    Every rank holds a full replica of the task; gradients are summed over ranks after the backward
    pass. Sharded weights (FSDP) are not supported.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, accelerator: Any, precision: str) -> "Place":
        """The place that an ``accelerate.Accelerator`` describes; its bf16 counts as ours."""
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise UserError(
                f"The accelerator's mixed precision is {accelerator.mixed_precision}; "
                "start it with no or bf16."
            )
        return cls(
            device=accelerator.device,
            precision="bf16" if accelerator.mixed_precision == "bf16" else precision,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.world == 1:
            return
        small: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() >= LARGE and tensor.is_contiguous():
                dist.all_reduce(tensor)
            else:
                small.setdefault(tensor.dtype, []).append(tensor)
        for group in small.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            pieces = flat.split([tensor.numel() for tensor in group])
            for tensor, piece in zip(group, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor by that of rank 0."""
        if self.world > 1:
            for tensor in tensors:
                copy = tensor.detach().contiguous()
                dist.broadcast(copy, src=0)
                tensor.detach().copy_(copy)

    def agreed(self, value: Any) -> Any:
        """Rank 0's ``value``, so that all ranks take the same decision."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.world > 1:
            dist.barrier()
