"""Batches are tensors in nested mappings, tuples and lists; three things are done to them."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` with ``function`` applied to each tensor; everything else is passed through."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def to_device(tree: Any, device: torch.device) -> Any:
    """Move what knows ``.to(device)``: tensors, also nested, graph batches, tokenized batches."""
    if hasattr(tree, "to"):
        return tree.to(device, non_blocking=True)
    if isinstance(tree, Mapping):
        return {key: to_device(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(to_device(value, device) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(to_device(value, device) for value in tree)
    return tree


def split(tree: Any, parts: int) -> list[Any]:
    """Cut every tensor of ``tree`` along its first axis into at most ``parts`` near-equal parts.

    All tensors share the size of that axis (0-dim tensors and other values go to every part);
    a batch of fewer examples than parts gives one part per example.
    """
    size = 0

    def see(tensor: Tensor) -> None:
        nonlocal size
        size = max(size, tensor.shape[0] if tensor.ndim else 0)

    map_tensors(see, tree)
    parts = max(min(parts, size), 1)
    edges = [size * part // parts for part in range(parts + 1)]

    def cut(low: int, high: int) -> Any:
        return map_tensors(lambda tensor: tensor[low:high] if tensor.ndim else tensor, tree)

    return [cut(low, high) for low, high in pairwise(edges)]
