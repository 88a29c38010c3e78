"""Training on a CPU: keep the memory of one step for the next."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""
KEPT = 1 << 30
"""Bytes up to which blocks are kept."""


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks up to a gigabyte instead of giving them back to the
    kernel: every step allocates the same tensors, and mapping their pages again took a fifth of
    the processor time of a small network. For the whole process, until it ends.

    Returns whether that could be set: only with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(TRIM_THRESHOLD, KEPT)) and bool(mallopt(MMAP_THRESHOLD, KEPT))
