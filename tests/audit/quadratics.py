"""A model whose curvature, targets and gains are known."""

import torch
from torch import nn

from weightshare.sharing import tie


class Quadratic(nn.Module):
    """½ h Σ_u ‖W_u x - T_u x‖² averaged over whitened x: curvature h in every direction."""

    def __init__(self, targets, curvature=2.0, start=None):
        super().__init__()
        self.places = nn.ModuleList(nn.Linear(6, 5, bias=False) for _ in targets)
        self.targets, self.curvature = targets, curvature
        with torch.no_grad():
            mean = torch.stack(list(targets)).mean(0)
            for place in self.places:
                place.weight.copy_(mean if start is None else start)
        tie(self, [[f"places.{i}.weight" for i in range(len(targets))]])
        self.to(targets[0].dtype)

    def forward(self, noise):
        # ``noise`` stands for a batch: it moves the targets a little, as sampling does.
        return sum(
            self.curvature / 2 * (place(torch.eye(6).to(noise)).T - target - noise).square().sum()
            for place, target in zip(self.places, self.targets, strict=True)
        )


def loss(model, batch):
    return model(batch)


def targets(*which, seed=0, size=0.3):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(5, 6, generator=g, dtype=torch.float64)
    moves = size * torch.randn(max(which) + 1, 5, 6, generator=g, dtype=torch.float64)
    return [base + moves[i] for i in which]


def data(n=8, noise=1e-3):
    g = torch.Generator().manual_seed(5)
    return [noise * torch.randn(5, 6, generator=g, dtype=torch.float64) for _ in range(n)]
