"""One batch, many users: each row with its own low-rank update."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, float]
"""A (r, h), B transposed (r, o), scale."""


def add_updates(
    result: Tensor, x: Tensor, users: Sequence[int], factors: Sequence[Factors]
) -> Tensor:
    r""":math:`y_i + s_u B_u A_u x_i` for row i of user u; rows of user -1 stay bit for bit.

    ``result`` (batch, ..., o), ``x`` (batch, ..., h), ``users`` one number a row. Ranks may differ
    between users. Where many users have few rows each, or rows are long, their factors are padded
    to one rank and multiplied in one batched product, which copies the factors once a row;
    otherwise a loop over users reads each factor once.

    The updates are computed in the type of ``x`` with the accumulation of its matrix products.
    """
    adapted = [row for row, user in enumerate(users) if user >= 0]
    if not adapted:
        return result
    # Even a single user per row pays for the copies of a stack only where there are several. In a
    # row longer than the rank the copy of a factor is smaller than the row itself.
    long = x[0].numel() > max(a.numel() for a, _, _ in factors)
    if len(factors) > 2 and (long or len(adapted) <= 2 * len(factors)):
        return _batched(result, x, [users[row] for row in adapted], adapted, factors)
    return _looped(result, x, users, factors)


def _looped(result: Tensor, x: Tensor, users: Sequence[int], factors: Sequence[Factors]) -> Tensor:
    result = result.clone()
    for user, (a, b, scale) in enumerate(factors):
        rows = [row for row, of in enumerate(users) if of == user]
        if rows:
            where = _places(tuple(rows), x.device)
            update = x.index_select(0, where) @ a.t() @ b * scale
            result[where] = result[where] + update.to(result.dtype)
    return result


def _batched(
    result: Tensor,
    x: Tensor,
    users: Sequence[int],
    rows: Sequence[int],
    factors: Sequence[Factors],
) -> Tensor:
    rank = max(a.shape[0] for a, _, _ in factors)
    stack_a = torch.stack([_padded(a, rank) for a, _, _ in factors])
    # The scale goes into B: a product more per row would be a kernel more.
    stack_b = torch.stack([_padded(b * scale, rank) for _, b, scale in factors])
    of, where = _places(tuple(users), x.device), _places(tuple(rows), x.device)
    chosen = x.index_select(0, where)
    flat = chosen.reshape(len(rows), -1, x.shape[-1])
    hidden = torch.bmm(flat, stack_a.index_select(0, of).transpose(1, 2))
    update = torch.bmm(hidden, stack_b.index_select(0, of))
    update = update.view(*chosen.shape[:-1], -1)
    result = result.clone()
    result[where] = result[where] + update.to(result.dtype)
    return result


@lru_cache(maxsize=256)
def _places(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers on the device; kept, as every layer of every step asks for the same ones."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _padded(matrix: Tensor, rank: int) -> Tensor:
    missing = rank - matrix.shape[0]
    return torch.nn.functional.pad(matrix, (0, 0, 0, missing)) if missing else matrix
