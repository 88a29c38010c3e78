"""Structures from files: small ones written here, real ones where WEIGHTSHARE_DATA has them."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from weightshare.data import locate
from weightshare.equivariant import (
    PonitaPotential,
    PotentialTask,
    Structure,
    collate,
    read_structures,
    stack_molecules,
)
from weightshare.equivariant.structures import KCAL_PER_MOL, check_structure
from weightshare.errors import UserError
from weightshare.training import total

ase = pytest.importorskip("ase")


def arrays(n=3):
    draw = np.random.default_rng(0)
    return {
        "z": np.array([6, 1]), "R": draw.normal(size=(n, 2, 3)), "E": draw.normal(size=n),
        "F": draw.normal(size=(n, 2, 3)),
    }  # fmt: skip


def test_units_are_converted_once_and_never_guessed(tmp_path):
    data = arrays()
    np.savez(tmp_path / "md17.npz", **data, units=["R angstrom", "E kcal/mol"])
    found = read_structures(tmp_path / "md17.npz")
    assert found[1].energy == pytest.approx(KCAL_PER_MOL * data["E"][1])
    assert np.allclose(found[2].forces, KCAL_PER_MOL * data["F"][2])
    np.savez(tmp_path / "plain.npz", **data)
    with pytest.raises(UserError, match="does not say"):
        read_structures(tmp_path / "plain.npz")
    assert read_structures(tmp_path / "plain.npz", "eV")[0].energy == data["E"][0]
    names = {"z": "nuclear_charges", "R": "coords", "E": "energies", "F": "forces"}
    np.savez(tmp_path / "rmd17.npz", **{names[k]: v for k, v in data.items()})
    assert read_structures(tmp_path / "rmd17.npz")[0].energy == found[0].energy


def test_extended_xyz_keeps_cell_stress_and_numbers(tmp_path):
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    atoms = Atoms("SiO", [[0, 0, 0], [1.1, 0.2, 0]], cell=[4, 5, 6], pbc=[True, True, False])
    stress = np.array([1.0, 2, 3, 4, 5, 6]) / 100
    atoms.calc = SinglePointCalculator(atoms, energy=-3.5, forces=np.ones((2, 3)), stress=stress)
    write(tmp_path / "a.extxyz", [atoms, Atoms("H")])
    first, second = read_structures(tmp_path / "a.extxyz")
    assert first.energy == -3.5 and first.pbc == (True, True, False)
    assert first.stress[1, 2] == stress[3] and first.stress[0, 2] == stress[4]
    assert first.stress[0, 1] == stress[5] and np.allclose(first.stress, first.stress.T)
    assert second.energy is None and second.cell is None and second.numbers.tolist() == [1]
    batch = collate([first, second], 3.0)
    assert batch["stress"][1].isnan().all() and batch["energy"][1].isnan()
    assert batch["batch"].tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="one size"):
        stack_molecules([first, second])


def test_a_virial_is_minus_the_stress_times_the_volume(tmp_path):
    from ase import Atoms
    from ase.io import write

    atoms = Atoms("Si", cell=[4, 5, 6], pbc=True)
    half = np.arange(9.0).reshape(3, 3)
    atoms.info |= {"energy": 1.0, "virial": half + half.T}
    atoms.arrays["forces"] = np.zeros((1, 3))
    write(tmp_path / "a.extxyz", atoms)
    (found,) = read_structures(tmp_path / "a.extxyz", "meV")
    assert np.allclose(found.stress, -1e-3 * atoms.info["virial"] / 120)


def test_a_slab_without_a_third_vector_trains_beside_a_crystal():
    slab = Structure(
        np.array([14, 14]), np.array([[0.0, 0, 0], [1.5, 1.4, 0.3]]), -1.0, np.ones((2, 3)),
        np.eye(3), np.diag([4.0, 4.0, 0.0]), (True, True, False),
    )  # fmt: skip
    vacuum = replace(slab, cell=np.diag([4.0, 4.0, 9.0]))
    batch = collate([slab, vacuum, replace(vacuum, pbc=(True, True, True))], 3.0)
    assert batch["stress"][0].isnan().all() and batch["stress"][1:].isfinite().all()
    torch.manual_seed(0)
    task = PotentialTask(
        PonitaPotential([14], cutoff=3.0, orientations=6, hidden=8, basis=8, layers=1),
        stress_weight=1.0,
    )
    total(task(batch)).backward()
    slopes = [p.grad for p in task.parameters() if p.grad is not None]
    assert slopes and all(slope.isfinite().all() for slope in slopes)


def test_an_atom_on_the_image_of_another_is_refused():
    cell = np.array([[4.0, 0, 0], [1, 4, 0], [0, 0, 4]])
    frame = Structure(np.array([14, 14]), np.stack([np.zeros(3), cell[0] - cell[1]]), cell=cell)
    check_structure(frame)
    with pytest.raises(UserError, match="one place"):
        check_structure(replace(frame, pbc=(True, True, True)))


def test_files_that_cannot_be_used_are_refused(tmp_path):
    data = arrays()
    broken = {**data, "R": np.full((3, 2, 3), np.nan)}
    together = {**data, "R": np.zeros((3, 2, 3))}
    np.savez(tmp_path / "pickled.npz", z=np.array([{}], dtype=object))
    (tmp_path / "a.csv").write_text("")
    np.savez(tmp_path / "nan.npz", **broken)
    np.savez(tmp_path / "same.npz", **together)
    np.savez(tmp_path / "part.npz", z=data["z"])
    np.savez(tmp_path / "short.npz", **{**data, "E": np.zeros(2)})
    np.savez(tmp_path / "flat.npz", **{**data, "R": np.zeros((3, 6))})
    np.savez(tmp_path / "shape.npz", **{**data, "z": np.array([6, 1, 1])})
    np.savez(tmp_path / "nothing.npz", **{**data, "z": np.array([0, 1])})
    np.savez(tmp_path / "half.npz", **{**data, "z": np.array([6.5, 1])})
    np.savez(tmp_path / "fewer.npz", **{**data, "z": np.array([[6, 1]] * 2)})
    np.savez(tmp_path / "words.npz", **{**data, "E": np.array(["a", "b", "c"])})
    np.savez(tmp_path / "bohr.npz", **data, r_unit="bohr")
    np.savez(tmp_path / "cell.npz", **data, cell=np.eye(2))
    (tmp_path / "text.npz").write_text("no archive")
    cases = {
        "pickled": "pickled", "nan": "not finite", "same": "one place", "part": "lacks R, E",
        "short": "2 energies", "flat": r"positions \(3, 6\)", "shape": "for 3 atoms",
        "nothing": "atomic number 0", "text": "no npz file", "half": "whole numbers",
        "fewer": "for 3 frames", "words": "E in .* give numbers", "bohr": "in bohr",
        "cell": "cell in .* shape",
    }  # fmt: skip
    for name, said in cases.items():
        with pytest.raises(UserError, match=said):
            read_structures(tmp_path / f"{name}.npz", "eV")
    (tmp_path / "junk.xyz").write_text("hello\nworld\n")
    with pytest.raises(UserError, match="no extended XYZ"):
        read_structures(tmp_path / "junk.xyz")
    with pytest.raises(UserError, match="neither"):
        read_structures(tmp_path / "a.csv")
    with pytest.raises(UserError, match="no file"):
        read_structures(tmp_path / "b.npz")
    with pytest.raises(UserError, match="not known"):
        read_structures(tmp_path / "nan.npz", "kJ")


def test_splits_keep_the_order_and_refuse_strangers():
    from weightshare.equivariant.frames import FrameBatches, Frames, split_frames
    from weightshare.equivariant.structures import Structure
    from weightshare.training import EpochBatches

    frames = [
        Structure(np.array([6, 1]), np.eye(3)[:2] * (k + 1), float(k), np.zeros((2, 3)))
        for k in range(20)
    ]
    parts = split_frames(frames)
    assert [f.energy for f in parts["train"]] == list(range(17))
    assert [f.energy for f in parts["valid"]] == [17] and parts["test"][-1].energy == 19
    stranger = Structure(np.array([8, 1]), np.eye(3)[:2], 0.0, np.zeros((2, 3)))
    with pytest.raises(UserError, match=r"species \[8\]"):
        split_frames(frames, [stranger])
    unlabelled = Structure(np.array([6]), np.zeros((1, 3)))
    for one in (
        unlabelled,
        Structure(*frames[0].__dict__.values()),
    ):
        one.energy = None if one is unlabelled else float("nan")
        with pytest.raises(UserError, match="no finite energy"):
            split_frames([*frames, one])
    with pytest.raises(UserError, match="at least 3"):
        split_frames(frames[:2])
    with pytest.raises(UserError, match="too few"):
        split_frames(frames, train=20)
    for cutoff in (None, 9.0):
        batches = FrameBatches(Frames(frames, cutoff), EpochBatches(torch.arange(20), 4))
        seen = torch.cat([batches[step]["energy"] for step in range(5)])
        assert sorted(seen.tolist()) == list(range(20))
        assert ("edges" in batches[0]) == (cutoff is not None)


REAL = {
    "ethanol_ccsdt_1000": (1000, 9), "rmd17/aspirin_train_01": (1000, 21),
    "atoms/3bpa/train_300K.xyz.gz": (500, 27), "atoms/acac/test_MD_300K.xyz.gz": (650, 15),
    "atoms/mlearn/Si_test.extxyz.gz": (25, None), "atoms/nbmotaw/test.extxyz.gz": (376, None),
}  # fmt: skip


@pytest.mark.skipif("WEIGHTSHARE_DATA" not in os.environ, reason="needs WEIGHTSHARE_DATA")
@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    try:
        path = locate(name)
    except UserError:
        pytest.skip(f"{name} is not in WEIGHTSHARE_DATA")
    frames = read_structures(path)
    count, atoms = REAL[name]
    assert len(frames) == count and (atoms is None or len(frames[0]) == atoms)
    for frame in frames[:20]:
        assert frame.forces is not None and abs(frame.forces.sum(0)).max() < 1e-3
        assert frame.energy < 0
    periodic = frames[0].cell is not None
    batch = collate(frames[:2], 4.0 if periodic else None)
    assert torch.isfinite(batch["positions"]).all() and batch["edges"].shape[1] > 0
    if periodic:
        assert np.allclose(frames[0].stress, frames[0].stress.T)


def test_padded_molecules_say_what_single_ones_say():
    from weightshare.equivariant import PonitaPotential, PotentialTask, pad_molecules
    from weightshare.equivariant.structures import Structure, stack_molecules

    draw = np.random.default_rng(0)
    frames = [
        Structure(np.array([6, 1, 8, 1][:n]), 1.3 * draw.normal(size=(n, 3)), float(n),
                  draw.normal(size=(n, 3)))
        for n in (4, 2, 3)
    ]  # fmt: skip
    torch.manual_seed(0)
    potential = PonitaPotential(
        [1, 6, 8], hidden=8, layers=2, basis=8, orientations=6, references=[-1.0, -2.0, -3.0]
    )
    task = PotentialTask(potential, per_atom=True).double()
    batch = pad_molecules(frames, 5)
    batch["positions"] = batch["positions"].double()
    together, losses = task.predict(batch), task(batch)
    sums = dict.fromkeys(losses, 0.0)
    for row, frame in enumerate(frames):
        one = stack_molecules([frame])
        one["positions"] = one["positions"].double()
        alone, n = task.predict(one), len(frame)
        assert torch.allclose(together.energy[row], alone.energy[0], atol=1e-12)
        assert torch.allclose(together.forces[row, :n], alone.forces[0], atol=1e-12)
        assert not together.forces[row, n:].any()
        sums = {name: sums[name] + float(term.sum) for name, term in task(one).items()}
    for name, term in losses.items():
        assert np.isclose(float(term.sum), sums[name], rtol=1e-5)
    assert losses["force"].count == 27


def test_a_batch_of_qm9_is_padded_and_a_property_ignores_padding():
    from weightshare.equivariant import Ponita, PropertyTask
    from weightshare.equivariant.qm9 import QM9

    draw = np.random.default_rng(1)
    start = np.array([0, 3, 5])
    numbers, positions = np.array([6, 1, 1, 8, 1]), draw.normal(size=(5, 3))
    data = QM9(np.arange(2), start, numbers, positions, draw.normal(size=(2, 12)))
    torch.manual_seed(0)
    network = Ponita(3, scalars_out=1, hidden=8, layers=1, basis=8, orientations=6)
    task = PropertyTask(network, [1, 6, 8], mean=2.0, deviation=3.0)
    wide, narrow = data.columns(np.array([0, 1]), "gap", 6), data.columns(np.array([1]), "gap", 2)
    assert wide["mask"].sum(1).tolist() == [3, 2] and wide["numbers"][1].tolist() == [
        8,
        1,
        *[0] * 4,
    ]
    assert wide["value"][1] == data.targets[1, 4]
    assert torch.allclose(task.predict(wide)[1:], task.predict(narrow), atol=1e-5)
    loss = task(wide)
    error = (task.predict(wide) - wide["value"]).abs().sum()
    assert torch.isclose(loss["mae"].sum.double(), error, atol=1e-5)
    assert torch.isclose(loss["standardised"].sum.double(), error / 3, atol=1e-5)
    with pytest.raises(UserError, match="no target 'mass'"):
        data.columns(np.array([0]), "mass", 3)
