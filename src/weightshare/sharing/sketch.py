"""CountSketch: a gradient of any size in a few thousand numbers, inner products kept."""

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class CountSketch:
    """``y = Σ_c s_c · roll(t ∘ x_c, r_c)``: chunks of ``size`` entries, random signs and shifts.

    ``x_c`` is the c-th chunk of the flattened tensor, ``s_c`` and the vector ``t`` are random
    signs, ``r_c`` a random shift. Entries of one chunk never collide and those of two chunks do
    with probability 1/size, so this is a CountSketch (Charikar et al., 2002) whose hash takes
    ``size + 2·chunks`` numbers instead of two per entry.

    ``⟨y_1, y_2⟩`` estimates ``⟨x_1, x_2⟩`` without bias; a cosine c has a standard error of about
    ``(1 - c²)/√size`` (0.012 at c = 0.3 and the default size, measured). The map is linear and
    depends on ``seed``, the tensor's name and its size only: it commutes with accumulation over
    batches, with the sum over uses and with all-reduce across ranks.

    Args:
        size: numbers kept per tensor; 4,096 is enough to cluster (brief experiments: .012).
            Tensors of at most that size are returned as they are, flattened.
        seed: of all hashes.
    """

    size: int = 4096
    seed: int = 0
    _hashes: dict[tuple[str, int, torch.device], tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The sketch, ``(min(size, numel),)`` float32 (float64 where the tensor is)."""
        flat = tensor.detach().reshape(-1)
        if flat.dtype != torch.float64:
            flat = flat.float()
        if len(flat) <= self.size:
            return flat
        index, chunk_signs, signs = self._hash(name, len(flat), flat.device)
        whole = len(flat) // self.size
        sketch = torch.zeros(self.size, dtype=flat.dtype, device=flat.device)
        step = max(1, 2**22 // self.size)  # a few million entries at a time bound the extra memory
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            chunks = flat[start * self.size : stop * self.size].view(-1, self.size)
            sketch += torch.einsum(
                "c,ck->k",
                chunk_signs[start:stop].to(flat.dtype),
                (chunks * signs).gather(1, self._rolled(index[start:stop])),
            )
        rest = flat[whole * self.size :]
        if len(rest):
            last = torch.zeros_like(sketch)
            last[: len(rest)] = rest
            sketch += chunk_signs[whole] * (last * signs)[self._rolled(index[whole:])[0]]
        return sketch

    def _rolled(self, shifts: Tensor) -> Tensor:
        return (torch.arange(self.size, device=shifts.device) + shifts[:, None]) % self.size

    def _hash(self, name: str, numel: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        key = (name, numel, device)
        if key not in self._hashes:
            chunks = -(-numel // self.size)
            # Drawn on the CPU, so that ranks on different devices hash alike.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            shifts = torch.randint(self.size, (chunks,), generator=generator)
            chunk_signs = torch.randint(2, (chunks,), generator=generator) * 2 - 1
            signs = torch.randint(2, (self.size,), generator=generator) * 2 - 1
            self._hashes[key] = (shifts.to(device), chunk_signs.to(device), signs.to(device))
        return self._hashes[key]
