"""``weightshare federate`` as a person uses it: runs, reports, refusals, kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from weightshare.cli import main
from weightshare.cli.federate import show_plan
from weightshare.federated import FederateConfig, simulate

QUICK = ["--participants", "4", "--rounds", "4", "--epochs", "1", "--samples", "200"]
SCRIPT = Path(__file__).with_name("killed_federation.py")


def federate(out, *arguments):
    return main(["federate", "digits", *map(str, arguments), "--out", str(out)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "federate"
    assert federate(out, *QUICK, "--attack", "label_flip", "--adversaries", 1) == 0
    return out


def test_the_summary_holds_what_scripts_rely_on(finished):
    facts = json.loads((finished / "summary.json").read_text())
    assert facts["command"] == "federate" and facts["finished"] and facts["rounds"] == 4
    accuracy = facts["accuracy"]
    assert 0 <= accuracy["min"] <= accuracy["mean"] <= accuracy["best"] <= 1
    assert accuracy["adversaries"] is not None
    assert facts["gain"]["min"] <= facts["gain"]["mean"]
    assert facts["fairness"] is None or -100 <= facts["fairness"] <= 100
    assert facts["expelled"] == {"honest": 0, "adversaries": 0}
    assert set(facts["label_flip"]) == {"target", "success"}


def test_the_run_directory_is_complete(finished):
    for name in ("config.yaml", "metrics.jsonl", "report.html", "environment.json"):
        assert (finished / name).is_file(), name
    models = load_file(finished / "checkpoint.safetensors")
    assert sorted(models) == ["p01", "p02", "p03", "p04", "x01"]
    assert all(np.isfinite(model).all() for model in models.values())
    page = (finished / "report.html").read_text()
    for said in ("Reputation round by round", "Who received", "taken for what", "read it beside"):
        assert said in page
    assert (finished / "server" / "audit.jsonl").read_text().count('"judged"') == 20
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    shares = [v for k, v in rows[-1].items() if k.startswith("reputation.")]
    assert len(shares) == 5 and sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(
    "strategy",
    ["fedavg", "qfedavg", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median",
     "foolsgold", "fltrust", "reference", "cgsv", "robust", "examined"],
)  # fmt: skip
def test_every_strategy_trains_and_resumes_to_the_same_bytes(strategy, tmp_path):
    root = ["--root-samples", 20] if strategy in ("fltrust", "examined") else []
    options = [*QUICK, "--strategy", strategy, "--attack", "free_rider", "--adversaries", 1, *root]
    assert federate(tmp_path / "whole", *options, "--checkpoint-every", 2) == 0
    facts = json.loads((tmp_path / "whole" / "summary.json").read_text())
    if strategy not in ("reference", "cgsv", "robust", "examined"):
        assert facts["fairness"] is None and facts["fairness_reason"]
    if strategy in ("foolsgold", "robust"):
        # Continue from the checkpoint in the middle, as if the rest had never been.
        import shutil

        again = tmp_path / "again"
        shutil.copytree(tmp_path / "whole", again)
        newest = sorted((again / "checkpoints").glob("step-*"))[-1]
        shutil.rmtree(newest)
        assert federate(again, *options, "--checkpoint-every", 2, "--resume") == 0
        one, two = (
            (tmp_path / n / "checkpoint.safetensors").read_bytes() for n in ("whole", "again")
        )
        assert one == two
        counted = [
            json.loads((tmp_path / n / "summary.json").read_text())["bytes"]["received"]
            for n in ("whole", "again")
        ]
        assert counted[1] == pytest.approx(counted[0], rel=0.01)


def test_loop_and_stack_give_the_same_federation(tmp_path):
    for training in ("loop", "stacked"):
        assert federate(tmp_path / training, *QUICK, "--training", training) == 0
    one, two = (load_file(tmp_path / n / "checkpoint.safetensors") for n in ("loop", "stacked"))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-4)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert federate(tmp_path / "out", *QUICK, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    assert "weights" in capsys.readouterr().out


def test_a_plan_does_not_count_the_first_steps_of_a_process(capsys):
    here = simulate(FederateConfig("digits", participants=2, samples=50, rounds=100))

    class SlowAtFirst:
        calls = 0

        def train(self, starts, number):
            self.calls += 1
            time.sleep(1.0 if self.calls == 1 else 0)
            return starts

    here.material = replace(here.material, learner=SlowAtFirst())
    show_plan(here)
    told = re.search(r"about (\d+) s for 100 rounds", capsys.readouterr().out)
    assert told and int(told[1]) < 50  # counted, the first step alone would make it 100


def test_observing_removes_nobody(tmp_path):
    options = ["--participants", 5, "--rounds", 13, "--epochs", 1, "--samples", 300]
    attack = ["--attack", "sign_flip", "--adversaries", 1]
    assert federate(tmp_path / "o", *options, *attack, "--observe") == 0
    assert federate(tmp_path / "r", *options, *attack) == 0
    watched, removed = (
        json.loads((tmp_path / n / "summary.json").read_text())["expelled"] for n in "or"
    )
    assert watched["adversaries"] == 0 and removed == {"honest": 0, "adversaries": 1}
    assert "would_expel" in (tmp_path / "o" / "server" / "audit.jsonl").read_text()


def test_the_suspended_count_as_removed(tmp_path):
    attack = ["--attack", "scaled", "--adversaries", 1, "--strategy", "robust"]
    assert federate(tmp_path / "run", *QUICK, *attack) == 0
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert facts["expelled"] == {"honest": 0, "adversaries": 1}
    table = json.loads((tmp_path / "run" / "tables" / "participants.json").read_text())
    assert [row["removed"] for row in table["rows"]] == [None] * 4 + [3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits", "--adversaries", "2"], "no attack"),
        (["digits", "--attack", "alie"], "needs adversaries"),
        (["digits", "--strategy", "fltrust"], "--root-samples"),
        (["digits", "--strategy", "median", "--observe"], "watches reputations"),
        (["digits", "--participants", "0"], "--participants is 0"),
        (["digits", "--rounds", "0"], "--rounds is 0"),
        (["digits", "--learning-rate", "-1"], "--learning-rate is -1"),
        (["digits", "--decay", "2"], "--decay is 2"),
        (["digits", "--samples", "99999"], "1297 training samples"),
        (["digits", "--participants", "900"], "too few"),
        (["digits", "--participants", "20", "--samples", "40", "--partition", "pow"], "too few"),
        (["digits", "--strategy", "magic"], "it takes reputation"),
        (["nowhere"], "No data set"),
        (["mnist"], "cannot be read"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, said, tmp_path, capsys, monkeypatch):
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("WEIGHTSHARE_DATA", str(tmp_path))
    assert main(["federate", *arguments, "--dry-run", "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines


def test_a_second_run_in_the_same_folder_is_refused(finished, capsys):
    assert federate(finished, *QUICK) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_finished_run_that_is_resumed_stays_what_it_is(finished):
    parts = ("checkpoint.safetensors", "tables/participants.json")
    before = [(finished / part).read_bytes() for part in parts]
    assert federate(finished, *QUICK, "--attack", "label_flip", "--adversaries", 1, "--resume") == 0
    assert [(finished / part).read_bytes() for part in parts] == before
    assert '"quota": 1.0' in (finished / parts[1]).read_text()


def test_a_refusal_leaves_no_folder_that_would_bar_the_next_try(tmp_path, capsys):
    out = tmp_path / "run"
    assert federate(out, *QUICK, "--root-samples", 99999) == 2
    assert "--root-samples is 99999" in capsys.readouterr().err and not out.exists()


def test_files_in_mnists_format_are_read(tmp_path, monkeypatch):
    import gzip

    from weightshare.federated.loading import load_samples

    folder = tmp_path / "mnist"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for part, count in (("train", 90), ("t10k", 30)):
        pixels = draw.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + array.tobytes())
    monkeypatch.setenv("WEIGHTSHARE_DATA", str(tmp_path))
    images = load_samples("mnist")
    assert images.train.shape == (90, 5, 4) and images.test.dtype == np.float32
    assert images.test.max() <= 1 and images.test_labels.tolist() == [i % 10 for i in range(30)]
    assert main(["federate", "mnist", "--participants", "3", "--rounds", "2",
                 "--out", str(tmp_path / "run")]) == 0  # fmt: skip


def run(place, out, *options):
    command = [sys.executable, str(SCRIPT), place, "federate", "digits", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--out", str(out)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    options = [
        "--participants", "4", "--rounds", "6", "--epochs", "1", "--samples", "200",
        "--attack", "replay", "--adversaries", "2", "--checkpoint-every", "2",
    ]  # fmt: skip
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run("never", out, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    return options, out


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "place",
    ["judged:4", "half:2", *(pytest.param(p, marks=SLOW) for p in ("asked:5", "renamed:2"))],
)
def test_a_killed_server_ends_with_the_same_bytes(whole, place, tmp_path):
    options, expected = whole
    out = tmp_path / "run"
    killed = run(place, out, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (out / "checkpoint.safetensors").exists()
    resumed = run("never", out, *options, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    name = "checkpoint.safetensors"
    assert (out / name).read_bytes() == (expected / name).read_bytes()

    def rows(folder):
        # Bytes differ: after a restart everyone is sent its whole model.
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "bytes-sent"} for line in lines]

    assert rows(out) == rows(expected)
    assert '"restored"' in (out / "server" / "audit.jsonl").read_text()
