"""A run directory survives, resumes, refuses and never lies about having finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

import weightshare
from weightshare.errors import UserError
from weightshare.report import TENSORS, Run


@dataclass
class Inner:
    rank: int = 4
    rates: tuple[float, ...] = (1e-5, 0.1)


@dataclass
class Config:
    model: str = "tiny"
    seed: int = 7
    device: str = "cpu"
    hf_token: str | None = None
    inner: Inner = field(default_factory=Inner)
    out: Path | None = None


def read(path: Path) -> dict:
    return json.loads((path / "summary.json").read_text())


def test_a_finished_run_leaves_the_promised_files(tmp_path):
    with Run.open(tmp_path / "run", Config(), command="fold") as run:
        run.log(1, loss=0.5)
        run.summary(loss={"before": 1.0})
        run.summary(loss={"after": torch.tensor(float("nan"))})
        run.save("model", lambda path: path.mkdir())
    path = run.path
    names = {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "environment.json"}
    assert names <= {entry.name for entry in path.iterdir()}
    summary = read(path)
    assert summary.pop("seconds")["total"] > 0
    assert summary == {
        "command": "fold",
        "version": weightshare.__version__,
        "seed": 7,
        "device": "cpu",
        "finished": True,
        "loss": {"before": 1.0, "after": "NaN"},
    }
    config = yaml.safe_load((path / "config.yaml").read_text())
    assert config["inner"] == {"rank": 4, "rates": [1e-5, 0.1]}
    environment = json.loads((path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["cpus"] == os.cpu_count()
    assert not [p for p in path.rglob("*") if p.name.startswith((".new", ".old"))]


def test_device_and_seed_have_values_where_the_configuration_is_silent(tmp_path):
    with Run.open(tmp_path, {"device": "auto"}) as run:
        assert run.summary()["device"] in {"cpu", "cuda", "mps", "xpu"}
        assert run.summary()["seed"] is None


def test_a_run_is_not_overwritten(tmp_path):
    with Run.open(tmp_path, {"resume": False}, command="tune"):
        pass
    with pytest.raises(UserError, match=r"a finished tune run.*--resume.*--out"):
        Run.open(tmp_path, {"resume": False}, command="tune")
    with (
        pytest.raises(KeyError),
        Run.open(tmp_path, {"resume": False}, command="tune", resume=True),
    ):
        raise KeyError
    with pytest.raises(UserError, match="an unfinished tune run"):
        Run.open(tmp_path, {"resume": False}, command="tune")
    with pytest.raises(UserError, match="fold cannot resume"):
        Run.open(tmp_path, {}, command="fold", resume=True)


def test_places_that_cannot_hold_a_run_are_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Run.open(tmp_path / "file", {})
    with pytest.raises(UserError, match=r"cannot be written \(not a directory\)"):
        Run.open(tmp_path / "file" / "run", {})
    for resume in (False, True):
        with pytest.raises(UserError, match="holds other files and no run"):
            Run.open(tmp_path, {}, resume=resume)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        Run.open(tmp_path / "run", {})


def test_a_denied_folder_is_one_sentence(tmp_path, monkeypatch):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", deny)
    with pytest.raises(UserError, match=r"cannot be written \(permission denied\)"):
        Run.open(tmp_path / "run", {})


def test_resuming_with_nothing_there_starts_afresh(tmp_path):
    with Run.open(tmp_path / "new", {}, resume=True) as run:
        assert not run.resumed


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_process_killed_while_opening_can_be_started_again(tmp_path, stage):
    tmp_path.joinpath(".lock").touch()
    if stage > 0:
        tmp_path.joinpath("stages").mkdir()
    if stage > 1:
        tmp_path.joinpath(".new.summary.json").write_text('{"comm')
    with Run.open(tmp_path, {}, resume=stage == 3):
        pass
    assert read(tmp_path)["finished"]


def test_resume_names_the_options_that_differ(tmp_path):
    with Run.open(tmp_path, Config()):
        pass
    changed = Config(seed=8, inner=Inner(rank=5), out=Path("elsewhere"))
    with pytest.raises(UserError, match=r"inner\.rank: 4 -> 5, seed: 7 -> 8\)") as error:
        Run.open(tmp_path, changed, resume=True)
    assert "out" not in str(error.value).split("(")[1].split(")")[0]
    with Run.open(tmp_path, Config(out=Path("x")), resume=True) as run:
        assert run.resumed
    with Run.open(tmp_path, changed, resume=True, harmless=["seed", "inner.rank"]):
        pass


def test_a_refused_resume_changes_nothing(tmp_path):
    with Run.open(tmp_path, Config()) as run:
        run.log(1, loss=2.0)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError):
        Run.open(tmp_path, Config(seed=8), resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_secrets_never_reach_the_directory(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    secrets = ["tok-abcdefgh", "env-abcdefgh", "arg-abcdefgh", "hf_ABCDEFGHIJKLMNOPQRST"]
    monkeypatch.setenv("SERVICE_TOKEN", secrets[1])
    monkeypatch.setattr(sys, "argv", ["weightshare", "--api-key", secrets[2], secrets[3]])
    figure = Figure()
    figure.add_subplot().set_title(secrets[1])
    with Run.open(tmp_path, {"token": secrets[0], "note": f"{secrets[3]} {secrets[1]}"}) as run:
        run.rows("t", [{secrets[1]: secrets[3]}], caption=secrets[1])
        run.text("x", secrets[1], secrets[3])
        run.text("y", "samples", [{"prompt": secrets[1]}])
        run.figure("f", figure, caption=secrets[1])
        run.key(secrets[1], secrets[3], note=secrets[1])
        run.summary(note=secrets[1])
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not [s for s in secrets if s.encode() in path.read_bytes()], path


def test_metrics_are_cut_back_to_a_step(tmp_path):
    with Run.open(tmp_path, {}) as run:
        for step in range(6):
            run.log(step, loss=float("inf") if step == 2 else step)
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 6, "lo')
        run.truncate(3)
        run.log(4, loss=40)
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in text] == [0, 1, "Infinity", 3, 40]
    assert run.metrics()[-1] == {"step": 4, "loss": 40}


def test_a_half_written_line_is_gone_when_the_run_is_opened_again(tmp_path):
    with Run.open(tmp_path, {}) as run:
        run.log(1, loss=1)
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 2')
    with Run.open(tmp_path, {}, resume=True) as run:
        run.log(2, loss=2)
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_seconds_add_up_over_sessions(tmp_path):
    with Run.open(tmp_path, {}):
        time.sleep(0.05)
    first = read(tmp_path)["seconds"]["total"]
    with Run.open(tmp_path, {}, resume=True) as run:
        run.summary(seconds={"train": 1.5})
        time.sleep(0.05)
    second = read(tmp_path)["seconds"]
    assert second["total"] >= first + 0.05
    assert second["train"] == 1.5


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, UserError])
def test_an_exception_passes_and_nothing_claims_success(tmp_path, kind):
    with Run.open(tmp_path, {}):
        pass
    error = kind("mine")
    with pytest.raises(kind) as caught, Run.open(tmp_path, {}, resume=True):
        raise error
    assert caught.value is error
    assert read(tmp_path)["finished"] is False
    assert read(tmp_path)["stopped_by"] == kind.__name__
    page = (tmp_path / "report.html").read_text()
    assert "unfinished" in page
    assert ">finished<" not in page
    with Run.open(tmp_path, {}, resume=True):
        pass
    assert "stopped_by" not in read(tmp_path)


def test_refused_input_leaves_no_run_behind(tmp_path):
    """Only where nothing was kept, and only what was refused with a sentence."""
    out = tmp_path / "out"
    with pytest.raises(UserError), Run.open(out, {}):
        raise UserError("wrong name")
    assert not out.exists()
    run = Run.open(out, {})
    run.stage("ranking", lambda: [1, 2])
    with pytest.raises(UserError), run:
        raise UserError("wrong later on")
    assert read(out)["stopped_by"] == "UserError"
    with pytest.raises(ValueError), Run.open(tmp_path / "bug", {}):
        raise ValueError
    assert read(tmp_path / "bug")["stopped_by"] == "ValueError"


def test_a_run_in_the_way_is_told_by_the_options_there_are(tmp_path):
    with Run.open(tmp_path, {"overwrite": False}):
        pass
    with pytest.raises(UserError, match=r"a finished run run; replace it by --overwrite or choose"):
        Run.open(tmp_path, {"overwrite": False})
    with pytest.raises(UserError, match=r"a finished run run; choose another folder"):
        Run.open(tmp_path, {})


def test_an_exception_is_not_masked_when_the_directory_is_gone(tmp_path):
    def fail(run):
        shutil.rmtree(run.path)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Run.open(tmp_path / "run", {}) as run:
        fail(run)


def test_a_report_that_cannot_be_drawn_leaves_the_run_unfinished(tmp_path):
    run = Run.open(tmp_path, {})
    run.rows("t", [{"a": 1}])
    (tmp_path / "tables" / "t.json").unlink()
    with pytest.raises(FileNotFoundError), run:
        pass
    assert read(tmp_path)["finished"] is False
    assert not (tmp_path / "report.html").exists()


def test_a_stage_is_computed_once_and_returns_the_same_first_and_later(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"order": (3, 1), "score": {2: float("nan")}}

    with Run.open(tmp_path, {}) as run:
        first = run.stage("ranking", compute)
        run.stage("grams", lambda: {"g": torch.eye(2)}, codec=TENSORS)
    with Run.open(tmp_path, {}, resume=True) as run:
        second = run.stage("ranking", compute)
        grams = run.stage("grams", compute, codec=TENSORS)
    assert len(calls) == 1
    assert repr(first) == repr(second) == repr({"order": [3, 1], "score": {"2": float("nan")}})
    assert torch.equal(grams["g"], torch.eye(2))


def test_a_stage_takes_any_codec_also_one_that_writes_folders(tmp_path):
    class Folder:
        def write(self, path, value):
            path.mkdir()
            for name, text in value.items():
                (path / name).write_text(text)

        def read(self, path):
            return {entry.name: entry.read_text() for entry in sorted(path.iterdir())}

    with Run.open(tmp_path, {}) as run:
        assert run.stage("parts", lambda: {"a": "1", "b": "2"}, codec=Folder()) == {
            "a": "1",
            "b": "2",
        }


def test_names_become_file_names_or_are_refused(tmp_path):
    with Run.open(tmp_path / "run", {}) as run:
        for name in ("../x", "a/b", ".hidden", "", "a b"):
            with pytest.raises(ValueError, match="cannot name a file"):
                run.rows(name, [])


KILLED = """
import os, signal, sys, time
from weightshare.report import Run
with Run.open(sys.argv[1], {}, resume=True) as run:
    def log(word):
        with open(sys.argv[2], "a") as file:
            print(word, file=file)
    run.stage("first", lambda: log("first") or 1)
    memo = run.memo("losses")
    def ranking():
        for i in range(4):
            def loss(i=i):
                log(f"loss {i}")
                if i == int(sys.argv[3]):
                    os.kill(os.getpid(), signal.SIGKILL)
                return i / 3
            memo(i, loss)
        return [memo(i, None) for i in range(4)]
    run.log(1, loss=1.0)
    run.summary(ranking=run.stage("ranking", ranking))
"""


def start(*arguments):
    return subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_ranking_repeats_one_evaluation_and_no_finished_stage(tmp_path):
    journal = tmp_path / "journal"
    assert start(tmp_path / "run", journal, 2).returncode == -signal.SIGKILL
    assert read(tmp_path / "run")["finished"] is False
    assert not (tmp_path / "run" / "report.html").exists()
    done = start(tmp_path / "run", journal, -1)
    assert done.returncode == 0, done.stderr
    assert journal.read_text().split("\n")[:-1] == [
        "first",
        *("loss 0", "loss 1", "loss 2"),
        *("loss 2", "loss 3"),
    ]
    assert read(tmp_path / "run")["ranking"] == [0, 1 / 3, 2 / 3, 1]


@pytest.mark.skipif(os.name == "nt", reason="record locks are POSIX")
def test_a_run_in_use_is_refused_and_free_again_after_a_kill(tmp_path):
    code = (
        "import sys, time\nfrom weightshare.report import Run\n"
        "run = Run.open(sys.argv[1], {})\nprint('open', flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="in use by another process"):
            Run.open(tmp_path, {}, resume=True)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with Run.open(tmp_path, {}, resume=True) as run:
        assert run.resumed


def test_a_full_disk_ends_a_run_in_one_sentence(tmp_path):
    code = (
        "import resource, sys\nfrom weightshare.errors import UserError\n"
        "from weightshare.report import Run\n"
        "try:\n"
        "    with Run.open(sys.argv[1], {}) as run:\n"
        "        run.save('kept', lambda p: p.write_text('old'))\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))\n"
        "        run.save('kept', lambda p: p.write_bytes(bytes(10**6)))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "kept could not be written because the disk is full" in done.stdout
    assert (tmp_path / "kept").read_text() == "old"
    assert read(tmp_path)["stopped_by"] == "UserError"


def test_importing_report_brings_in_neither_torch_nor_matplotlib():
    code = (
        "import sys, weightshare.report, weightshare.report.run, weightshare.report.figures\n"
        "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
