"""Forces and stress are the derivatives they claim to be; the calculator speaks ASE."""

import weakref

import numpy as np
import pytest
import torch
from equivariant.clouds import close

from weightshare.equivariant import (
    PonitaPotential,
    convolution,
    hessian,
    neighbour_list,
    platonic,
    spread_rotations,
    symmetrise,
)
from weightshare.errors import UserError

SMALL = {"hidden": 8, "layers": 2, "basis": 8, "widening": 2, "orientations": 6}
MODES = ("reference", "smooth", "complete")
NUMBERS = torch.tensor([6, 1, 8, 1, 1])


def potential(**options):
    torch.manual_seed(options.pop("seed", 0))
    return PonitaPotential([1, 6, 8], scale=0.7, **(SMALL | options)).double()


def molecule(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return 1.3 * torch.randn(5, 3, generator=draw, dtype=torch.float64)


def slope(model, numbers, x, step=1e-5, **options):
    """Minus the central difference of the energy, coordinate by coordinate."""
    found = torch.zeros_like(x)
    for i in range(x.numel()):
        for sign in (1, -1):
            y = x.flatten().clone()
            y[i] += sign * step
            energy = model(numbers, y.view_as(x), forces=False, **options).energy.sum()
            found.view(-1)[i] -= sign * energy / (2 * step)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("convolution", ["separable", "full"])
@pytest.mark.parametrize("cutoff", [None, 2.5])
def test_forces_are_minus_the_gradient(mode, convolution, cutoff):
    model = potential(invariants=mode, convolution=convolution, cutoff=cutoff)
    x = molecule()
    found = model(NUMBERS, x)
    assert close(found.forces, slope(model, NUMBERS, x), 1e-7)
    assert found.forces.sum(0).abs().max() < 1e-12
    assert found.energy.dtype == torch.float64 and not found.energy.requires_grad


def test_forces_on_a_grid_axis_are_right_in_smooth_mode_and_jump_in_reference_mode():
    axis = platonic(6)[0]
    numbers = torch.tensor([6, 8])
    jumps = {}
    for mode in ("smooth", "reference"):
        model = potential(invariants=mode)

        def pull(sideways, model=model):
            x = torch.stack([torch.zeros(3, dtype=torch.float64), 1.1 * axis])
            x[1, 1] += sideways
            return model(numbers, x).forces

        if mode == "smooth":
            x = torch.stack([torch.zeros(3, dtype=torch.float64), 1.1 * axis])
            assert close(pull(0.0), slope(model, numbers, x), 1e-7)
        jumps[mode] = float((pull(1e-6) - pull(-1e-6)).abs().max())
    assert jumps["smooth"] < 1e-5 < jumps["reference"] / 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cutoff", [None, 2.5])
@pytest.mark.parametrize("convolution", ["separable", "full"])
def test_second_derivatives_with_self_loops_and_cutoff(mode, cutoff, convolution):
    model = potential(
        invariants=mode, cutoff=cutoff, convolution=convolution, layers=1, hidden=4, basis=4,
        chiral=mode == "complete" and convolution == "full",
    )  # fmt: skip
    x = molecule()[:3].requires_grad_()

    def energy(x):
        return model(NUMBERS[:3], x, create_graph=True).energy

    assert torch.autograd.gradgradcheck(energy, (x,))
    second = hessian(model, NUMBERS[:3], x)
    assert torch.isfinite(second).all() and close(second, second.mT, 1e-9)


@pytest.mark.parametrize("pairs", [8192, 7])
def test_a_recomputed_basis_gives_the_same_forces_and_second_derivatives(pairs, monkeypatch):
    monkeypatch.setattr(convolution, "PAIRS_AT_ONCE", pairs)
    x = molecule()
    found = []
    for recompute in (None, "messages", "basis"):
        model = potential(recompute=recompute, cutoff=3.0)
        said = model(NUMBERS, x, create_graph=True)
        grads = torch.autograd.grad(said.forces.square().sum(), list(model.parameters()),
                                    allow_unused=True)  # fmt: skip
        found.append([said.energy, said.forces, *(g for g in grads if g is not None)])
    for other in found[1:]:
        assert all(close(a, b) for a, b in zip(other, found[0], strict=True))


def bytes_kept(recompute):
    """What the graph of energies and forces holds until the loss is differentiated."""

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor

    alive = weakref.WeakSet()

    def pack(tensor):
        box = Box(tensor)
        alive.add(box)
        return box

    model = potential(recompute=recompute, layers=3, hidden=16, basis=128, widening=1)
    numbers, x = NUMBERS.repeat(4, 1), torch.stack([molecule(k) for k in range(4)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        said = model(numbers, x, create_graph=True)
    storages = {b.tensor.untyped_storage().data_ptr(): b.tensor.untyped_storage() for b in alive}
    assert said.forces.grad_fn is not None
    return sum(storage.nbytes() for storage in storages.values())


def test_recomputing_keeps_a_fraction_of_the_memory_through_the_double_backward():
    assert bytes_kept("basis") < 0.35 * bytes_kept(None)
    assert bytes_kept("basis") < bytes_kept("messages") < 0.9 * bytes_kept(None)


@pytest.mark.parametrize("recompute", ["messages", "basis"])
def test_recomputed_second_derivatives_pass_gradgradcheck(recompute):
    model = potential(recompute=recompute, cutoff=2.5, layers=1, hidden=3, basis=3)
    x = molecule()[:2].requires_grad_()
    weight = model.network.functions.spatial.first.weight

    def energy(x, weight):
        return model(NUMBERS[:2], x, create_graph=True).energy

    assert torch.autograd.gradgradcheck(energy, (x, weight))


CELL = torch.tensor([[3.0, 0.2, -0.3], [0.4, 2.8, 0.1], [-0.2, 0.5, 3.1]], dtype=torch.float64)


def test_stress_is_the_strain_derivative_in_a_cell_with_many_images():
    model = potential(cutoff=4.0)
    x = molecule()
    edges, shifts = neighbour_list(x, 4.0, CELL)
    assert edges.shape[1] > 20 * len(x)
    found = model(NUMBERS, x, cell=CELL, stress=True)
    assert close(found.stress[0], found.stress[0].mT, 1e-10)
    wanted = torch.zeros(3, 3, dtype=torch.float64)
    step = 1e-5
    for i in range(3):
        for j in range(3):
            for sign in (1, -1):
                strain = torch.eye(3, dtype=torch.float64)
                strain[i, j] += sign * step / 2
                strain[j, i] += sign * step / 2
                energy = model(NUMBERS, x @ strain, edges=edges, shifts=shifts,
                               cell=CELL @ strain, forces=False).energy  # fmt: skip
                wanted[i, j] += sign * energy.item() / (2 * step)
    wanted /= torch.linalg.det(CELL).abs()
    assert close(found.stress[0], wanted, 1e-6)
    assert close(found.forces, slope(model, NUMBERS, x, cell=CELL), 1e-6)


def test_a_supercell_has_the_energy_per_atom_forces_and_stress_of_its_cell():
    model = potential(cutoff=3.5)
    x = molecule()
    once = model(NUMBERS, x, cell=CELL, stress=True)
    twice = model(
        NUMBERS.repeat(2),
        torch.cat([x, x + CELL[0]]),
        cell=torch.cat([2 * CELL[:1], CELL[1:]]),
        stress=True,
    )
    assert close(twice.energy, 2 * once.energy)
    assert close(twice.forces, once.forces.repeat(2, 1)) and close(twice.stress, once.stress)
    # An atom may stand in any image of the cell.
    steps = torch.tensor([[3.0], [0], [-2], [1], [0]], dtype=torch.float64)
    moved = model(NUMBERS, x + steps @ CELL[:1], cell=CELL)
    assert close(moved.forces, once.forces)


def test_structures_one_by_one_and_together_agree():
    from weightshare.equivariant.structures import Structure, collate

    model = potential(cutoff=3.0).float()
    frames = [
        Structure(NUMBERS.numpy(), molecule(1).numpy(), cell=CELL.numpy(), pbc=(True,) * 3),
        Structure(NUMBERS[:2].numpy(), molecule(2)[:2].numpy()),
        Structure(NUMBERS[:4].numpy(), molecule(3)[:4].numpy(), cell=CELL.numpy(),
                  pbc=(True, False, True)),
    ]  # fmt: skip
    batch = collate(frames, 3.0)
    keys = ("edges", "shifts", "cell", "batch")
    options = {k: batch[k] for k in keys}
    both = model(batch["numbers"], batch["positions"], **options, graphs=3, stress=True)
    for k, frame in enumerate(frames):
        cell = None if frame.cell is None else torch.from_numpy(frame.cell).float()
        x = torch.from_numpy(frame.positions).float()
        alone = model(torch.from_numpy(frame.numbers), x, cell=cell, pbc=torch.tensor(frame.pbc))
        assert close(both.energy[k : k + 1], alone.energy, 1e-5)
        assert close(both.forces[batch["batch"] == k], alone.forces, 1e-4)


def test_padding_and_stacking_agree_with_a_molecule_alone():
    model = potential()
    x = molecule()
    alone = model(NUMBERS, x)
    numbers = torch.cat([NUMBERS, torch.zeros(2, dtype=torch.int64)])[None]
    padded = torch.cat([x, torch.full((2, 3), float("nan"), dtype=torch.float64)])[None]
    found = model(numbers, padded, mask=numbers > 0)
    assert close(found.energy, alone.energy) and close(found.forces[0, :5], alone.forces)
    assert found.forces[0, 5:].abs().max() == 0


def test_references_are_fitted_and_kept_in_double_precision():
    model = potential().float()
    numbers = torch.tensor([[6, 1, 1, 1, 1], [8, 1, 1, 6, 6], [6, 6, 8, 8, 1]])
    truth = torch.tensor([-13.6, -1029.123456, -2042.654321], dtype=torch.float64)
    counts = model.compositions(numbers)
    model.fit_references(counts, counts.double() @ truth)
    assert close(model.references, truth, 1e-12) and model.references.dtype == torch.float64
    assert model.double().float().references.dtype == torch.float64


def test_symmetrising_lowers_the_spread_over_rotations_and_keeps_forces_exact():
    model = potential(orientations=4)
    x = molecule()
    turns = spread_rotations(12)[1:].double()

    def spread():
        return torch.cat([model(NUMBERS, x @ t.T).energy for t in turns]).std()

    before = spread()
    model.network = symmetrise(model.network, 16)
    assert spread() < before / 3
    assert close(model(NUMBERS, x).forces, slope(model, NUMBERS, x), 1e-7)


def test_saving_and_loading_keeps_every_bit(tmp_path):
    model = potential(cutoff=3.0, seed=5).float()
    model.save(tmp_path / "p.safetensors")
    torch.manual_seed(77)
    back = PonitaPotential.load(tmp_path / "p.safetensors")
    x = molecule().float()
    assert torch.equal(model(NUMBERS, x).energy, back(NUMBERS, x).energy)
    assert torch.equal(model(NUMBERS, x).forces, back(NUMBERS, x).forces)
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="no saved potential"):
        PonitaPotential.load(tmp_path / "other.safetensors")


def test_what_was_never_seen_is_refused():
    model, x = potential(cutoff=None), molecule()
    with pytest.raises(UserError, match=r"never seen \[7\]"):
        model(torch.tensor([6, 1, 7, 1, 1]), x)
    with pytest.raises(UserError, match="need a cutoff"):
        model(NUMBERS, x, cell=CELL)
    with pytest.raises(UserError, match="needs a cell"):
        model(NUMBERS, x, stress=True)
    with pytest.raises(UserError, match="numbers have shape"):
        model(NUMBERS[:3], x)
    with pytest.raises(UserError, match="not finite"):
        model(NUMBERS, x * float("nan"))
    with pytest.raises(UserError, match=r"never seen \[0\]"):  # 0 is padding, where a mask says so
        model(torch.tensor([6, 1, 0, 1, 1]), x)
    with pytest.raises(UserError, match="whole atomic number"):
        model(NUMBERS.double(), x)
    with torch.inference_mode(), pytest.raises(UserError, match="inference_mode"):
        model(NUMBERS, x)
    flat = torch.diag(torch.tensor([3.0, 3.0, 0.0], dtype=torch.float64))
    along = torch.tensor([True, True, False])
    with pytest.raises(UserError, match="with a volume"):
        potential(cutoff=2.0)(NUMBERS, x, cell=flat, pbc=along, stress=True)
    with pytest.raises(UserError, match="scale"):
        PonitaPotential([1], scale=0.0)
    for bad in ([], [0], [119]):
        with pytest.raises(UserError, match="species"):
            PonitaPotential(bad)


ase = pytest.importorskip("ase")


def test_the_calculator_gives_ase_energy_forces_and_stress():
    from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

    from weightshare.equivariant import PonitaCalculator

    model = potential(cutoff=3.0)
    atoms = ase.Atoms(NUMBERS.numpy(), molecule().numpy(), cell=CELL.numpy(), pbc=True)
    atoms.calc = PonitaCalculator(model)
    assert np.allclose(atoms.get_forces(), calculate_numerical_forces(atoms, 1e-4), atol=1e-7)
    assert np.allclose(atoms.get_stress(), calculate_numerical_stress(atoms, 1e-5), atol=1e-7)
    assert atoms.get_potential_energy() == atoms.get_potential_energy(force_consistent=True)
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy())
    assert model.network.grid.dtype == torch.float64 and model.training


def test_geometry_optimisation_and_dynamics_run_on_the_calculator():
    from ase import units
    from ase.md.verlet import VelocityVerlet
    from ase.optimize import BFGS

    from weightshare.equivariant import PonitaCalculator

    atoms = ase.Atoms(NUMBERS.numpy(), molecule().numpy())
    atoms.calc = PonitaCalculator(potential(cutoff=3.0), rotations=2)
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=0.01, steps=20)
    assert atoms.get_potential_energy() < before
    atoms.set_momenta(np.random.default_rng(0).normal(size=(5, 3)) * (50 * units.kB) ** 0.5)
    start = atoms.get_total_energy()
    VelocityVerlet(atoms, 0.1 * units.fs).run(20)
    assert abs(atoms.get_total_energy() - start) < 1e-3 * max(atoms.get_kinetic_energy(), 0.01)


@pytest.mark.parametrize(("place", "pbc"), [(0.0, False), (4.0, True)])
def test_the_calculator_refuses_coinciding_atoms(place, pbc):
    from weightshare.equivariant import PonitaCalculator

    atoms = ase.Atoms("CO", [[0, 0, 0], [0, 0, place]], cell=[4, 4, 4], pbc=pbc)
    atoms.calc = PonitaCalculator(potential(cutoff=3.0))
    with pytest.raises(UserError, match="one place"):
        atoms.get_potential_energy()


def test_a_symmetrised_potential_is_calculated_with_and_not_saved(tmp_path):
    from weightshare.equivariant import PonitaCalculator

    model = potential()
    atoms = ase.Atoms(NUMBERS.numpy(), molecule().numpy())
    atoms.calc = PonitaCalculator(model, rotations=3)
    wanted = atoms.get_potential_energy()
    model.network = symmetrise(model.network, 3)
    atoms.calc = PonitaCalculator(model)
    assert atoms.get_potential_energy() == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(UserError, match="before it is symmetrised"):
        model.save(tmp_path / "p.safetensors")
    for options, said in (
        ({"dtype": "float16"}, "float64 or float32"),
        ({"rotations": 0}, "0 rotations"),
        ({"device": "abacus"}, "abacus"),
    ):
        with pytest.raises(UserError, match=said):
            PonitaCalculator(potential(), **options)
