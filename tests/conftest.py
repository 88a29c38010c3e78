"""One thread per test process: models here are tiny, and `make test` runs a process per core."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell's background jobs start with SIGINT ignored, and an ignored signal interrupts nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
