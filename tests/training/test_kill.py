"""A process that is killed at any moment and started again ends where it would have ended."""

import random
import signal
import sys
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import pytest
from killed_process import EVERY, STEPS, main
from tiny_task import FakeRun


def start(folder: Path) -> Process:
    """From a server that has imported torch once and has never touched CUDA."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "weightshare.training.loop", "safetensors.torch"]
    )
    process = context.Process(target=main, args=(folder,))
    process.start()
    return process


def steps(folder: Path) -> list[int]:
    file = folder / "steps"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_the_final_weights_are_the_same_bytes(tmp_path, seed):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main(whole)
    draw = random.Random(seed)
    kills = 0
    while True:
        process = start(broken)
        # Wait for a number of steps, then for a moment inside a step, a checkpoint or a log line.
        goal = len(steps(broken)) + draw.randrange(1, 2 * EVERY + 2)
        while process.is_alive() and len(steps(broken)) < goal:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills > 0
    assert (broken / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
    assert FakeRun(broken).rows() == FakeRun(whole).rows()
    done = steps(broken)
    assert set(done) == set(range(STEPS))
    assert len(done) - STEPS <= kills * EVERY
    assert not [path for path in (broken / "checkpoints").iterdir() if path.name[0] == "."]
