"""Where nothing is shared yet: parameters that are nearly the same."""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from weightshare.sharing import CountSketch


@dataclass(frozen=True)
class Similar:
    """Two parameters of one shape, the cosine of their values, and what tying them would save."""

    first: str
    second: str
    cosine: float
    saved: int


def similar(model: nn.Module, top: int = 10, sketch: int = 4096) -> list[Similar]:
    """Pairs of matrices of equal shape and dtype, the most similar first.

    Values are compared, not functions: two layers that compute the same with permuted units are
    not found, and vectors (norms, biases), which start alike, are left out.
    """
    keep = CountSketch(sketch)
    shapes: dict[tuple[torch.Size, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.device.type != "meta":
            # One hash for all: sketches of different hashes cannot be compared.
            values = keep("values", parameter).double()
            shapes.setdefault((parameter.shape, parameter.dtype), []).append((name, values))
    pairs = [
        Similar(first, second, float(torch.nn.functional.cosine_similarity(a, b, 0)), shape.numel())
        for (shape, _), found in shapes.items()
        for (first, a), (second, b) in combinations(found, 2)
    ]
    return sorted(pairs, key=lambda pair: -pair.cosine)[:top]
