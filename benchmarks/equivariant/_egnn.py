"""EGNN with velocities (Satorras et al. 2021, equations 3-7): the peer on the N-body task."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Egnn(nn.Module):
    """Takes and gives what a ``Ponita`` on the N-body task does: (B, n, 3) positions, charges
    (B, n, 1), velocities (B, n, 1, 3) to displacements (B, n, 1, 3)."""

    def __init__(self, hidden: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(1, hidden)

        def mlp(inputs: int, outputs: int, last: bool = False) -> nn.Sequential:
            parts = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs)]
            return nn.Sequential(*parts, *([nn.SiLU()] if last else []))

        self.edge = nn.ModuleList(mlp(2 * hidden + 2, hidden, True) for _ in range(layers))
        self.node = nn.ModuleList(mlp(2 * hidden, hidden) for _ in range(layers))
        self.speed = nn.ModuleList(mlp(hidden, 1) for _ in range(layers))
        self.coordinate = nn.ModuleList(mlp(hidden, 1) for _ in range(layers))
        for one in self.coordinate:
            nn.init.xavier_uniform_(one[2].weight, gain=0.001)

    def forward(self, positions: Tensor, charges: Tensor, velocities: Tensor) -> SimpleNamespace:
        x, v = positions, velocities.squeeze(-2)
        n = x.shape[1]
        h = self.embed(v.norm(dim=-1, keepdim=True))
        product = charges[:, :, None] * charges[:, None]
        others = 1 - torch.eye(n, device=x.device)[None, :, :, None]
        for edge, node, speed, coordinate in zip(
            self.edge, self.node, self.speed, self.coordinate, strict=True
        ):
            gap = x[:, :, None] - x[:, None]
            pair = [h[:, :, None].expand(-1, -1, n, -1), h[:, None].expand(-1, n, -1, -1)]
            squared = gap.square().sum(-1, keepdim=True)
            message = edge(torch.cat([*pair, squared, product], -1)) * others
            push = (gap * coordinate(message) * others).sum(2) / (n - 1)
            v = speed(h) * v + push
            x = x + v
            h = h + node(torch.cat([h, message.sum(2)], -1))
        return SimpleNamespace(vectors=(x - positions).unsqueeze(-2))
