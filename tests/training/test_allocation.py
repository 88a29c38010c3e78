"""Memory that a step frees is there for the next one."""

import ctypes
import subprocess
import sys

import pytest

READ = """
import ctypes, torch
from weightshare.training import keep_freed_memory

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Counts

def step():
    start = mallinfo2()
    held = [torch.ones(4_000_000) for _ in range(10)]
    mapped = mallinfo2().hblkhd - start.hblkhd
    del held
    return mapped, mallinfo2().fordblks

print(*step())
assert keep_freed_memory()
print(*step())
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="only glibc from 2.33 on can be asked for its counts",
)
def test_freed_blocks_stay_with_the_process():
    """The C library's own counts: unlike page faults, every kernel and sandbox gives them."""
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True)
    (mapped, free), (mapped_after, free_after) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    size = 10 * 4 * 4_000_000
    assert mapped >= size and free < size
    assert mapped_after == 0 and free_after >= size
