"""Norms, products and sums of long float32 vectors: one pass each, block by block.

Blocks keep an operand in the cache and the sums in double precision; nothing is copied.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import saxpy

Vector = NDArray[np.float32]

BLOCK = 1 << 15
SAFE = (1e-20, 1e30)
"""Sums of float32 products that neither lost small terms nor overflowed."""


def squared_norm(vector: Vector) -> float:
    """``Σ x²`` in double precision; NaN or infinite exactly where the vector is."""
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(vector), BLOCK):
            part = vector[start : start + BLOCK]
            total += float(np.dot(part, part))
    if SAFE[0] < total < SAFE[1]:
        return total
    # Entries beyond 1e15 overflow a float32 product, those below 1e-19 vanish in it.
    with np.errstate(invalid="ignore"):
        wide = [vector[s : s + BLOCK].astype(np.float64) for s in range(0, len(vector), BLOCK)]
        return sum(float(np.dot(part, part)) for part in wide)


def products(rows: Sequence[Vector], vector: Vector) -> NDArray[np.float64]:
    """``⟨row_i, vector⟩`` for every row."""
    result = np.zeros(len(rows))
    for start in range(0, len(vector), BLOCK):
        part = vector[start : start + BLOCK]
        for i, row in enumerate(rows):
            result[i] += float(np.dot(row[start : start + BLOCK], part))
    return result


def weighted_sum(rows: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """``Σ_i weights_i · rows_i``, added in the order of the rows."""
    total = np.zeros(len(rows[0]), np.float32)
    for start in range(0, len(total), BLOCK):
        parts = [row[start : start + BLOCK] for row in rows]
        _add(total[start : start + BLOCK], parts, weights)
    return total


def combined(
    rows: Sequence[Vector], weights: Sequence[float]
) -> tuple[Vector, NDArray[np.float64]]:
    """``a = Σ_i weights_i · rows_i`` and ``⟨row_i, a⟩``, in one pass: a block of a is whole before
    the rows' next block is touched, so that its products find the rows in the cache."""
    total, inner = np.zeros(len(rows[0]), np.float32), np.zeros(len(rows))
    for start in range(0, len(total), BLOCK):
        into = total[start : start + BLOCK]
        parts = [row[start : start + BLOCK] for row in rows]
        _add(into, parts, weights)
        inner += [float(np.dot(part, into)) for part in parts]
    return total, inner


def _add(into: Vector, parts: Sequence[Vector], weights: Sequence[float]) -> None:
    result = into
    for part, weight in zip(parts, weights, strict=True):
        if weight:
            result = saxpy(part, result, a=weight)
    # saxpy adds in place where it can; this is a copy onto itself then.
    into[:] = result
