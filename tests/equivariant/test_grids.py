"""Grids: designs, best packings, their symmetry groups, quadrature."""

import math

import pytest
import torch

from weightshare.equivariant import grids
from weightshare.errors import UserError


def smallest_angle(grid):
    cosines = (grid @ grid.T).clamp(-1, 1)
    cosines.fill_diagonal_(-1)
    return math.degrees(math.acos(float(cosines.max())))


def moment(grid, power, axis):
    return float((grid @ axis).pow(power).mean())


@pytest.mark.parametrize(("n", "degree"), [(4, 2), (6, 3), (8, 3), (12, 5), (20, 5)])
def test_platonic_grids_integrate_polynomials_of_their_degree_exactly_and_no_more(n, degree):
    grid = grids.platonic(n)
    assert len(grid) == n == len(grid.unique(dim=0))
    axes = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=-1)
    exact = {p: 1 / (p + 1) if p % 2 == 0 else 0.0 for p in range(1, 7)}
    for p in range(1, degree + 1):
        assert max(abs(moment(grid, p, a) - exact[p]) for a in axes) < 1e-12
    assert max(abs(moment(grid, degree + 1, a) - exact[degree + 1]) for a in axes) > 1e-3


@pytest.mark.parametrize(
    ("grid", "rotations", "all_of_them"),
    [
        (grids.platonic(4), 12, 24),
        (grids.platonic(6), 24, 48),
        (grids.platonic(8), 24, 48),
        (grids.platonic(12), 60, 120),
        (grids.platonic(20), 60, 120),
        (grids.circle(7), 7, 14),
    ],
)
def test_symmetry_groups_have_their_order_and_are_groups(grid, rotations, all_of_them):
    group = grids.symmetries(grid)
    assert len(group) == rotations
    assert len(grids.symmetries(grid, reflections=True)) == all_of_them
    products = (group[:, None] @ group[None]).flatten(0, 1)
    nearest = torch.cdist(products.flatten(1), group.flatten(1)).min(1).values
    assert nearest.max() < 1e-6  # cdist rounds at the square root of the machine precision


def test_a_planar_grid_has_infinitely_many_symmetries_and_is_refused():
    flat = torch.cat([grids.circle(5), torch.zeros(5, 1, dtype=torch.float64)], 1)
    with pytest.raises(UserError, match="span"):
        grids.symmetries(flat[:2])


@pytest.mark.parametrize(("n", "angle"), [(4, 109.47), (6, 90.0), (12, 63.43)])
def test_repulsion_at_rest_finds_the_best_packings(n, angle):
    assert smallest_angle(grids.repulsion(n)) == pytest.approx(angle, abs=0.02)


def test_repulsion_stays_converged_where_the_published_one_stops():
    grid = grids.repulsion(64, seed=3).requires_grad_()
    energy = torch.pdist(torch.nn.functional.normalize(grid, dim=-1)).pow(-2).sum()
    (slope,) = torch.autograd.grad(energy, grid)
    assert slope.norm() / energy < 1e-5
    assert smallest_angle(grid.detach()) > 22.0 > smallest_angle(grids.fibonacci(64)) - 1


@pytest.mark.parametrize("grid", [grids.platonic(12), grids.circle(9), grids.fibonacci(17)])
def test_quadrature_weights_sum_to_one_and_are_even_on_regular_grids(grid):
    weights = grids.quadrature_weights(grid)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    even = torch.full_like(weights, 1 / len(grid))
    assert torch.allclose(weights, even, atol=1e-9) == (len(grid) != 17)


def test_quadrature_integrates_a_fibonacci_grid_better_than_equal_weights():
    grid = grids.fibonacci(16)
    square = torch.einsum("nd,ne->nde", grid, grid)
    third = torch.eye(3, dtype=torch.float64) / 3
    equal = (square.mean(0) - third).abs().max()
    voronoi = ((grids.quadrature_weights(grid)[:, None, None] * square).sum(0) - third).abs().max()
    assert voronoi < equal and equal > 1e-2


@pytest.mark.parametrize("dim", [2, 3])
def test_random_rotations_are_rotations_without_a_favourite(dim):
    found = grids.random_rotations(4000, dim, torch.Generator().manual_seed(0))
    assert torch.allclose(found @ found.mT, torch.eye(dim, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(
        torch.linalg.det(found), torch.ones(4000, dtype=torch.float64), atol=1e-14
    )
    assert found.mean(0).abs().max() < 0.05


@pytest.mark.parametrize(("name", "order"), [("tetrahedron", 12), ("octahedron", 24)])
def test_rotation_groups(name, order):
    assert len(grids.rotation_group(name)) == order
    with pytest.raises(UserError, match="cub"):
        grids.rotation_group("cub")


def test_impossible_grids_are_refused_in_a_sentence():
    for bad in (
        lambda: grids.make_grid(0),
        lambda: grids.make_grid(4, 5),
        lambda: grids.platonic(7),
    ):
        with pytest.raises(UserError):
            bad()
