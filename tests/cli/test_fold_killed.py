"""A fold killed at any moment and resumed ends with the same bytes, and repeats little."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_fold.py")
PLACES = ["ranking:4", "cure:4", "checkpoint:2", "model"]
ARTEFACTS = ["model/model.safetensors", "model/config.json", "model/README.md", "plan.json"]


def run(place, log, arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), place, str(log), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def whole(model_folder, text_file, tmp_path_factory):
    home = tmp_path_factory.mktemp("whole")
    options = [
        "fold", str(model_folder), "--text", str(text_file), "--remove", "0.3", "--share", "2",
        "--representative", "best", "--calibration-sequences", "12", "--sequence-length", "24",
        "--cure-steps", "6", "--cure-batch-size", "2", "--cure-checkpoint-every", "2",
    ]  # fmt: skip
    done = run("never", home / "log", [*options, "--out", str(home / "run")])
    assert done.returncode == 0, done.stderr[-2000:]
    return options, home


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_fold_ends_with_the_same_bytes(whole, place, tmp_path):
    options, home = whole
    out, log = tmp_path / "run", tmp_path / "log"
    killed = run(place, log, [*options, "--out", str(out)])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (out / "model").exists()
    assert not list((out / "checkpoints").glob("step-*/half"))
    resumed = run("never", log, [*options, "--out", str(out), "--resume"])
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for name in ARTEFACTS:
        assert (out / name).read_bytes() == (home / "run" / name).read_bytes(), name
    # Work that was done twice: one evaluation of the ranking, one checkpoint interval of the cure.
    once = (home / "log").read_text().splitlines()
    both = log.read_text().splitlines()
    evaluations = [line for line in both if line.startswith("ranking")]
    assert len(evaluations) - len(set(evaluations)) <= 1
    steps = sum(line.startswith("cure") for line in both)
    assert steps - sum(line.startswith("cure") for line in once) <= 2
    rows = [(out / "metrics.jsonl"), (home / "run" / "metrics.jsonl")]
    assert rows[0].read_text().count("\n") == rows[1].read_text().count("\n")


def test_a_full_disk_is_said_in_a_sentence_and_leaves_nothing_half(whole, tmp_path):
    options, _ = whole
    out = tmp_path / "run"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from weightshare.cli import main; import torch; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        f"sys.exit(main({[*options, '--out', str(out)]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert "disk" in last or "space" in last, last
    assert not (out / "model").exists()
