"""Two ranks with half the batch each measure what one process measures on the whole."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
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


def worker(rank, folder):
    torch.manual_seed(0)
    inner = Looped()
    model = DistributedDataParallel(inner)
    x = [batch(seed, rows=8, dtype=torch.float32).chunk(2)[rank] for seed in range(3)]
    result = {
        "exact": measure(model, inner, x).products(),
        "sketch": measure(model, inner, x, CountSketch(16)).products(),
    }
    model(x[0]).square().mean().backward()  # an ordinary step still works afterwards
    with pytest.raises(UserError, match="different users"):
        all_reduce({"w": {rank: torch.ones(2)}})
    torch.save(result, folder / f"products-{rank}.pt")


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks_give_the_single_process_gram(tmp_path):
    on_two_ranks(worker, tmp_path)
    found, other = (
        torch.load(tmp_path / f"products-{rank}.pt", weights_only=True) for rank in range(2)
    )
    torch.manual_seed(0)
    model = Looped()
    x = [batch(seed, rows=8, dtype=torch.float32) for seed in range(3)]
    for name, keep in (("exact", None), ("sketch", CountSketch(16))):
        alone = measure(model, model, x, keep).products()
        assert torch.allclose(found[name], alone, rtol=1e-6, atol=1e-6 * float(alone.max()))
        assert torch.equal(found[name], other[name])
