"""A small network and a random cloud in float64, for the tests of exactness."""

import torch

from weightshare.equivariant import Ponita


def network(**options):
    """A small random network in float64; biases and scales are random too, so nothing is 0."""
    torch.manual_seed(options.pop("seed", 0))
    chosen = {
        "scalars": 2, "vectors": 1, "scalars_out": 2, "vectors_out": 1, "hidden": 8, "layers": 2,
        "basis": 8, "widening": 2, "orientations": 12,
    }  # fmt: skip
    model = Ponita(**(chosen | options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def cloud(points=7, dim=3, scalars=2, vectors=1, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return normal(points, dim), normal(points, scalars), normal(points, vectors, dim)


def close(a, b, tolerance=1e-11):
    """Largest difference, relative to the largest value, under the tolerance."""
    scale = max(float(b.detach().abs().max()) if b.numel() else 0.0, 1e-3)
    return a.shape == b.shape and (
        a.numel() == 0 or float((a - b).detach().abs().max()) <= tolerance * scale
    )
