"""Two processes with half of every batch each are one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_ranks import train

from weightshare.errors import UserError
from weightshare.training import Place

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_two_ranks_with_unequal_counts_train_like_one(tmp_path, parts):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["--nproc-per-node=2", str(HERE / "two_ranks.py"), str(tmp_path), str(parts)]
    subprocess.run(torchrun + script, env=environment, check=True, timeout=120)
    alone = train(1, None)
    one, two = load_file(tmp_path / "rank0"), load_file(tmp_path / "rank1")
    assert set(one) == set(two) == set(alone)
    for name, expected in alone.items():
        assert torch.equal(one[name], two[name]), name
        assert (one[name] - expected).abs().max() < 1e-12, name


def test_half_precision_accelerators_are_refused():
    class Half:
        mixed_precision = "fp16"

    with pytest.raises(UserError, match="fp16"):
        Place.of(Half(), "fp32")
