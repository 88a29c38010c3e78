"""Two ranks with half of every batch each come to the audit of one process."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "sharing"))
from models import Looped, batch

from weightshare.audit import audit


def loss(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def facts(model, batches):
    """What an audit says, in plain numbers."""
    found = audit(model, batches, loss, metric="adam", sketch=None, draws=50)
    return {
        "findings": [[f.layer.name, f.agreement, f.split.groups] for f in found.findings],
        "suggestions": [
            [s.unsharing.kind, s.unsharing.groups, s.slope, s.curvature, s.beyond_chance]
            for s in found.suggestions
        ],
    }


def model_and_batches():
    torch.manual_seed(0)
    return Looped().double(), [batch(seed, rows=8) for seed in range(6)]


def worker(rank, folder):
    inner, batches = model_and_batches()
    found = facts(DistributedDataParallel(inner), [x.chunk(2)[rank] for x in batches])
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_all_ranks_suggest_what_one_process_suggests(tmp_path):
    on_two_ranks(worker, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = json.loads(json.dumps(facts(*model_and_batches())))
    assert [s[:2] for s in first["suggestions"]] == [s[:2] for s in alone["suggestions"]]
    assert any(s[2] < 0 for s in alone["suggestions"])
    for ours, theirs in zip(first["suggestions"], alone["suggestions"], strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], rel=1e-6, nan_ok=True)
    for ours, theirs in zip(first["findings"], alone["findings"], strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-6) and ours[2] == theirs[2]
