"""A fold on two processes is the fold of one."""

import json
import os
import subprocess
import sys

import pytest

from weightshare.cli.ranks import ranks
from weightshare.errors import UserError

OPTIONS = [
    *("fold", "tiny", "--remove", "0.17", "--share", "2", "--ranking", "one_shot"),
    *("--calibration-sequences", "2", "--sequence-length", "48", "--dtype", "fp32"),
    *("--cure.steps", "4", "--cure.batch-size", "3", "--cure.evaluate-every", "2"),
    *("--device", "cpu"),
]


def fold(launcher: list[str], out) -> str:
    command = [sys.executable, *launcher, "-m", "weightshare", *OPTIONS, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_write_one_run_and_cure_like_one(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    fold([], tmp_path / "one")
    shown = fold(launcher, tmp_path / "two")
    assert shown.count("plan: remove") == 1
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    assert two["finished"]
    assert two["removed"] == one["removed"]
    for name, loss in one["loss"].items():
        assert two["loss"][name] == pytest.approx(loss, abs=1e-4), name


def test_one_named_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="cuda:0"):
        ranks("cuda:0")
