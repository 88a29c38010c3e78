"""Two ranks with half the batch each measure what one process measures on the whole."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from models import Looped, batch

from weightshare.errors import UserError
from weightshare.sharing import CountSketch, Gram, all_reduce, per_use


def measure(model, inner, x, keep=None):
    gram = Gram([])
    for part in x:
        with per_use(model, ["blocks.0.1.weight"], keep=keep) as uses:
            found = uses.gradients(model(part).square().mean())
        if dist.is_initialized():
            found = all_reduce(found)
        if not gram.labels:
            gram = Gram(found["blocks.0.1.weight"])
        gram.update(found)
    assert all(p.grad is None for p in inner.parameters())
    return gram


def worker(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        inner = Looped()
        model = DistributedDataParallel(inner)
        x = [batch(seed, rows=8, dtype=torch.float32).chunk(2)[rank] for seed in range(3)]
        result = {
            "exact": measure(model, inner, x).products(),
            "sketch": measure(model, inner, x, CountSketch(16)).products(),
        }
        model(x[0]).square().mean().backward()  # an ordinary step still works afterwards
        refused = False
        try:
            all_reduce({"w": {rank: torch.ones(2)}})
        except UserError:
            refused = True
        assert refused
        if rank == 0:
            torch.save(result, folder / "products.pt")
    finally:
        dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks_give_the_single_process_gram(tmp_path):
    mp.spawn(worker, (free_port(), tmp_path), nprocs=2)
    found = torch.load(tmp_path / "products.pt", weights_only=True)
    torch.manual_seed(0)
    model = Looped()
    x = [batch(seed, rows=8, dtype=torch.float32) for seed in range(3)]
    for name, keep in (("exact", None), ("sketch", CountSketch(16))):
        alone = measure(model, model, x, keep).products()
        assert torch.allclose(found[name], alone, rtol=1e-6, atol=1e-6 * float(alone.max()))
