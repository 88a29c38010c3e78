"""What complete invariants buy: handedness in space, left and right in the plane.

    python benchmarks/equivariant/completeness.py [--quick] [--minutes 10]

*tetrahedra*: four labelled points, a regular tetrahedron with noise 0.1, rotated at random and
mirrored with probability one half; which of the two? *free tetrahedra*: labelled Gaussian points
(reported without a bar: the sign of a small volume is hard). *turns*: in the plane, two arrows at
one point; is the second turned to the left of the first? Fresh examples; 50 % is chance.
"""

import argparse
import functools
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.equivariant import Ponita, random_rotations, rotation_group

SMALL = {"hidden": 16, "basis": 16, "layers": 2, "widening": 2}
NETWORKS = {
    "tetrahedra": {
        "separable, E(3)": {"orientations": 12},
        "full, three invariants, E(3)": {"convolution": "full", "orientations": 6},
        "full, complete, E(3)": {
            "convolution": "full", "orientations": 6, "invariants": "complete",
        },
        "full, complete, SE(3)": {
            "convolution": "full", "orientations": 6, "invariants": "complete", "chiral": True,
        },
        "rotation grid, SE(3)": {"grid": rotation_group("tetrahedron")},
    },
    "turns": {
        "full, cosine": {"dim": 2, "orientations": 8, "convolution": "full"},
        "full, cosine and sine": {
            "dim": 2, "orientations": 8, "convolution": "full", "invariants": "complete",
        },
    },
}  # fmt: skip
NETWORKS["free tetrahedra"] = NETWORKS["tetrahedra"]

CORNERS = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / math.sqrt(3)


def tetrahedra(count: int, free: bool, draw: torch.Generator) -> tuple[torch.Tensor | None, ...]:
    places = torch.randn(count, 4, 3, generator=draw)
    if not free:
        places = CORNERS + 0.1 * places
    mirrored = torch.rand(count, generator=draw) < 0.5
    flipped = places * torch.tensor([1.0, 1.0, -1.0])
    places = torch.where(mirrored[:, None, None], flipped, places)
    edges = places[:, 1:] - places[:, :1]
    label = torch.linalg.det(edges) > 0
    turned = torch.einsum("bnd,bed->bne", places, random_rotations(count, 3, draw).float())
    return turned, torch.eye(4).expand(count, 4, 4), None, label


def turns(count: int, draw: torch.Generator) -> tuple[torch.Tensor | None, ...]:
    """One point with two arrows; the second to the left or right of the first by 0.3-2.8."""
    first = 2 * math.pi * torch.rand(count, generator=draw)
    left = torch.rand(count, generator=draw) < 0.5
    size = 0.3 + 2.5 * torch.rand(count, generator=draw)
    angle = torch.stack([first, first + torch.where(left, size, -size)], 1)
    arrows = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(-3)
    return torch.zeros(count, 1, 2), None, arrows, left


def accuracy(task: str, options: dict, seed: int, steps: int) -> dict[str, float]:
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(1000 + seed)
    plane = task == "turns"

    def sample(count: int) -> tuple[torch.Tensor | None, ...]:
        return turns(count, draw) if plane else tetrahedra(count, task.startswith("free"), draw)

    network = Ponita(0 if plane else 4, 2 if plane else 0, scalars_out=1, **SMALL, **options)
    places, labels, arrows, _ = sample(200)
    network.calibrate_(places, labels, arrows)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    begun = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / steps))
        places, labels, arrows, truth = sample(64)
        said = network(places, labels, arrows).scalars[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(said, truth.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cost = 1000 * (time.process_time() - begun) / steps
    *given, truth = sample(4000)
    with torch.no_grad():
        said = torch.cat(
            [
                network(*(None if x is None else x[low : low + 500] for x in given)).scalars[:, 0]
                for low in range(0, 4000, 500)
            ]
        )
    right = ((said > 0) == truth).float()
    return {
        "accuracy": float(right.mean()),
        "standard_error": float(right.std() / len(right) ** 0.5),
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": steps,
        "processor_ms_per_step": cost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", default="0")
    table = Table("equivariant_completeness", __doc__, parser)
    steps = 60 if table.quick else table.options.steps
    for seed in map(int, table.options.seeds.split(",")):
        for task in ("tetrahedra", "turns", "free tetrahedra"):
            for name, options in NETWORKS[task].items():
                row = f"{task}: {name}" + (f", seed {seed}" if seed else "")
                table.row(row, functools.partial(accuracy, task, options, seed, steps))
    table.show(["accuracy", "standard_error", "parameters", "steps", "processor_ms_per_step"])


if __name__ == "__main__":
    main()
