"""Inner products of gradients, for all tensors of a batch in a few large operations."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightshare.sharing.ghost import Factors
from weightshare.sharing.gradients import Kept

Rows = Sequence[Kept | None]

ENTRIES = 2**23
"""Entries that exist in double precision at a time: 64 MB."""
SEGMENT = 2**13


def inner_products(rows: Mapping[str, Rows], new: int) -> dict[str, Tensor]:
    """``⟨row_i, row_j⟩`` of each tensor's rows i with its last ``new`` rows j.

    ``(rows, new)`` float64 on the rows' device, zero where a row is None. In double precision, so
    that gradients of any scale keep their cosine. Tensors of one shape are multiplied together: on
    a GPU the launch of a kernel per pair would cost more than the products.
    """
    result: dict[str, Tensor] = {}
    alike: dict[tuple, list[str]] = {}
    for name, each in rows.items():
        if all(isinstance(row, Tensor) for row in each):
            first = each[0]
            alike.setdefault((len(each), first.numel(), first.dtype, first.device), []).append(name)  # type: ignore[union-attr]
        else:
            result[name] = _some(each, new)
    for names in alike.values():
        values = _batched([rows[name] for name in names], new)  # type: ignore[misc]
        result |= zip(names, values, strict=True)
    return result


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All in one transfer: a wait for the GPU each would cost more than the products do."""
    if len({tensor.device for tensor in tensors}) != 1:
        return [tensor.cpu() for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _batched(rows: Sequence[Sequence[Tensor]], new: int) -> Tensor:
    """``(tensors, rows, new)``, without a double copy of whole gradients."""
    tensors, count, size = len(rows), len(rows[0]), rows[0][0].numel()
    if size > 2 * SEGMENT:
        return torch.stack([_long([row.reshape(-1) for row in each], new) for each in rows])
    flat = torch.stack([row.reshape(-1) for each in rows for row in each])
    wide = flat.double().view(tensors, count, size)
    return wide @ wide[:, count - new :].mT


def _long(rows: Sequence[Tensor], new: int) -> Tensor:
    """``(rows, new)`` of one large tensor: a sum over segments, which run side by side.

    A product of a few rows of many million entries would run on one processor of a GPU.
    """
    values = torch.zeros(len(rows), new, dtype=torch.float64, device=rows[0].device)
    step = max(1, ENTRIES // len(rows) // SEGMENT) * SEGMENT
    for start in range(0, len(rows[0]), step):
        wide = torch.stack([row[start : start + step] for row in rows]).double()
        whole = wide.shape[1] // SEGMENT * SEGMENT
        parts = wide[:, :whole].view(len(rows), -1, SEGMENT).transpose(0, 1)
        values += (parts @ parts[:, len(rows) - new :].mT).sum(0)
        if whole < wide.shape[1]:
            values += wide[:, whole:] @ wide[len(rows) - new :, whole:].T
    return values


def _some(rows: Rows, new: int) -> Tensor:
    """One tensor some of whose users have no gradient, or have it as factors."""
    there = [i for i, row in enumerate(rows) if row is not None]
    late = [i for i in there if i >= len(rows) - new]
    if not late:
        return torch.zeros(len(rows), new, dtype=torch.float64)
    if any(isinstance(rows[i], Factors) for i in there):
        values = _ghost([rows[i] for i in there], len(late))  # type: ignore[misc]
    else:
        values = _batched([[rows[i] for i in there]], len(late))[0]  # type: ignore[misc]
    if len(there) == len(rows):
        return values
    result = values.new_zeros(len(rows), new)
    at = torch.tensor(late) - (len(rows) - new)
    result[torch.tensor(there)[:, None], at] = values
    return result


def _ghost(rows: Sequence[Factors], new: int) -> Tensor:
    """``Σ (A_i A_jᵀ) ∘ (B_i B_jᵀ)`` of all pairs, as many at a time as ``ENTRIES`` holds."""
    inputs, outputs, lengths = _joined(rows[len(rows) - new :])
    values: list[Tensor] = []
    some: list[Factors] = []
    for number, row in enumerate(rows, start=1):
        some.append(row)
        following = len(rows[number].inputs) if number < len(rows) else ENTRIES
        if (sum(len(f.inputs) for f in some) + following) * len(inputs) > ENTRIES:
            a, b, mine = _joined(some)
            products = (a @ inputs.T) * (b @ outputs.T)
            values.append(_sums(_sums(products, lengths).T, mine).T)
            some = []
    return torch.cat(values)


def _joined(rows: Sequence[Factors]) -> tuple[Tensor, Tensor, list[int]]:
    inputs = torch.cat([factors.inputs for factors in rows]).double()
    outputs = torch.cat([factors.outputs for factors in rows]).double()
    return inputs, outputs, [len(factors.inputs) for factors in rows]


def _sums(matrix: Tensor, lengths: list[int]) -> Tensor:
    """Sums of neighbouring columns, ``(n, len(lengths))``."""
    if len(set(lengths)) == 1:
        return matrix.unflatten(1, (len(lengths), -1)).sum(2)
    return torch.stack([part.sum(1) for part in matrix.split(lengths, 1)], 1)
