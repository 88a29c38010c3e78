"""The neighbour list against ASE's and against itself."""

import numpy as np
import pytest
import torch

from weightshare.equivariant import neighbour_list, neighbours, radius_edges
from weightshare.errors import UserError

ase_neighbours = pytest.importorskip("ase.neighborlist")


def as_set(receiver, sender, shift):
    rows = zip(receiver, sender, map(tuple, np.asarray(shift).tolist()), strict=True)
    found = [(int(a), int(b), s) for a, b, s in rows]
    assert len(found) == len(set(found))
    return set(found)


CELLS = {
    "cube": np.eye(3) * 4,
    "skewed": np.array([[3.0, 0.4, -1.1], [1.2, 4.1, 0.3], [-0.7, 1.9, 3.6]]),
    "flat": np.array([[6.0, 0, 0], [0, 6.0, 0], [1.5, 2.5, 1.2]]),
}


@pytest.mark.parametrize("brute", [10_000, 0])
@pytest.mark.parametrize("cutoff", [0.9, 2.7, 6.5])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_ase_where_the_cutoff_exceeds_the_cell_too(cell, pbc, cutoff, brute, monkeypatch):
    monkeypatch.setattr(neighbours, "BRUTE_FORCE", brute)
    box = CELLS[cell]
    places = np.random.default_rng(0).normal(size=(6, 3)) * 4
    wanted = ase_neighbours.primitive_neighbor_list("ijS", pbc, box, places, cutoff)
    edges, shifts = neighbour_list(
        torch.from_numpy(places), cutoff, torch.from_numpy(box), torch.tensor(pbc)
    )
    assert as_set(edges[1], edges[0], shifts) == as_set(*wanted)
    delta = torch.from_numpy(places)[edges[0]] - torch.from_numpy(places)[edges[1]]
    delta = delta + shifts.double() @ torch.from_numpy(box)
    assert (delta.norm(dim=1) < cutoff).all()
    assert (edges[1].diff() >= 0).all()


@pytest.mark.parametrize("dim", [2, 3])
def test_cells_and_brute_force_agree_on_batches(dim, monkeypatch):
    torch.manual_seed(0)
    points = torch.rand(300, dim) * 5
    batch = torch.randint(3, (300,)).sort().values
    found = []
    for limit in (10_000, 0):
        monkeypatch.setattr(neighbours, "BRUTE_FORCE", limit)
        edges = radius_edges(points, 1.0, batch)
        found.append(set(map(tuple, edges.T.tolist())))
        assert (batch[edges[0]] == batch[edges[1]]).all()
    assert found[0] == found[1] and len(found[0]) > 500
    assert all((b, a) in found[0] for a, b in found[0])


def test_one_atom_sees_its_own_images():
    edges, shifts = neighbour_list(torch.zeros(1, 3), 1.1, torch.eye(3))
    assert edges.shape == (2, 6) and edges.abs().max() == 0
    assert (shifts.abs().sum(1) == 1).all()


def test_zero_lattice_vectors_are_allowed_where_nothing_repeats():
    cell = torch.tensor([[2.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    along = torch.tensor([True, False, False])
    shifts = neighbour_list(torch.zeros(1, 3), 4.5, cell, along).shifts
    assert sorted(shifts[:, 0].tolist()) == [-2, -1, 1, 2]
    with pytest.raises(UserError, match="dependent"):
        neighbour_list(torch.zeros(1, 3), 1.0, cell, torch.tensor([True, True, False]))
    with pytest.raises(UserError, match="cutoff"):
        neighbour_list(torch.zeros(1, 3), 0.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cutoff": float("inf")}, "finite distance"),
        ({"cutoff": float("nan")}, "finite distance"),
        ({"positions": torch.full((1, 3), float("nan"))}, "not finite"),
        ({"cell": torch.eye(2)}, "lattice vectors"),
        ({"cell": torch.full((3, 3), float("nan"))}, "lattice vectors"),
        ({"cell": None, "pbc": torch.tensor([True] * 3)}, "lattice vectors"),
    ],
)
def test_what_cannot_be_searched_is_refused(given, said):
    whole = {"positions": torch.zeros(1, 3), "cutoff": 1.0, "cell": torch.eye(3)} | given
    with pytest.raises(UserError, match=said):
        neighbour_list(**whole)


def test_no_points_have_no_neighbours():
    assert neighbour_list(torch.zeros(0, 3), 1.0, torch.eye(3)).edges.shape == (2, 0)
    assert radius_edges(torch.zeros(0, 3), 1.0).shape == (2, 0)
