"""Milliseconds and memory: plain PyTorch against the dense path, captured, and with recomputation.

    python benchmarks/equivariant/speed.py [--quick] [--minutes 3] [--device cuda] [--cases 0,1]

*plain* is the published mathematics in its order of operations: edge lists rebuilt and gathered in
every forward pass, scattered sums, all monomials, torch's own GELU and LayerNorm, a plain training
step, eager. *dense* works on (graphs, points, points) tensors. *captured* replays the whole update
(augmented batch to averaged weights) as one CUDA graph. Training steps are queued one behind
another, ten to a measurement, as the training loop does. Ratios are within this table, on one
device. MACE and the ASE calculator are left out where their packages are not installed.
"""

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _egnn import Egnn
from _peers import Mace, MaceTask

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
    random_rotations,
)
from weightshare.equivariant import Ponita as Network
from weightshare.equivariant.augment import turned
from weightshare.equivariant.basis import KernelBasis
from weightshare.equivariant.pairs import full_edges
from weightshare.training import Captured, LoopConfig, keep_freed_memory, total

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


class PlainBasis(torch.nn.Module):
    """The published basis: repeated outer products, 14 columns for 2 invariants."""

    def __init__(self, basis: KernelBasis) -> None:
        super().__init__()
        inputs, hidden = basis.inputs, basis.first.out_features
        self.degree = basis.degree
        columns = sum(inputs**power for power in range(1, basis.degree + 1))
        self.net = torch.nn.Sequential(
            torch.nn.Linear(columns, hidden), torch.nn.GELU(), basis.second, torch.nn.GELU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        powers = [x]
        for _ in range(1, self.degree):
            powers.append((powers[-1].unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2))
        found: torch.Tensor = self.net(torch.cat(powers, -1))
        return found


def plainly(network: torch.nn.Module) -> None:
    """Put torch's own modules in the place of ours."""
    functions = network.functions
    functions.spatial = PlainBasis(functions.spatial)
    functions.fibre = PlainBasis(functions.fibre)
    for block in network.blocks:
        block.norm = torch.nn.LayerNorm(block.norm.normalized_shape)
        block.mlp[1] = torch.nn.GELU()


def measure(step: Callable[[], Any], device: str, seconds: float, queued: int) -> dict[str, float]:
    """Median and quartiles of the time of one of ``queued`` steps, and the peak of memory."""
    cuda = device.startswith("cuda")
    for _ in range(6 if cuda else 1):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times, begun = [], time.monotonic()
    while len(times) < (5 if cuda else 3) or (
        time.monotonic() - begun < seconds and len(times) < 100
    ):
        start = time.perf_counter()
        for _ in range(queued):
            step()
        if cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start) / queued)
    times.sort()
    found = {"ms": times[len(times) // 2], "ms_low": times[len(times) // 4]}
    found["ms_high"] = times[-1 - len(times) // 4]
    if cuda:
        found["gb_allocated"] = torch.cuda.max_memory_allocated() / 1e9
        found["gb_reserved"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def training(task: torch.nn.Module, batch: dict, vectors: Any, kind: str) -> Callable[[], Any]:
    if kind == "plain":
        return plain_training(task, batch, vectors)
    config = LoopConfig(steps=1000, learning_rate=1e-5, clip=0.5, ema_decay=0.99)
    update = RotatedUpdate.from_config(task, config, vectors=vectors)
    run = Captured(update) if "captured" in kind else update
    count = iter(range(10**9))
    return lambda: run.apply(run.prepare(batch, next(count)))


def plain_training(task: torch.nn.Module, batch: dict, vectors: Any) -> Callable[[], Any]:
    """Rotation, loss, backward pass, clipping, Adam and the average of the weights, as written
    without a library."""
    device = next(task.parameters()).device
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-5)
    averages = [p.detach().clone() for p in task.parameters()]

    def step() -> None:
        turns = random_rotations(len(batch[vectors[0]]), 3)
        moved = {k: v.to(device) for k, v in turned(batch, turns.float(), vectors).items()}
        optimizer.zero_grad()
        total(task(moved)).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 0.5)
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(averages, task.parameters(), strict=True):
                average.mul_(0.99).add_(parameter, alpha=0.01)

    return step


def nbody_case(graphs: int, size: dict, kind: str, device: str) -> Callable[[], Any]:
    batch = dynamics.columns(make_nbody(graphs, frames=(0, 1)))
    if kind.startswith("egnn"):
        task: DynamicsTask = DynamicsTask(Egnn())
    else:
        orientations = 20 if "20" in kind else 16
        network = Network(
            1, 1, vectors_out=1, orientations=orientations, layer_scale=1e-6, level="node", **size
        )
        task = (PlainDynamics if kind == "plain" else DynamicsTask)(network)
        if kind == "plain":
            plainly(network)
    return training(task.to(device), batch, dynamics.VECTORS, kind)


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
    if kind == "MACE":
        task: PotentialTask = MaceTask(Mace()).to(device)
    else:
        again = next((word for word in ("messages", "basis") if word in kind), None)
        model = PonitaPotential([1, 6, 8], recompute=again, **size)
        if kind == "plain":
            plainly(model.network)
        task = (PlainPotential if kind == "plain" else PotentialTask)(model).to(device)
    if not inference:
        return training(task, batch, potential_task.VECTORS, kind)
    there = {k: v.to(device) for k, v in batch.items()}
    task.eval().requires_grad_(False)
    if not ("captured" in kind and device.startswith("cuda")):
        return lambda: task.predict(there)
    return recorded(lambda: task.predict(there))


def recorded(work: Callable[[], Any]) -> Callable[[], None]:
    """The device's part of ``work`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def dynamics_case(size: dict, kind: str, device: str) -> Callable[[], Any]:
    """One step of molecular dynamics of nine atoms."""
    from ase import Atoms, units
    from ase.md.verlet import VelocityVerlet

    from weightshare.equivariant import PonitaCalculator

    one = molecules(1, 9)
    model = PonitaPotential([1, 6, 8], **size)
    if kind == "captured, float32":
        x = one["positions"].to(device)
        v, model = torch.zeros_like(x), model.to(device).requires_grad_(False)
        numbers, h = one["numbers"].to(device), 1e-3

        def step() -> None:
            pull = model(numbers, x).forces
            v.add_(pull, alpha=h)
            x.add_(v, alpha=h)

        return recorded(step) if device.startswith("cuda") else step
    atoms = Atoms(one["numbers"][0].numpy(), one["positions"][0].double().numpy())
    atoms.calc = PonitaCalculator(model, device, kind.rsplit(" ", 1)[1])
    motion = VelocityVerlet(atoms, 1e-4 * units.fs)
    return lambda: motion.run(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default="0,1,2,3,4,5", help="which of the cases, by number")
    parser.add_argument(
        "--kinds", help="which ways, by name (MACE needs an environment of its own)"
    )
    table = Table("equivariant_speed", __doc__, parser)
    quick, device = table.quick, table.options.device
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    size = SMALL if quick else PUBLISHED
    many, kinds = 5 if quick else 50, ["plain", "dense"]
    if device.startswith("cuda"):
        kinds.append("captured")
    mace = ["MACE"] if importlib.util.find_spec("mace") else []
    memory = [f"{what} again{how}" for what in ("messages", "basis")
              for how in ("", ", captured")[: len(kinds) - 1]]  # fmt: skip
    dynamic = ["ASE, float64", "ASE, float32", "captured, float32"]
    cases: list[tuple[str, list[str], int, Callable[[str], Callable[[], Any]]]] = [
        ("N-body train, batch 100", [*kinds, *(f"{k}, 20 orientations" for k in kinds[2:]), "egnn",
                                     *(f"egnn {k}" for k in kinds[2:])], 10,
         lambda kind: nbody_case(100, size, kind, device)),
        ("energy+force train, 9 atoms x 10", [*kinds, *mace], 10,
         lambda kind: potential_case(10, 9, size, kind, device, False)),
        (f"energy+force train, 21 atoms x {many}", [*kinds, *memory, *mace], 2,
         lambda kind: potential_case(many, 21, size, kind, device, False)),
        ("energy+force inference, 21 atoms x 1", [*kinds, *mace], 1,
         lambda kind: potential_case(1, 21, size, kind, device, True)),
        (f"energy+force inference, 21 atoms x {many}", [*kinds, *mace], 1,
         lambda kind: potential_case(many, 21, size, kind, device, True)),
        ("molecular dynamics step, 9 atoms", dynamic if importlib.util.find_spec("ase") else [], 1,
         lambda kind: dynamics_case(size, kind, device)),
    ]  # fmt: skip
    wanted = table.options.kinds.split(";") if table.options.kinds else None
    for case, kinds_here, queued, build in (cases[int(k)] for k in table.options.cases.split(",")):
        for kind in kinds_here if wanted is None else [k for k in kinds_here if k in wanted]:

            def figures(kind: str = kind, build: Any = build, queued: int = queued) -> dict:
                gc.collect()
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
                try:
                    repeats = queued if device.startswith("cuda") else 1
                    return measure(build(kind), device, 0.5 if quick else 1.0, repeats)
                except torch.cuda.OutOfMemoryError:
                    return {"out_of_memory": 1}

            table.row(f"{case}: {kind}", figures)
    for name, row in table.rows.items():
        plain = table.rows.get(f"{name.split(': ')[0]}: plain")
        if plain and "ms" in row:
            row["times_plain"] = plain["ms"] / row["ms"]
    table.write()
    table.show(["ms", "ms_low", "ms_high", "gb_reserved", "times_plain"])


if __name__ == "__main__":
    main()
