"""Two processes of torch.distributed on this machine."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(worker: Callable[[int, Path], None], folder: Path) -> None:
    """Run ``worker(rank, folder)`` on two gloo ranks; what it raises is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run, (worker, port, folder), nprocs=2)


def _run(rank: int, worker: Callable[[int, Path], None], port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        worker(rank, folder)
    finally:
        dist.destroy_process_group()
