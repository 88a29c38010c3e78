"""Between functions on an orientation grid and e3nn's irreducible representations."""

import torch
from torch import Tensor

from weightshare.errors import UserError


def harmonics(grid: Tensor, l_max: int) -> Tensor:
    """Real spherical harmonics at the orientations in e3nn's order and axes, (N, (l_max + 1)^2),
    orthonormal over the sphere (its polar axis is y; degree 1 is x, y, z)."""
    try:
        from e3nn.o3 import spherical_harmonics
    except ImportError as error:
        raise UserError("Irreps need e3nn; install it with: pip install e3nn.") from error

    degrees = list(range(l_max + 1))
    found: Tensor = spherical_harmonics(degrees, grid, normalize=True, normalization="integral")
    return found


def to_irreps(field: Tensor, grid: Tensor, l_max: int) -> Tensor:
    r"""Least-squares coefficients of functions on the sphere,
    :math:`\min_c \sum_n (f(o_n) - \sum_{lm} c_{lm} Y_{lm}(o_n))^2`.

    Shapes: field (..., N, C), grid (N, 3) -> (..., C, (l_max + 1)^2), for each channel e3nn's
    ``1x0e + 1x1o + ... + 1xl_max``: a rotation acts on it as ``irreps.D_from_matrix``.

    Raises:
        UserError: the grid has fewer orientations than there are coefficients.
    """
    y = harmonics(grid, l_max)
    if y.shape[1] > len(grid) or torch.linalg.matrix_rank(y) < y.shape[1]:
        raise UserError(
            f"{len(grid)} orientations cannot tell {y.shape[1]} harmonics up to degree {l_max} "
            "apart; use a smaller l_max or a finer grid."
        )
    return torch.einsum("...nc,kn->...ck", field, torch.linalg.pinv(y))


def from_irreps(coefficients: Tensor, grid: Tensor) -> Tensor:
    r""":math:`f(o_n) = \sum_{lm} c_{lm} Y_{lm}(o_n)`: (..., C, (l_max + 1)^2) -> (..., N, C)."""
    l_max = round(coefficients.shape[-1] ** 0.5) - 1
    if (l_max + 1) ** 2 != coefficients.shape[-1]:
        raise UserError(
            f"{coefficients.shape[-1]} coefficients are no whole set of degrees; give 1, 4, 9, ..."
        )
    return torch.einsum("...ck,nk->...nc", coefficients, harmonics(grid, l_max))
