"""Functions on a grid as e3nn's irreducible representations."""

import pytest
import torch
from equivariant.clouds import close

from weightshare.equivariant import fibonacci, from_irreps, lift, platonic, to_irreps
from weightshare.errors import UserError

o3 = pytest.importorskip("e3nn.o3")


def test_going_there_and_back_is_the_identity_on_band_limited_functions():
    coefficients = torch.randn(4, 3, 9, dtype=torch.float64)
    grid = fibonacci(20)
    assert close(to_irreps(from_irreps(coefficients, grid), grid, 2), coefficients, 1e-10)


@pytest.mark.parametrize("l_max", [1, 2, 3])
def test_a_rotated_function_has_e3nns_rotated_coefficients(l_max):
    grid = fibonacci(40)
    irreps = o3.Irreps.spherical_harmonics(l_max)
    coefficients = torch.randn(1, irreps.dim, dtype=torch.float64)
    rotation = o3.rand_matrix(dtype=torch.float64)
    turned = from_irreps(coefficients, grid @ rotation)  # (R f)(o) = f(R^-1 o)
    wanted = coefficients @ irreps.D_from_matrix(rotation).T
    # e3nn keeps its rotation constants in single precision.
    assert close(to_irreps(turned, grid, l_max), wanted, 1e-5)


def test_a_lifted_vector_is_degree_one_in_the_order_x_y_z():
    v = torch.randn(2, 1, 3, dtype=torch.float64)
    grid = platonic(12)
    found = to_irreps(lift(grid, vectors=v), grid, 2)[:, 0]
    scale = (4 * torch.pi / 3) ** 0.5
    assert close(found[:, 1:4], scale * v[:, 0], 1e-10)
    assert found[:, 0].abs().max() < 1e-10 and found[:, 4:].abs().max() < 1e-10


def test_too_few_orientations_are_refused():
    with pytest.raises(UserError, match="cannot tell"):
        to_irreps(torch.randn(6, 1), platonic(6).float(), 2)
    with pytest.raises(UserError, match="no whole set"):
        from_irreps(torch.randn(1, 5), platonic(6).float())
