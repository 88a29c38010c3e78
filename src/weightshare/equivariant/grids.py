"""Orientation grids: finite sets of directions that stand for the circle or the sphere.

A network on a grid commutes exactly with the rotations that permute the grid (``symmetries``), and
with any rotation when the grid is rotated along.
"""

import math
from itertools import combinations, product

import torch
from torch import Tensor

from weightshare.errors import UserError

PLATONIC = {4: "tetrahedron", 6: "octahedron", 8: "cube", 12: "icosahedron", 20: "dodecahedron"}
"""Number of orientations -> the solid whose vertices they are."""

GOLDEN = (1 + math.sqrt(5)) / 2


def make_grid(orientations: int, dim: int = 3) -> Tensor:
    """The default grid (N, dim) in float64: equal angles on the circle; on the sphere a Platonic
    solid where there is one with N vertices, else the Fibonacci lattice.

    Raises:
        UserError: no orientation was asked for, or ``dim`` is neither 2 nor 3.
    """
    if orientations < 1:
        raise UserError(f"A grid of {orientations} orientations is empty; give at least 1.")
    if dim == 2:
        return circle(orientations)
    if dim != 3:
        raise UserError(f"There is no grid in {dim} dimensions; give dim=2 or dim=3.")
    return platonic(orientations) if orientations in PLATONIC else fibonacci(orientations)


def circle(orientations: int) -> Tensor:
    r"""Directions at the angles :math:`2\pi k/N`, (N, 2)."""
    angles = 2 * math.pi * torch.arange(orientations, dtype=torch.float64) / orientations
    return torch.stack([angles.cos(), angles.sin()], -1)


def platonic(orientations: int) -> Tensor:
    """Vertices of the Platonic solid with 4, 6, 8, 12 or 20 of them: spherical designs of degree
    2, 3, 3, 5 and 5, so that the mean of ``o o^T`` is exactly one third of the identity."""
    signs = list(product((1.0, -1.0), repeat=3))
    if orientations == 4:
        points = [s for s in signs if s[0] * s[1] * s[2] > 0]
    elif orientations == 6:
        points = [(s, 0.0, 0.0) for s in (1.0, -1.0)]
    elif orientations == 8:
        points = signs
    elif orientations == 12:
        points = [(0.0, a, b * GOLDEN) for a, b in product((1.0, -1.0), repeat=2)]
    elif orientations == 20:
        points = [(0.0, a / GOLDEN, b * GOLDEN) for a, b in product((1.0, -1.0), repeat=2)]
    else:
        raise UserError(
            f"No Platonic solid has {orientations} vertices; use {', '.join(map(str, PLATONIC))}."
        )
    if orientations in (6, 12, 20):
        points = [p[k:] + p[:k] for k in range(3) for p in points]
    if orientations == 20:
        points += signs
    grid = torch.tensor(points, dtype=torch.float64)
    return grid / grid.norm(dim=-1, keepdim=True)


def fibonacci(orientations: int) -> Tensor:
    r"""Fibonacci lattice: azimuth :math:`\pi k(1+\sqrt5)`, height :math:`1-2(k+½)/N`."""
    k = torch.arange(orientations, dtype=torch.float64)
    azimuth = math.pi * k * (1 + math.sqrt(5))
    height = 1 - 2 * (k + 0.5) / orientations
    radius = (1 - height**2).sqrt()
    return torch.stack([radius * azimuth.cos(), radius * azimuth.sin(), height], -1)


def repulsion(orientations: int, seed: int = 0, steps: int = 500) -> Tensor:
    r"""Points that repel each other on the sphere, at rest: a local minimum of
    :math:`\sum_{i<j} \lVert o_i - o_j\rVert^{-2}`, found by L-BFGS in float64 from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(orientations, 3, generator=generator, dtype=torch.float64)
    free = (points / points.norm(dim=-1, keepdim=True)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=steps,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def energy() -> Tensor:
        optimizer.zero_grad()
        value = torch.pdist(torch.nn.functional.normalize(free, dim=-1)).pow(-2).sum()
        value.backward()
        return value

    if orientations > 1:
        optimizer.step(energy)
    return torch.nn.functional.normalize(free.detach(), dim=-1)


def antipodal_order(grid: Tensor) -> Tensor | None:
    """An order of a grid of directions in which its second half is minus its first, (N,), or None
    where some orientation has no opposite."""
    if grid.ndim != 2:
        return None
    opposite = torch.cdist(grid, -grid).argmin(1)
    if (grid[opposite] + grid).abs().max() > 1e-9 or len(grid) % 2:
        return None
    first = (torch.arange(len(grid), device=grid.device) < opposite).nonzero()[:, 0]
    return torch.cat([first, opposite[first]])


def quadrature_weights(grid: Tensor) -> Tensor:
    """Share of the circle or sphere that is nearer to each orientation than to any other, (N,).

    They sum to 1 and are equal on grids that look the same from every point.

    Raises:
        UserError: two orientations on the sphere coincide.
    """
    n = grid.shape[0]
    even = grid.new_full((n,), 1 / n)
    if grid.shape[-1] == 2:
        angles = torch.atan2(grid[:, 1], grid[:, 0])
        order = angles.argsort()
        gaps = torch.diff(angles[order], append=angles[order][:1] + 2 * math.pi)
        return even.scatter(0, order, (gaps + gaps.roll(1)) / (4 * math.pi))
    if n < 4 or torch.linalg.matrix_rank(grid[1:] - grid[:1]) < 3:
        return even
    from scipy.spatial import SphericalVoronoi

    try:
        areas = SphericalVoronoi(grid.double().cpu().numpy(), threshold=1e-9).calculate_areas()
    except ValueError as error:
        raise UserError(
            "Two orientations of the grid coincide, so that neither has an area; leave one out."
        ) from error
    return torch.from_numpy(areas).to(grid) / (4 * math.pi)


def symmetries(grid: Tensor, reflections: bool = False) -> Tensor:
    """The rotations that permute the grid, (G, dim, dim) float64; with ``reflections`` all of O(d).

    A grid that does not span the space has a continuous group; it is refused.

    Raises:
        UserError: the orientations lie in a line (2-D) or a plane (3-D).
    """
    points = grid.double().cpu()
    dim = points.shape[-1]
    first = _frame(points, dim)
    cosines = points @ points.T
    # A rotation is known by the images of ``dim`` independent points, which keep their angles.
    fits = torch.ones((1,) * dim, dtype=torch.bool)
    for a, b in combinations(range(dim), 2):
        shape = [len(points) if axis in (a, b) else 1 for axis in range(dim)]
        same = (cosines - cosines[first[a], first[b]]).abs() < 1e-7
        fits = fits & same.view(shape)
    images = points[fits.nonzero()]
    matrices = torch.linalg.solve(points[first].expand_as(images), images).mT
    moved = points @ matrices.mT
    exact = torch.cdist(moved, points.expand_as(moved)).amin(-1).amax(-1) < 1e-6
    if not reflections:
        exact &= torch.linalg.det(matrices) > 0
    return matrices[exact]


def _frame(points: Tensor, dim: int) -> list[int]:
    """Indices of ``dim`` well separated, linearly independent orientations."""
    chosen = [0]
    rest = points - points @ points[:1].T * points[:1]
    for _ in range(dim - 1):
        length = rest.norm(dim=-1)
        best = int(length.argmax())
        if length[best] < 1e-6:
            raise UserError(
                "The orientations do not span the space, so that infinitely many rotations keep "
                "them; give a grid with directions all around."
            )
        chosen.append(best)
        axis = rest[best] / length[best]
        rest = rest - (rest @ axis)[:, None] * axis
    return chosen


def rotation_group(name: str) -> Tensor:
    """The rotations of a solid as a grid on SO(3), (G, 3, 3): tetrahedron 12, octahedron 24,
    icosahedron 60."""
    vertices = {"tetrahedron": 4, "octahedron": 6, "icosahedron": 12}
    if name not in vertices:
        raise UserError(f"{name!r} is no rotation group here; use {', '.join(vertices)}.")
    return symmetries(platonic(vertices[name]))


def random_rotations(count: int, dim: int = 3, generator: torch.Generator | None = None) -> Tensor:
    """Rotations drawn uniformly from SO(dim), (count, dim, dim), float64, on the CPU."""
    if dim == 2:
        angle = 2 * math.pi * torch.rand(count, generator=generator).double()
        c, s = angle.cos(), angle.sin()
        return torch.stack([c, -s, s, c], -1).view(count, 2, 2)
    q = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator).double(), dim=-1)
    return _from_quaternions(q)


def spread_rotations(count: int) -> Tensor:
    """Rotations that cover SO(3) evenly, (count, 3, 3) float64: the super-Fibonacci spiral (Alexa,
    CVPR 2022), turned so that the first is the identity. Always the same.

    Raises:
        UserError: ``count`` is not positive.
    """
    if count < 1:
        raise UserError(f"{count} rotations are none to average over; give 1 or more.")
    s = torch.arange(count, dtype=torch.float64) + 0.5
    inner, outer = (s / count).sqrt(), (1 - s / count).sqrt()
    alpha, beta = 2 * math.pi * s / math.sqrt(2), 2 * math.pi * s / 1.533751168755204288118041
    q = [inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()]
    turns = _from_quaternions(torch.stack(q, -1))
    return turns @ turns[0].T


_PLACES = torch.tensor([[1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
_LEFT = torch.tensor([[-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]])
_RIGHT = torch.tensor([[-1, 1, 1, -1], [-1, -1, 1, 1], [-1, 1, -1, 1]])


def _from_quaternions(q: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of unit quaternions (w, x, y, z): products of two matrices with the
    same four numbers, few operations because every training step draws some."""
    numbers = q[..., _PLACES]
    return (numbers * _LEFT.to(q)) @ (numbers * _RIGHT.to(q)).mT
