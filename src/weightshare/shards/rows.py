"""Batches whose rows have different adapters: every layer is told which row has which."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from weightshare.shards.layer import MosLayer


@contextmanager
def named_rows(model: nn.Module, names: list[str], copies: int) -> Iterator[None]:
    """Every adapted layer of ``model`` gets ``names``, one for each row of the batch.

    ``generate`` makes ``copies`` of each row.
    """
    handles = [
        module.register_forward_pre_hook(
            partial(_pass_names, names=names, copies=copies), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (MosLayer, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copies(model: nn.Module, options: dict[str, Any]) -> int:
    """How many rows ``generate`` makes of each row of the batch: beams, or returned sequences."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    found = (
        options.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    )
    return max(found)


def _pass_names(
    module: nn.Module, args: Any, kwargs: Any, names: list[str], copies: int
) -> tuple[Any, Any]:
    # The encoder of an encoder-decoder sees each row once, whatever the number of copies.
    if args and len(args[0]) == copies * len(names):
        names = [name for name in names for _ in range(copies)]
    return args, kwargs | {"adapter_names": names}
