"""Invariants: equal on an orbit, different off it where they claim to be complete."""

import pytest
import torch
from equivariant.clouds import close

from weightshare.equivariant import (
    fibre_invariants,
    full_invariants,
    random_rotations,
    rotation_group,
    spatial_invariants,
    window,
)
from weightshare.equivariant.basis import KernelBasis, exponents, fold_duplicates, monomials

MODES = ("reference", "smooth", "complete")
X, Y, Z = torch.eye(3, dtype=torch.float64)


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [2, 3])
def test_invariants_are_equal_on_an_orbit(mode, dim):
    torch.manual_seed(0)
    grid, delta = unit(5, dim), torch.randn(4, dim, dtype=torch.float64)
    turn = random_rotations(1, dim)[0].double()
    turn = torch.linalg.qr(turn)[0]
    turn = turn * torch.linalg.det(turn).sign() if dim == 3 else turn
    if dim == 2 and torch.linalg.det(turn) < 0:
        turn = turn[[1, 0]]
    for chiral in (False, True):
        before = full_invariants(delta, grid, mode, chiral)
        after = full_invariants(delta @ turn.T, grid @ turn.T, mode, chiral)
        assert close(after, before, 1e-12)
    moved = spatial_invariants(delta @ turn.T, grid @ turn.T, mode)
    assert close(moved, spatial_invariants(delta, grid, mode), 1e-12)


def test_the_published_three_invariants_confuse_what_four_tell_apart():
    """Seen along Δ or across it: the receiver's orientation at a right angle to the sender's."""
    grid = torch.stack([Z, X, Y])
    for mode in ("reference", "smooth"):
        found = full_invariants(X, grid, mode)
        assert torch.equal(found[0, 1], found[0, 2])
    found = full_invariants(X, grid, "complete")
    assert (found[0, 1] - found[0, 2]).abs().max() == 1


def test_on_the_circle_only_the_sine_tells_left_from_right():
    angle = torch.tensor([0.0, 0.7, -0.7], dtype=torch.float64)
    grid = torch.stack([angle.cos(), angle.sin()], -1)
    cosine, both = fibre_invariants(grid, "smooth"), fibre_invariants(grid, "complete")
    assert torch.equal(cosine[0, 1], cosine[0, 2])
    assert not torch.allclose(both[0, 1], both[0, 2], atol=0.1)


def test_the_determinant_alone_sees_the_mirror():
    torch.manual_seed(0)
    grid, delta = unit(2, 3), torch.randn(3, dtype=torch.float64)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    before = full_invariants(delta, grid, "complete", chiral=True)
    after = full_invariants(delta @ mirror, grid @ mirror, "complete", chiral=True)
    assert close(after[..., :4], before[..., :4], 1e-12)
    assert close(after[0, 1, 4:], -before[0, 1, 4:], 1e-12) and before[0, 1, 4].abs() > 1e-3
    assert before[0, 0, 4].abs() < 1e-12  # equal orientations are coplanar with anything
    wanted = torch.linalg.det(torch.stack([delta, grid[1], grid[0]]))
    assert close(before[0, 1, 4], wanted, 1e-12)


def test_four_numbers_complete_the_orbits_of_pairs():
    """Two triples with equal Gram matrices differ by an orthogonal map: it is built here."""
    torch.manual_seed(1)
    grid, delta = unit(2, 3), torch.randn(3, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    other_grid, other = grid @ rotation.T, rotation @ delta
    a = full_invariants(delta, grid, "complete")[0, 1]
    b = full_invariants(other, other_grid, "complete")[0, 1]
    assert close(a, b, 1e-12)
    first, second = torch.stack([delta, *grid]), torch.stack([other, *other_grid])
    found = torch.linalg.solve(first, second).T
    assert close(found @ found.T, torch.eye(3, dtype=torch.float64), 1e-9)


def test_a_bond_a_thousandth_off_the_axis_keeps_its_distance_in_single_precision():
    delta = torch.tensor([1e-3, 0.0, 2.0])
    across = spatial_invariants(delta, Z.float()[None], "smooth")[0, 1]
    assert across == pytest.approx(1e-6, rel=1e-4)


def test_rotations_as_a_grid_see_all_of_the_relative_pose():
    group = rotation_group("tetrahedron")
    delta = torch.randn(3, dtype=torch.float64)
    found = full_invariants(delta, group, "smooth")
    assert found.shape == (12, 12, 12)
    turn = group[5]
    moved = full_invariants(turn @ delta, turn @ group, "smooth")
    assert close(moved, found, 1e-12)
    flat = found.reshape(144, 12)
    assert torch.cdist(flat, flat).add(10 * torch.eye(144)).min() > 1e-3


def test_the_window_and_two_derivatives_vanish_at_the_cutoff():
    r = torch.tensor([0.0, 0.5, 1.999999, 2.0, 2.5], dtype=torch.float64, requires_grad=True)
    delta = torch.stack([r, torch.zeros_like(r)], -1)
    u = window(delta, 2.0)
    (first,) = torch.autograd.grad(u.sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    assert u[0] == 1 and u[3] == u[4] == 0
    for value in (u, first, second):
        assert torch.isfinite(value).all() and value[2:].abs().max() < 1e-4
    t = 0.25
    assert u[1].item() == pytest.approx(1 - 28 * t**6 + 48 * t**7 - 21 * t**8, abs=1e-12)


@pytest.mark.parametrize(("inputs", "distinct", "ordered"), [(1, 3, 3), (2, 9, 14), (4, 34, 84),
                                                             (5, 55, 155)])  # fmt: skip
def test_distinct_monomials_with_folded_columns_are_the_published_features(
    inputs, distinct, ordered
):
    torch.manual_seed(0)
    x = torch.randn(7, inputs, dtype=torch.float64)
    features = [x]
    for _ in range(2):
        features.append(torch.einsum("...i,...j->...ij", features[-1], x).flatten(-2))
    repeated = torch.cat(features, -1)
    weight = torch.randn(6, ordered, dtype=torch.float64)
    assert repeated.shape[1] == ordered and len(exponents(inputs, 3)) == distinct
    folded = fold_duplicates(weight, inputs, 3)
    assert close(monomials(x, 3) @ folded.T, repeated @ weight.T, 1e-12)
    assert KernelBasis(inputs, 4, 5, 3)(x.float()).shape == (7, 5)
