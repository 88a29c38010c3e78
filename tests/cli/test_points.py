"""``weightshare points`` as a person uses it: whole small runs, resumes, everything wrong."""

import json
import signal

import numpy as np
import pytest

pytest.importorskip("ase")

from weightshare.cli import main

TINY = ["--hidden", "8", "--basis", "8", "--layers", "1", "--orientations", "6"]


@pytest.fixture(scope="module")
def nbody_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "nbody"
    arguments = [
        "points", "nbody", "--train-size", "40", "--valid-size", "10", "--test-size", "20",
        "--epochs", "2", "--batch-size", "20", *TINY, "--out", str(out),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WEIGHTSHARE_DATA", raising=False)
        assert main(arguments) == 0
    return out, arguments


@pytest.fixture(scope="module")
def molecules(tmp_path_factory):
    """Twenty random methanes with the energies and forces of a spring between all atoms."""
    draw = np.random.default_rng(0)
    places = draw.normal(size=(20, 5, 3)) * 1.2
    gaps = places[:, :, None] - places[:, None]
    energies = (gaps**2).sum((1, 2, 3)) / 2
    file = tmp_path_factory.mktemp("data") / "methane.npz"
    np.savez(
        file, z=np.array([6, 1, 1, 1, 1]), R=places, E=energies, F=-2 * gaps.sum(2),
        units=["R angstrom", "E kcal/mol", "F kcal/mol/angstrom"],
    )  # fmt: skip
    return file


def test_the_nbody_run_says_what_scripts_rely_on(nbody_run):
    out, _ = nbody_run
    facts = json.loads((out / "summary.json").read_text())
    assert facts["command"] == "points" and facts["finished"]
    assert facts["parameters"] > 0 and facts["test"]["mse"] > 0
    assert 0 < facts["equivariance_error"] < 1 and facts["seconds"]["train"] > 0
    assert facts["baselines"]["constant_velocity"] < 0.2
    assert (out / "checkpoint.safetensors").is_file()
    page = (out / "report.html").read_text()
    assert "constant velocity" in page and "an easy, a middling, a hard one" in page


def test_a_second_run_is_refused_and_resuming_changes_nothing(nbody_run, capsys):
    out, arguments = nbody_run
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    before = (out / "checkpoint.safetensors").read_bytes()
    test = json.loads((out / "summary.json").read_text())["test"]
    assert main([*arguments, "--resume"]) == 0
    assert (out / "checkpoint.safetensors").read_bytes() == before
    assert json.loads((out / "summary.json").read_text())["test"] == test


def test_an_interrupted_run_goes_on_to_the_same_bytes(nbody_run, tmp_path, monkeypatch):
    from weightshare.equivariant import dynamics

    whole, arguments = nbody_run
    arguments = [*arguments[:-1], str(tmp_path / "run")]
    measured, calls = dynamics.sample_errors, []

    def interrupting(*given):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return measured(*given)

    monkeypatch.delenv("WEIGHTSHARE_DATA", raising=False)
    monkeypatch.setattr(dynamics, "sample_errors", interrupting)
    assert main(arguments) == 130
    monkeypatch.undo()
    monkeypatch.delenv("WEIGHTSHARE_DATA", raising=False)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert main([*arguments, "--resume"]) == 0
    kept = [(out / "checkpoint.safetensors").read_bytes() for out in (tmp_path / "run", whole)]
    assert kept[0] == kept[1]


def test_momentum_and_charges_are_symmetries_that_can_be_asked_for(nbody_run, tmp_path):
    plain, arguments = nbody_run
    arguments = [*arguments[:-1], str(tmp_path / "run"), "--momentum", "--signs", "--scales"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WEIGHTSHARE_DATA", raising=False)
        assert main(arguments) == 0
    errors = [
        json.loads((out / "summary.json").read_text())["test"]["mse"]
        for out in (tmp_path / "run", plain)
    ]
    # The centre of mass is right from the first step on.
    assert errors[0] < errors[1]


def test_molecules_of_several_sizes(tmp_path):
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    draw, frames = np.random.default_rng(0), []
    for n in (1, 2, 2, 3, 2, 1):
        atoms = Atoms("C" + "H" * n, draw.normal(size=(n + 1, 3)) * 2)
        forces = draw.normal(size=(n + 1, 3))
        atoms.calc = SinglePointCalculator(atoms, energy=-5.0 * n, forces=forces)
        frames.append(atoms)
    write(tmp_path / "mixed.extxyz", frames)
    common = ["points", str(tmp_path / "mixed.extxyz"), "--epochs", "1", "--batch-size", "2"]
    assert main([*common, *TINY, "--out", str(tmp_path / "run")]) == 0
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert np.isfinite(facts["test"]["force_mae_mev_a"]) and not facts["captured"]


@pytest.fixture
def small_qm9(monkeypatch):
    """Sixty random molecules whose energy is a sum over pairs."""
    from weightshare.equivariant import qm9

    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 5, 60)
    start = np.concatenate([[0], sizes.cumsum()])
    numbers = draw.choice([1, 6, 7, 8, 9], start[-1])
    positions = draw.normal(size=(start[-1], 3)) * 1.5
    targets = np.repeat(sizes[:, None] + 0.1 * draw.normal(size=(60, 1)), 12, 1)
    data = qm9.QM9(np.arange(60), start, numbers, positions, targets)
    parts = {"train": np.arange(40), "valid": np.arange(40, 50), "test": np.arange(50, 60)}
    monkeypatch.setattr(qm9.QM9, "split", lambda self: parts)
    monkeypatch.setattr("weightshare.equivariant.qm9.load_qm9", lambda: data)
    monkeypatch.setattr("weightshare.equivariant.load_qm9", lambda: data, raising=False)


def test_a_property_of_small_molecules(small_qm9, tmp_path, capsys):
    common = ["points", "qm9", "--target", "gap", "--epochs", "2", "--batch-size", "8", *TINY]
    assert main([*common, "--out", str(tmp_path / "run")]) == 0
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert facts["data"] == {"train": 40, "valid": 10, "test": 10}
    assert facts["test"]["unit"] == "eV" and facts["test"]["mae"] > 0
    assert facts["rotation_spread"] > 0 and facts["baselines"]["composition"] > 0
    assert facts["equivariance_error"] > 0
    capsys.readouterr()
    assert main([*common, "--train-size", "41", "--out", str(tmp_path / "no")]) == 2
    assert "--train-size is 41" in capsys.readouterr().err
    assert main(["points", "qm9", "--target", "mass"]) == 2
    assert "--target is 'mass'" in capsys.readouterr().err


def test_a_potential_is_trained_saved_and_used_by_ase(molecules, tmp_path):
    out = tmp_path / "run"
    arguments = ["--epochs", "2", "--batch-size", "4", "--rotations", "2", *TINY]
    assert main(["points", str(molecules), *arguments, "--out", str(out)]) == 0
    facts = json.loads((out / "summary.json").read_text())
    assert facts["test"]["energy_mae_mev"] > 0 and facts["test"]["force_mae_mev_a"] > 0
    assert facts["data"] == {"train": 17, "valid": 1, "test": 2}
    assert facts["rotation_spread"]["energy_mev"] > 0 and facts["equivariance_error"] > 0
    from ase import Atoms

    from weightshare.equivariant import PonitaCalculator

    with np.load(molecules) as file:
        atoms = Atoms(file["z"], file["R"][0])
    atoms.calc = PonitaCalculator(out / "checkpoint.safetensors")
    assert np.isfinite(atoms.get_forces()).all()


def test_periodic_structures_of_several_sizes_with_stress(tmp_path):
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    draw, frames = np.random.default_rng(0), []
    for n in (1, 2, 2, 3, 2, 1):
        atoms = Atoms("Si" * n, draw.uniform(0, 4, (n, 3)), cell=np.eye(3) * 4.2, pbc=True)
        atoms.calc = SinglePointCalculator(
            atoms, energy=-5.0 * n, forces=draw.normal(size=(n, 3)), stress=draw.normal(size=6) / 50
        )
        frames.append(atoms)
    write(tmp_path / "si.extxyz", frames)
    common = ["points", str(tmp_path / "si.extxyz"), "--epochs", "1", "--batch-size", "2", *TINY]
    run = [*common, "--cutoff", "3", "--stress-weight", "1", "--out", str(tmp_path / "run")]
    assert main(run) == 0
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert facts["test"]["stress_mae_mev_a3"] > 0
    assert main([*common, "--out", str(tmp_path / "no")]) == 2


def test_dry_runs_write_nothing(molecules, tmp_path, capsys):
    for data in ("nbody", str(molecules)):
        assert main(["points", data, "--dry-run", *TINY, "--out", str(tmp_path / "x")]) == 0
        shown = capsys.readouterr().out
        assert "parameters" in shown and "ms a step" in shown and "nothing was written" in shown
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere.npz"], "No data set"),
        (["nbody", "--orientations", "0"], "--orientations is 0"),
        (["nbody", "--hidden", "0"], "--hidden is 0"),
        (["nbody", "--ema", "1"], "--ema is 1"),
        (["nbody", "--test-size", "-1"], "--test-size is -1"),
        (["nbody", "--cutoff", "3"], "--cutoff is for files"),
        (["FILE", "--signs"], "--signs is for nbody"),
        (["FILE", "--force-weight", "-1"], "--force-weight is -1"),
        (["nbody", "--signs", "--no-augment"], "--signs is an augmentation"),
        (["qm9", "--scales"], "--scales is for nbody"),
        (["nbody", "--learning-rate", "0"], "--learning-rate is 0"),
        (["nbody", "--clip", "-1"], "--clip is -1"),
        (["nbody", "--train-size", "12000"], "training set has 10000"),
        (["nbody", "--dry-run", "--valid-size", "2001"], "validation set has 2000"),
        (["nbody", "--target", "gap"], "--target is for qm9"),
        (["qm9", "--unit", "eV"], "--unit is for files"),
        (["nbody", "--force-weight", "2"], "--force-weight is for files"),
        (["FILE", "--energy-weight", "0", "--force-weight", "0"], "nothing is learnt"),
        (["FILE", "--stress-weight", "1"], "has a stress"),
        (["FILE", "--unit", "kJ"], "unit 'kJ'"),
        (["FILE", "--train-size", "40"], "too few"),
        (["FILE", "--test", "/nowhere.npz"], "No data set"),
    ],
)
def test_wrong_options_end_in_one_sentence_and_2(arguments, said, molecules, tmp_path, capsys):
    arguments = [str(molecules) if word == "FILE" else word for word in arguments]
    assert main(["points", *arguments, "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert not (tmp_path / "run").exists()
