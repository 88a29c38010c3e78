"""What every command promises: speed of help, exit codes, sentences instead of tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import weightshare.cli
from weightshare.cli import COMMANDS, main
from weightshare.cli.options import dashed
from weightshare.errors import UserError


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def fastest(code: str, tries: int = 3) -> float:
    """Processor seconds of a fresh interpreter: on a quiet machine the seconds a person waits."""
    seconds = []
    for _ in range(tries):
        before = os.times()
        assert python(code).returncode == 0
        after = os.times()
        children = [t.children_user + t.children_system for t in (before, after)]
        seconds.append(children[1] - children[0])
    return min(seconds)


def test_importing_the_library_brings_neither_torch_nor_transformers():
    heavy = ["torch", "transformers", "numpy", "matplotlib", "rich", "peft", "flwr"]
    code = f"import sys, weightshare; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_importing_takes_under_a_tenth_of_a_second():
    bare = fastest("pass")
    assert fastest("import weightshare") - bare < 0.1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_brings_no_torch(command):
    code = (
        "import sys; from weightshare.cli import main; "
        f"status = main([{command!r}, '--help']); sys.exit(status or ('torch' in sys.modules))"
    )
    assert fastest(code, 2) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_with_dashes(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and "_" not in "".join(
        word for word in shown.split() if word.startswith("--")
    )


def test_the_overview_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert main(["--version"]) == 0


def test_names_outside_have_dashes():
    assert dashed("cure.learning_rate") == "cure-learning-rate"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "not a command"),
        (["fold"], "MODEL is missing"),
        (["fold", "x", "--remov", "0.2"], "did you mean --remove"),
        (["fold", "x", "--remove"], "needs a value"),
        (["fold", "x", "--remove", "much"], "--remove cannot be much; it takes a number"),
        (["fold", "x", "--share", "1.5"], "--share cannot be 1.5; it takes a whole number"),
        (["fold", "x", "--ranking", "magic"], "--ranking cannot be magic; it takes gates,"),
        (["fold", "x", "--cure-trainable", "none"], "it takes all, lora or norms"),
        (["fold", "x", "--target-params", "few"], "it takes a whole number"),
        (["fold", "x", "y"], "'y' is not expected"),
        (["fold", "x", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["fold", "x", "--resume", "maybe"], "'maybe' is not expected"),
        (["fold", "x", "--cure-learning-rate", "fast"], "it takes a number"),
        (["fold", "/nowhere"], "No model"),
        (["tour", "--only", "moon"], "not a stop"),
    ],
)
def test_wrong_options_end_in_one_sentence_and_2(arguments, said, capsys):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines


def test_a_bug_ends_in_a_traceback_and_1(monkeypatch, capsys):
    import weightshare.cli.fold

    def broken(config):
        raise ValueError("a bug that was planted")

    monkeypatch.setattr(weightshare.cli.fold, "run", broken)
    assert main(["fold", "x"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "a bug that was planted" in shown


def test_our_own_missing_module_is_a_bug_and_a_missing_extra_is_not(monkeypatch, capsys):
    import weightshare.cli.fold

    def lacking(name):
        def run(config):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return run

    monkeypatch.setattr(weightshare.cli.fold, "run", lacking("transformers.models"))
    assert main(["fold", "x"]) == 2
    assert "pip install 'weightshare[folding]'" in capsys.readouterr().err
    monkeypatch.setattr(weightshare.cli.fold, "run", lacking("weightshare.folding.nothing"))
    assert main(["fold", "x"]) == 1


def test_a_user_error_and_an_interrupt_have_their_own_status(monkeypatch, capsys):
    import weightshare.cli.fold

    def refused(config):
        raise UserError("No.")

    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(weightshare.cli.fold, "run", refused)
    assert main(["fold", "x"]) == 2
    monkeypatch.setattr(weightshare.cli.fold, "run", stopped)
    assert main(["fold", "x"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_options_go_out_as_yaml_and_come_back(tmp_path, monkeypatch, capsys):
    import weightshare.cli.fold

    arguments = ["fold", "x", "--remove=0.25", "--cure-steps", "7", "--gates-penalty", "0.2"]
    assert main([*arguments, "--print-config"]) == 0
    file = tmp_path / "options.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["cure"]["steps"] == 7
    seen = []
    monkeypatch.setattr(weightshare.cli.fold, "run", seen.append)
    assert main(arguments) == 0
    assert main(["fold", "--config", str(file)]) == 0
    assert main(["fold", "--config", str(file), "--cure-steps", "9", "--resume"]) == 0
    assert seen[0] == seen[1]
    assert seen[2].cure.steps == 9 and seen[2].resume is True
    assert seen[2].gates.penalty == 0.2


def test_flags_can_be_written_out_and_turned_off(monkeypatch):
    import weightshare.cli.fold

    seen = []
    monkeypatch.setattr(weightshare.cli.fold, "run", seen.append)
    for flag, value in (("--resume", True), ("--resume=false", False), ("--no-resume", False)):
        assert main(["fold", "x", flag]) == 0
        assert seen[-1].resume is value
    assert main(["fold", "x", "--resume", "true", "--remove", "-0.5"]) == 0
    assert seen[-1].resume is True and seen[-1].remove == -0.5


def test_python_m_works():
    done = subprocess.run(
        [sys.executable, "-m", "weightshare.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and weightshare.__version__ in done.stdout


def test_no_message_names_jsonargparse(capsys):
    main(["fold", "x", "--cure.steps", "[1"])
    assert "jsonargparse" not in capsys.readouterr().err.lower()


def test_config_files_import_the_standard_library_only():
    import weightshare

    home = Path(weightshare.__file__).parent
    for file in home.glob("*/config.py"):
        code = (
            "import sys, importlib.util, json; "
            f"s = importlib.util.spec_from_file_location('c', {str(file)!r}); "
            "m = importlib.util.module_from_spec(s); sys.modules['c'] = m; "
            "s.loader.exec_module(m); "
            "print(json.dumps([n for n in ('torch', 'numpy', 'transformers') if n in sys.modules]))"
        )
        done = python(code)
        assert done.returncode == 0 and json.loads(done.stdout) == [], file
