"""One batch, many users: each row with its own low-rank update."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, float]
"""A (r, h), B transposed (r, o), scale."""


class UserFactors:
    """The factors of every user at one module. Ranks may differ."""

    def __init__(self, users: Sequence[Factors]) -> None:
        self.users = users

    @cached_property
    def stacked(self) -> tuple[Tensor, Tensor]:
        """A (users, r, h) and B times its scale (users, r, o), padded to the largest rank."""
        rank = max(a.shape[0] for a, _, _ in self.users)
        # The scale goes into B: a product more per row would be a kernel more.
        return (
            torch.stack([_padded(a, rank) for a, _, _ in self.users]),
            torch.stack([_padded(b * scale, rank) for _, b, scale in self.users]),
        )


def add_updates(result: Tensor, x: Tensor, users: Sequence[int], factors: UserFactors) -> Tensor:
    r""":math:`y_i + s_u B_u A_u x_i` for row i of user u; rows of user -1 stay bit for bit.

    ``result`` (batch, ..., o), ``x`` (batch, ..., h), ``users`` one number a row. Where many users
    have few rows each, or rows are long, their factors are padded to one rank and multiplied in one
    batched product, which copies the factors once a row; otherwise a loop over users reads each
    factor once.

    The updates are computed in the type of ``x`` with the accumulation of its matrix products.
    """
    adapted = [row for row, user in enumerate(users) if user >= 0]
    if not adapted:
        return result
    # Even a single user per row pays for the copies of a stack only where there are several. In a
    # row longer than the rank the copy of a factor is smaller than the row itself.
    count = len(factors.users)
    long = x[0].numel() > max(a.numel() for a, _, _ in factors.users)
    if count > 2 and (long or len(adapted) <= 2 * count):
        return _batched(result, x, [users[row] for row in adapted], adapted, factors)
    return _looped(result, x, users, factors)


def _looped(result: Tensor, x: Tensor, users: Sequence[int], factors: UserFactors) -> Tensor:
    result = result.clone()
    for user, (a, b, scale) in enumerate(factors.users):
        rows = [row for row, of in enumerate(users) if of == user]
        if rows:
            where = _places(tuple(rows), x.device)
            update = x.index_select(0, where) @ a.t() @ b * scale
            result[where] = result[where] + update.to(result.dtype)
    return result


def _batched(
    result: Tensor, x: Tensor, users: Sequence[int], rows: Sequence[int], factors: UserFactors
) -> Tensor:
    every = len(rows) == len(x)
    where = None if every else _places(tuple(rows), x.device)
    chosen = x if where is None else x.index_select(0, where)
    stack_a, stack_b = factors.stacked
    if list(users) != list(range(len(factors.users))):
        of = _places(tuple(users), x.device)
        stack_a, stack_b = stack_a.index_select(0, of), stack_b.index_select(0, of)
    flat = chosen.reshape(len(rows), -1, x.shape[-1])
    update = torch.bmm(torch.bmm(flat, stack_a.transpose(1, 2)), stack_b)
    update = update.view(*chosen.shape[:-1], -1).to(result.dtype)
    if where is None:
        return result + update
    result = result.clone()
    result[where] = result[where] + update
    return result


@lru_cache(maxsize=256)
def _places(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers on the device; kept, as every layer of every step asks for the same ones."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _padded(matrix: Tensor, rank: int) -> Tensor:
    missing = rank - matrix.shape[0]
    return torch.nn.functional.pad(matrix, (0, 0, 0, missing)) if missing else matrix
