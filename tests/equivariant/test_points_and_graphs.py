"""Clouds of bonds, PyTorch Geometric's conventions, and the loaders."""

import csv

import numpy as np
import pytest
import torch
from equivariant.clouds import close, cloud, network

from weightshare.equivariant import (
    Ponita,
    PonitaPoints,
    lift,
    lift_bonds,
    load_qm9,
    random_rotations,
)
from weightshare.equivariant.qm9 import TARGETS
from weightshare.errors import UserError

BONDS = torch.tensor([[0, 1, 1, 2, 2, 3, 0, 2], [1, 0, 2, 1, 3, 2, 2, 0]])


@pytest.mark.parametrize("build", [Ponita, PonitaPoints])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scalars": 0}, "input"),
        ({"hidden": 0}, "1 or more"),
        ({"invariants": "exact"}, "'exact'"),
        ({"level": "atom"}, "'atom'"),
        ({"chiral": True}, "complete invariants"),
    ],
)
def test_both_networks_refuse_the_same_options(build, wrong, message):
    with pytest.raises(UserError, match=message):
        build(**({"scalars": 1, "scalars_out": 1, "hidden": 4, "basis": 4} | wrong))


def test_bonds_become_points_that_hear_each_other_as_their_atoms_do():
    x = cloud(5)[0]
    lifted = lift_bonds(x, torch.cat([BONDS, torch.tensor([[4], [4]])], 1))
    assert lifted.atom.tolist() == BONDS[1].tolist()
    assert close(lifted.orientation.norm(dim=1), torch.ones(8, dtype=torch.float64), 1e-12)
    gap = x[BONDS[0]] - x[BONDS[1]]
    assert close(torch.linalg.cross(lifted.orientation, gap), 0 * gap, 1e-12)
    bonded = {*map(tuple, BONDS.T.tolist()), *((i, i) for i in range(5))}
    atoms = lifted.atom.tolist()
    wanted = {(a, b) for a in range(8) for b in range(8) if (atoms[a], atoms[b]) in bonded}
    found = list(map(tuple, lifted.edges.T.tolist()))
    assert len(found) == len(set(found)) and set(found) == wanted
    degree = torch.bincount(lifted.atom, minlength=5)
    assert len(found) == sum(int(degree[a] * degree[b]) for a, b in bonded)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(
    ("mode", "chiral"),
    [("reference", False), ("smooth", False), ("complete", False), ("complete", True)],
)
def test_a_cloud_of_bonds_commutes_with_every_rotation_exactly(mode, chiral, mean):
    torch.manual_seed(0)
    model = PonitaPoints(
        2, 1, scalars_out=1, vectors_out=1, hidden=8, layers=2, basis=8, level="node",
        invariants=mode, chiral=chiral, mean=mean,
    ).double()  # fmt: skip
    x, s, v = cloud(5)
    before = model(x, s, v, edges=BONDS)
    turn = torch.linalg.qr(random_rotations(1)[0].double())[0]
    turn = turn * torch.linalg.det(turn)
    after = model(x @ turn.T + 3, s, v @ turn.T, edges=BONDS)
    assert close(after.scalars, before.scalars) and close(after.vectors, before.vectors @ turn.T)
    assert before.scalars[4].abs() == 0  # no bonds, nothing to say
    mirror = -torch.eye(3, dtype=torch.float64)
    mirrored = model(x @ mirror, s, v @ mirror, edges=BONDS)
    assert close(mirrored.scalars, before.scalars, 1e-9) != chiral


def test_a_bond_without_length_is_refused():
    with pytest.raises(UserError, match="no direction"):
        lift_bonds(torch.zeros(4, 3), BONDS)


def test_a_cloud_refuses_no_edges_and_handedness_in_the_plane():
    options = {"scalars_out": 1, "hidden": 8, "layers": 1, "basis": 8, "invariants": "complete"}
    x, s, _ = (t.float() for t in cloud(4, 2))
    with pytest.raises(UserError, match="edges is None"):
        PonitaPoints(2, **options)(x, s, edges=None)
    with pytest.raises(UserError, match="2 dimensions"):
        PonitaPoints(2, chiral=True, **options)(x, s, edges=BONDS)


geometric = pytest.importorskip("torch_geometric")


def graphs():
    from torch_geometric.data import Batch, Data

    found = []
    for seed, n in ((0, 4), (1, 6)):
        x, s, v = cloud(n, seed=seed)
        ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
        found.append(Data(x=s, pos=x, vectors=v, edge_index=torch.cat([ring, ring.flip(0)], 1)))
    return found, Batch.from_data_list(found)


@pytest.mark.parametrize("fully_connected", [False, True])
def test_graphs_of_pytorch_geometric_go_in_and_stay_as_they_were(fully_connected):
    from weightshare.equivariant import PonitaGraph

    single, batch = graphs()
    model = PonitaGraph(network(), fully_connected=fully_connected)
    before = {name: value.clone() for name, value in batch.to_dict().items()
              if isinstance(value, torch.Tensor)}  # fmt: skip
    found = model(batch)
    assert found.scalars.shape == (2, 2)
    for k, one in enumerate(single):
        assert close(model(one).scalars[0], found.scalars[k])
    assert close(model(batch).scalars, found.scalars, 0)
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    # Row 0 sends, row 1 receives: an edge into a point changes that point alone.
    if not fully_connected:
        model.network.level = "node"
        one = single[0].clone()
        plain = model(one).scalars
        one.edge_index = torch.cat([one.edge_index, torch.tensor([[0], [2]])], 1)
        first = network(level="node", layers=1)
        changed = (
            first(one.pos, one.x, one.vectors, edges=one.edge_index).scalars
            - first(one.pos, one.x, one.vectors, edges=one.edge_index[:, :-1]).scalars
        ).abs().amax(1) > 0  # fmt: skip
        assert changed.tolist() == [False, False, True, False]
        assert not close(model(one).scalars, plain, 1e-6)


def test_a_plain_graph_may_carry_a_batch_in_any_order():
    from torch_geometric.data import Data

    from weightshare.equivariant import PonitaGraph, RadiusEdges, RandomRotation

    _, batch = graphs()
    order = torch.tensor([3, 6, 0, 9, 4, 1, 7, 5, 2, 8])
    mixed = Data(x=batch.x[order], pos=batch.pos[order], vectors=batch.vectors[order])
    mixed.batch = batch.batch[order]
    model = PonitaGraph(network(), fully_connected=True)
    assert close(model(mixed).scalars, model(batch).scalars)
    moved = RandomRotation(["pos"])(mixed).pos
    for k in (0, 1):  # one rotation each
        assert close(torch.pdist(moved[mixed.batch == k]), torch.pdist(mixed.pos[mixed.batch == k]))
    for step in (RandomRotation(), RadiusEdges(1.0), model):
        with pytest.raises(UserError, match="no positions"):
            step(Data(x=batch.x))


def test_the_layer_is_the_convolution_of_the_network():
    from weightshare.equivariant import PonitaConv

    model, (_, batch) = network(orientations=16, cutoff=2.0), graphs()
    layer = PonitaConv(8, 16, hidden=8, basis=8, cutoff=2.0).double()
    layer.functions.load_state_dict(model.functions.state_dict())
    layer.conv.load_state_dict(model.blocks[0].conv.state_dict())
    field = model.embed(lift(layer.grid, batch.x, batch.vectors))
    heard = []
    model.blocks[0].conv.register_forward_hook(lambda module, given, found: heard.append(found))
    model(batch.pos, batch.x, batch.vectors, edges=batch.edge_index, batch=batch.batch)
    assert close(layer(field, batch.pos, batch.edge_index), heard[0])
    with pytest.raises(UserError, match="x has shape"):
        layer(field[:, 1:], batch.pos, batch.edge_index)


def test_a_cloud_of_all_bonds_is_asked_for_by_a_word():
    from weightshare.equivariant import PonitaGraph

    model = PonitaPoints(2, 1, scalars_out=1, hidden=8, layers=1, basis=8).double()
    _, batch = graphs()
    same = (batch.batch[:, None] == batch.batch) & ~torch.eye(10, dtype=torch.bool)
    said = model(batch.pos, batch.x, batch.vectors, edges=same.nonzero().T, batch=batch.batch)
    assert close(PonitaGraph(model, fully_connected=True)(batch).scalars, said.scalars)
    with pytest.raises(UserError, match="'all'"):
        model(batch.pos, batch.x, batch.vectors, edges="all")


def test_transforms_work_on_todays_version_and_copy():
    from weightshare.equivariant import RadiusEdges, RandomRotation

    single, batch = graphs()
    turn = RandomRotation(("pos", "vectors"))
    for data in (single[0], batch):
        kept = data.pos.clone()
        moved = turn(data)
        assert torch.equal(data.pos, kept) and not close(moved.pos, kept, 1e-3)
        norms = torch.linalg.vecdot(moved.pos, moved.vectors[:, 0])
        assert close(norms, torch.linalg.vecdot(data.pos, data.vectors[:, 0]), 1e-5)
    near = RadiusEdges(1.5)(batch)
    edges = near.edge_index
    assert (batch.batch[edges[0]] == batch.batch[edges[1]]).all()
    assert (batch.pos[edges[0]] - batch.pos[edges[1]]).norm(dim=1).max() < 1.5


HEADER = [
    "XYZ_file", "Index", "SMILES", "InChi", "N_atoms", "Stoichiometry", "Elements", "XYZ_Ang",
    "Mulliken_pop", "Harmonic_Freq_cmi", "RotA_GHz", "RotB_GHz", "RotC_GHz",
    *(column for column, _ in TARGETS.values()),
]  # fmt: skip


def test_qm9_rows_become_molecules_with_atomisation_energies(tmp_path):
    methane = [[-0.0127, 1.0858, 8.0e-7], [0.0022, -0.006, 0.002], [1.0117, 1.4638, 0.0003],
               [-0.5408, 1.4475, -0.8766], [-0.5238, 1.4379, 0.9064]]  # fmt: skip
    numbers = dict.fromkeys(TARGETS, "0.5") | {"u0": "-40.47893", "homo": "-0.3877",
                                                   "cv": "6.469"}  # fmt: skip
    for part in (1, 2):
        with (tmp_path / f"qm9_part{part}.csv").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(HEADER)
            for index in (1, 2):
                out.writerow(
                    ["dsgdb9nsd_000001.xyz", 2 * (part - 1) + index, "C", "InChI=1S/CH4", 5,
                     "[4,1,0,0,0]", "['C','H','H','H','H']", str(methane), "[]", "[]", 1, 1, 1,
                     *numbers.values()]
                )  # fmt: skip
    data = load_qm9(tmp_path)
    assert len(data) == 4 and data.index.tolist() == [1, 2, 3, 4]
    z, x, y = data.molecule(2)
    assert z.tolist() == [6, 1, 1, 1, 1] and np.allclose(x, methane)
    by_name = dict(zip(TARGETS, y, strict=True))
    assert by_name["u0"] == pytest.approx(-17.1722, abs=2e-4)
    assert by_name["homo"] == pytest.approx(-10.5499, abs=1e-4) and by_name["cv"] == 6.469
    with pytest.raises(UserError, match="130,831"):
        data.split()
    with pytest.raises(UserError, match=r"qm9_part"):
        load_qm9(tmp_path / "empty")
