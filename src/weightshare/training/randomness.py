"""Random streams that are a pure function of seed, step and rank, so that a resumed run draws what
the uninterrupted run would have drawn.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch


class Streams(NamedTuple):
    """Two generators on the CPU for one step."""

    shared: torch.Generator
    """The same draws on every rank: which path, which layer, which permutation."""
    local: torch.Generator
    """Other draws on every rank: data, noise, augmentation."""


def streams(seed: int, step: int, rank: int = 0) -> Streams:
    """The two random streams of ``step``; the same arguments always give the same draws."""
    return Streams(
        torch.Generator().manual_seed(mix(seed, step)),
        torch.Generator().manual_seed(mix(seed, step, rank)),
    )


def reseed(seed: int, step: int, rank: int = 0) -> None:
    """Start the global random states of Python, NumPy and torch (CPU and CUDA) anew for ``step``.

    Dropout and code that draws from the global states becomes a function of the step as well.
    """
    value = mix(seed, step, rank, 1)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the global state is what other people's code draws from
    # torch.manual_seed formats a stack trace for every absent backend: 140 us a step on the CPU.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


@contextmanager
def same_streams_after() -> Iterator[None]:
    """Leave the global random states (Python, NumPy, torch) as they were found."""
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def mix(*numbers: int) -> int:
    """A 32-bit seed from integers (torch's CPU generator and NumPy use no more bits)."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(blake2b(text, digest_size=4).digest(), "little")
