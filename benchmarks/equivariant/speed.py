"""Milliseconds and memory: plain PyTorch against the dense path, captured, and with recomputation.

    python benchmarks/equivariant/speed.py [--quick] [--minutes 3] [--device cuda]

*plain* is the published mathematics in its order of operations: edge lists rebuilt and gathered in
every forward pass, scattered sums, eager. *dense* works on (graphs, points, points) tensors.
*captured* replays the whole update (augmented batch to averaged weights) as one CUDA graph.
Ratios are within this table, on one device.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _egnn import Egnn

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.equivariant import (
    DynamicsTask,
    PonitaPotential,
    PotentialTask,
    RotatedUpdate,
    dynamics,
    make_nbody,
    potential_task,
)
from weightshare.equivariant import Ponita as Network
from weightshare.equivariant.pairs import full_edges
from weightshare.training import Captured, LoopConfig

PUBLISHED = {"hidden": 128, "basis": 256, "layers": 5}
SMALL = {"hidden": 32, "basis": 32, "layers": 2}


class PlainDynamics(DynamicsTask):
    """The N-body task on an edge list."""

    def predict(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        start = batch["start"]
        graphs, n, _ = start.shape
        graph = torch.arange(graphs, device=start.device).repeat_interleave(n)
        moved = self.network(
            start.flatten(0, 1),
            batch["charges"].reshape(-1, 1),
            batch["velocity"].reshape(-1, 1, 3),
            edges=full_edges(graph),
            batch=graph,
            graphs=graphs,
        ).vectors
        return start + moved.view_as(start)


class PlainPotential(PotentialTask):
    """The potential's task on an edge list."""

    def predict(self, batch: dict[str, torch.Tensor], create_graph: bool = False) -> Any:
        graphs, n, _ = batch["positions"].shape
        graph = torch.arange(graphs, device=batch["positions"].device).repeat_interleave(n)
        said = self.potential(
            batch["numbers"].flatten(),
            batch["positions"].flatten(0, 1),
            edges=full_edges(graph),
            batch=graph,
            graphs=graphs,
            create_graph=create_graph,
        )
        return said._replace(forces=said.forces.view_as(batch["positions"]))


def measure(step: Callable[[], Any], device: str, seconds: float) -> dict[str, float]:
    """Median and quartiles of at least five steps, and the peak of memory."""
    cuda = device.startswith("cuda")
    for _ in range(6):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times, begun = [], time.monotonic()
    while len(times) < 5 or (time.monotonic() - begun < seconds and len(times) < 100):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    times.sort()
    found = {"ms": times[len(times) // 2], "ms_low": times[len(times) // 4]}
    found["ms_high"] = times[-len(times) // 4]
    if cuda:
        found["gb_reserved"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def training(task: torch.nn.Module, batch: dict, vectors: Any, capture: bool) -> Callable[[], Any]:
    config = LoopConfig(steps=1000, learning_rate=1e-5, clip=0.5, ema_decay=0.99)
    update = RotatedUpdate.from_config(task, config, vectors=vectors)
    run = Captured(update) if capture else update
    count = iter(range(10**9))
    return lambda: run.apply(run.prepare(batch, next(count)))


def nbody_case(graphs: int, size: dict, kind: str, device: str) -> Callable[[], Any]:
    batch = dynamics.columns(make_nbody(graphs, frames=(0, 1)))
    if kind.startswith("egnn"):
        task: DynamicsTask = DynamicsTask(Egnn())
    else:
        network = Network(
            1, 1, vectors_out=1, orientations=16, layer_scale=1e-6, level="node", **size
        )
        task = (PlainDynamics if kind == "plain" else DynamicsTask)(network)
    return training(task.to(device), batch, dynamics.VECTORS, kind.endswith("captured"))


def molecules(graphs: int, atoms: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)[:atoms] * 1.4
    places = grid + 0.15 * torch.randn(graphs, atoms, 3, generator=draw)
    numbers = torch.tensor([1, 6, 8])[torch.arange(atoms) % 3].expand(graphs, -1).contiguous()
    return {
        "numbers": numbers, "positions": places,
        "energy": torch.randn(graphs, generator=draw).double(),
        "forces": torch.randn(graphs, atoms, 3, generator=draw),
    }  # fmt: skip


def potential_case(
    graphs: int, atoms: int, size: dict, kind: str, device: str, inference: bool
) -> Callable[[], Any]:
    batch = molecules(graphs, atoms)
    model = PonitaPotential([1, 6, 8], recompute="recompute" in kind, **size)
    task = (PlainPotential if kind == "plain" else PotentialTask)(model).to(device)
    if not inference:
        return training(task, batch, potential_task.VECTORS, kind.endswith("captured"))
    there = {k: v.to(device) for k, v in batch.items()}
    task.eval()
    if not (kind.endswith("captured") and device.startswith("cuda")):
        return lambda: task.predict(there)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            task.predict(there)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        task.predict(there)
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table("equivariant_speed", __doc__, parser)
    quick, device = table.quick, table.options.device
    torch.set_float32_matmul_precision("high")
    size = SMALL if quick else PUBLISHED
    many = 5 if quick else 50
    kinds = ["plain", "dense", "captured"]
    cases: list[tuple[str, list[str], Callable[[str], Callable[[], Any]]]] = [
        ("N-body train, batch 100", [*kinds, "egnn", "egnn captured"],
         lambda kind: nbody_case(100, size, kind, device)),
        ("energy+force train, 9 atoms x 10", kinds,
         lambda kind: potential_case(10, 9, size, kind, device, False)),
        (f"energy+force train, 21 atoms x {many}", [*kinds, "recompute", "recompute captured"],
         lambda kind: potential_case(many, 21, size, kind, device, False)),
        ("energy+force inference, 21 atoms x 1", kinds,
         lambda kind: potential_case(1, 21, size, kind, device, True)),
        (f"energy+force inference, 21 atoms x {many}", kinds,
         lambda kind: potential_case(many, 21, size, kind, device, True)),
    ]  # fmt: skip
    for case, kinds_here, build in cases:
        plain = None
        for kind in kinds_here:

            def figures(kind: str = kind, build: Any = build, plain: Any = plain) -> dict:
                gc.collect()
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
                try:
                    found = measure(build(kind), device, 0.5 if quick else 1.0)
                except torch.cuda.OutOfMemoryError:
                    return {"out_of_memory": 1}
                return {**found, "times_plain": plain["ms"] / found["ms"] if plain else 1.0}

            row = table.row(f"{case}: {kind}", figures)
            plain = row if kind == "plain" else plain
    table.show(["ms", "ms_low", "ms_high", "gb_reserved", "times_plain"])


if __name__ == "__main__":
    main()
