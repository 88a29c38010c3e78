"""CountSketch: a gradient of any size in a few thousand numbers, inner products kept."""

import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from weightshare.errors import UserError


@dataclass
class CountSketch:
    """``y_j = Σ_c s_c u_{c+j} x_{c m + j}``: entries that are equal modulo a prime m, with signs.

    The hash of a CountSketch (Charikar et al., 2002) is here the remainder by a random prime m
    just below ``size``, and its signs are products of two random sequences, one read by chunk and
    one along the diagonals. Both are views: a gradient is read once, and the hash of a weight with
    d entries takes ``m + 2 d/m`` numbers instead of 2 d. Rows of a matrix do not fall together,
    because m divides no multiple of their length that is shorter than m rows.

    ``⟨y_1, y_2⟩`` estimates ``⟨x_1, x_2⟩`` without bias; a cosine c has a standard error of about
    ``(1 - c²)/√m``. The map is linear and depends on ``seed``, the tensor's name and its number of
    entries only: it commutes with accumulation over batches, with the sum over uses and with
    all-reduce across ranks.

    Args:
        size: numbers kept per tensor, at most (at least 8). At 4,096 the error is .009, enough
            to group users. Tensors of at most that size are returned as they are, flattened.
        seed: of all hashes.
    """

    size: int = 4096
    seed: int = 0
    _hashes: dict[Any, tuple[int, Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.size < 8:
            raise UserError(f"the sketch has {self.size} numbers; give at least 8.")

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The sketch, ``(m,)`` float32 (float64 where the tensor is)."""
        flat = tensor.detach().reshape(-1)
        if flat.dtype != torch.float64:
            flat = flat.float()
        if len(flat) <= self.size:
            return flat
        m, signs, chunk_signs, last = self._hash(name, len(flat), flat.device, flat.dtype)
        whole = len(chunk_signs)
        chunks = flat[: whole * m].view(whole, m)
        step = max(1, 2**22 // m)  # a few million entries at a time bound the extra memory
        if whole <= step:
            sketch = torch.mv((chunks * signs).T, chunk_signs)
        else:
            sketch = torch.zeros(m, dtype=flat.dtype, device=flat.device)
            for rows in map(slice, range(0, whole, step), range(step, whole + step, step)):
                sketch.addmv_((chunks[rows] * signs[rows]).T, chunk_signs[rows])
        sketch[: len(last)].addcmul_(last, flat[whole * m :])
        return sketch

    def _hash(
        self, name: str, numel: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[int, Tensor, Tensor, Tensor]:
        """m, the signs of the whole chunks ``(c, m)`` and ``(c,)``, and of what is left."""
        key = (name, numel, device, dtype)
        if key not in self._hashes:
            # Drawn on the CPU, so that ranks on different devices hash alike.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            primes = _primes(self.size)
            m = primes[int(torch.randint(len(primes), (), generator=generator))]
            chunks = numel // m + 1
            drawn = torch.randint(2, (2 * chunks + m,), generator=generator, dtype=torch.int8)
            by_chunk, diagonal = (2 * drawn - 1).to(device, dtype).split([chunks, chunks + m])
            signs = diagonal.as_strided((chunks, m), (1, 1), diagonal.storage_offset())
            last = by_chunk[-1] * signs[-1, : numel - (chunks - 1) * m]
            self._hashes[key] = m, signs[:-1], by_chunk[:-1], last
        return self._hashes[key]


@cache
def _primes(size: int) -> list[int]:
    """The primes in the upper quarter below ``size``; below 16 in the upper half."""
    low = size * 3 // 4 if size >= 16 else size // 2
    return [n for n in range(low, size + 1) if all(n % d for d in range(2, int(n**0.5) + 1))]
