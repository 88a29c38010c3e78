"""``weightshare points``: train an equivariant network on points, test it, turn it."""

import time
from typing import TYPE_CHECKING, Any

from weightshare.errors import UserError

if TYPE_CHECKING:
    from weightshare.equivariant.config import PointsConfig

CONFIG = "weightshare.equivariant.config:PointsConfig"
EXTRA = "equivariant"
EXAMPLES = """
  weightshare points nbody --train-size 500 --epochs 40 --out runs/nbody
  weightshare points nbody --preset published --device cuda --out runs/nbody-published
  weightshare points rmd17_ethanol_train_01.npz --test rmd17_ethanol_test_01.npz --out runs/ethanol
  weightshare points silicon.extxyz --cutoff 5 --stress-weight 1 --dry-run
"""

CHECKED = 100
"""Test examples that are rotated to measure equivariance."""


def run(config: "PointsConfig") -> None:
    """Train on one data set and leave a run directory."""
    check(config)
    (nbody if config.data == "nbody" else atoms)(config)


def nbody(config: "PointsConfig") -> None:
    """Charged particles: where will they be?"""
    import torch

    from weightshare.cli.console import device_of, say, show_table
    from weightshare.equivariant import DynamicsTask, Ponita, figures, measure
    from weightshare.equivariant.dynamics import VECTORS, columns, sample_errors
    from weightshare.equivariant.nbody import constant_velocity
    from weightshare.equivariant.symmetrised import symmetrise
    from weightshare.report import Run

    device = device_of(config.device)
    torch.manual_seed(config.seed)
    network = Ponita(
        1,
        1,
        vectors_out=1,
        level="node",
        layer_scale=1e-6,
        invariants=config.invariants,
        **sizes(config),
    )
    task = DynamicsTask(network).to(device)
    counts = (config.train_size or 3000, config.valid_size or 2000, config.test_size or 2000)
    if config.dry_run:
        estimate(config, task, counts[0])
        return
    with Run.open(config.out, config, command="points", resume=config.resume) as run:
        # 1. The trajectories: the published ones where they are at hand, else simulated.
        sets = trajectories(run, counts)
        run.summary(device=str(device), data={k: len(v) for k, v in sets.items()})

        # 2. Train.
        first = {k: v[: config.size("batch_size")] for k, v in columns(sets["train"]).items()}
        first = {k: v.to(device) for k, v in first.items()}
        network.calibrate_(
            first["start"], first["charges"].unsqueeze(-1), first["velocity"].unsqueeze(-2)
        )
        seconds = train(
            config, run, task, columns(sets["train"]), VECTORS, watch="mse",
            evaluate=lambda: {"mse": float(sample_errors(task, sets["valid"]).mean())},
        )  # fmt: skip

        # 3. Test, turn, compare.
        errors = sample_errors(task, sets["test"])
        part = sets["test"].take(slice(CHECKED))
        batch = {k: v.to(device) for k, v in columns(part).items()}
        fitted = constant_velocity(sets["train"], sets["test"])
        rows: list[dict[str, Any]] = [
            {"method": "constant velocity", "test_mse": fitted},
            {"method": "trained network", "test_mse": float(errors.mean())},
        ]
        equivariance = measure.dynamics_equivariance(task, batch)
        if config.rotations > 1 and config.size("orientations"):
            averaged = DynamicsTask(symmetrise(network, config.rotations))
            rows.append(
                {
                    "method": f"averaged over {config.rotations} rotations",
                    "test_mse": float(sample_errors(averaged, sets["test"]).mean()),
                }
            )
        run.summary(
            parameters=sum(p.numel() for p in task.parameters()),
            test={"mse": float(errors.mean()), "stderr": float(errors.std() / len(errors) ** 0.5)},
            baselines={"constant_velocity": fitted},
            equivariance_error=equivariance,
            seconds={"train": seconds},
        )
        save(run, network)

        # 4. Draw.
        run.key("test MSE", f"{errors.mean():.4g}", "of the positions, squared length units")
        run.key("constant velocity", f"{fitted:.4g}", "the fitted baseline")
        run.key("change under rotation", f"{equivariance:.1%}")
        run.rows("test", rows, "Mean squared error of the final positions, test trajectories.")
        names = {"mse": "training", "evaluation.mse": "validation"}
        run.figure(
            "course", figures.course(run.metrics(), names, "MSE"), "Training and validation."
        )
        with torch.no_grad():
            predicted = task.predict(batch).cpu().numpy()
        order = errors[: len(part)].argsort()
        picked = [int(order[len(order) * k // 10]) for k in (1, 5, 9)]
        run.figure(
            "trajectories",
            figures.trajectories(part, predicted, picked),
            "Three test trajectories (an easy, a middling, a hard one): line from start to end, "
            "cross where the network says.",
        )
        if config.size("orientations"):
            by_count = measure.error_by_orientations(task, batch)
            run.figure(
                "equivariance",
                figures.equivariance(by_count, config.size("orientations")),
                "The same weights on other grids of orientations.",
            )
        show_table("test trajectories", rounded(rows))
        say(f"report: {run.path / 'report.html'}")


def atoms(config: "PointsConfig") -> None:
    """Structures with energies and forces: a potential."""
    import torch

    from weightshare.cli.console import device_of, say, show_table
    from weightshare.data import locate
    from weightshare.equivariant import (
        PonitaPotential,
        PotentialTask,
        figures,
        measure,
        read_structures,
    )
    from weightshare.equivariant.frames import Frames, scores, split_frames
    from weightshare.equivariant.symmetrised import symmetrise
    from weightshare.report import Run

    device = device_of(config.device)
    tests = None if config.test is None else read_structures(locate(config.test), config.unit)
    frames = split_frames(
        read_structures(locate(config.data), config.unit),
        tests,
        config.train_size,
        config.valid_size,
        config.test_size,
    )
    periodic = any(frame.cell is not None for part in frames.values() for frame in part)
    if periodic and not config.cutoff:
        raise UserError(f"{config.data} holds periodic structures; give --cutoff in angstrom.")
    loaders = {part: Frames(rows, config.cutoff or None) for part, rows in frames.items()}
    everything = [z for part in frames.values() for f in part for z in f.numbers.tolist()]
    torch.manual_seed(config.seed)
    pulls = torch.cat([torch.from_numpy(f.forces).flatten() for f in frames["train"]])
    potential = PonitaPotential(
        everything,
        cutoff=config.cutoff or None,
        scale=float(pulls.square().mean().sqrt()),
        invariants=config.invariants,
        **sizes(config),
    )
    counts = torch.stack(
        [potential.compositions(torch.from_numpy(f.numbers)) for f in frames["train"]]
    )
    energies = torch.tensor([f.energy for f in frames["train"]], dtype=torch.float64)
    potential.fit_references(counts, energies)
    task = PotentialTask(
        potential,
        config.energy_weight,
        config.force_weight,
        config.stress_weight if periodic else 0.0,
        per_atom=not loaders["train"].dense,
    ).to(device)
    if config.dry_run:
        estimate(config, task, len(frames["train"]))
        return
    with Run.open(config.out, config, command="points", resume=config.resume) as run:
        run.summary(device=str(device), data={k: len(v) for k, v in frames.items()})

        # 1. Train.
        first = loaders["train"].batch(
            range(min(config.size("batch_size"), len(frames["train"]))), device
        )
        options = {k: first[k] for k in ("edges", "shifts", "cell", "batch") if k in first}
        potential.calibrate_(first["numbers"], first["positions"], **options)
        seconds = train(
            config, run, task, loaders["train"], ("positions", "forces", "cell"),
            watch="energy_mae_mev", evaluate=lambda: scores(task, loaders["valid"]),
            tensors=("stress",), examples="energy", capture=loaders["train"].dense,
        )  # fmt: skip

        # 2. Test, plain and averaged over rotations; the fitted references are the baseline.
        checked = loaders["test"].batch(range(min(len(loaders["test"]), CHECKED)), device)
        off = checked["energy"] - potential.reference_energy(
            checked["numbers"], checked.get("batch"), len(checked["energy"])
        )
        rows: list[dict[str, Any]] = [
            {
                "method": "element energies, zero force",
                "energy_mae_mev": float(off.abs().mean() * 1000),
                "force_mae_mev_a": float(checked["forces"].abs().mean() * 1000),
            },
            {"method": "trained potential", **scores(task, loaders["test"])},
        ]
        spread = measure.potential_spread(task, checked)
        plain = potential.network
        if config.rotations > 1 and config.size("orientations"):
            potential.network = symmetrise(plain, config.rotations)
            rows.append(
                {
                    "method": f"averaged over {config.rotations} rotations",
                    **scores(task, loaders["test"]),
                }
            )
            potential.network = plain
        said = task.predict(checked)
        size = 1000 * float(said.forces.square().mean().sqrt())
        run.summary(
            parameters=sum(p.numel() for p in task.parameters()),
            test={k: v for k, v in rows[1].items() if k != "method"},
            baselines={k: v for k, v in rows[0].items() if k != "method"},
            equivariance_error=spread["force_mev_a"] / size if size else 0.0,
            rotation_spread=spread,
            seconds={"train": seconds},
        )  # fmt: skip
        save(run, potential)

        # 3. Draw.
        run.key("energy error", f"{rows[1]['energy_mae_mev']:.3g}", "meV, mean absolute, test")
        run.key("force error", f"{rows[1]['force_mae_mev_a']:.3g}", "meV/Å, mean absolute, test")
        run.key("energy spread over rotations", f"{spread['energy_mev']:.3g}", "meV")
        run.rows("test", rows, "Test structures; energies in meV, forces in meV/Å.")
        names = {"energy_mae_mev": "training", "evaluation.energy_mae_mev": "validation"}
        run.figure("course", figures.course(run.metrics(), names, "energy MAE (meV)"), "Energies.")
        names = {"force_mae_mev_a": "training", "evaluation.force_mae_mev_a": "validation"}
        run.figure("forces", figures.course(run.metrics(), names, "force MAE (meV/Å)"), "Forces.")
        truth = checked["energy"].cpu() - checked["energy"].cpu().mean()
        guess = said.energy.cpu() - checked["energy"].cpu().mean()
        run.figure(
            "energy-parity",
            figures.parity(truth.tolist(), guess.tolist(), "eV", "energy"),
            "Test energies about their mean.",
        )
        run.figure(
            "force-parity",
            figures.parity(
                checked["forces"].flatten().tolist(),
                said.forces.flatten().tolist(),
                "eV/Å",
                "force",
            ),
            "Force components of test structures.",
        )
        show_table("test structures", rounded(rows))
        say(f"report: {run.path / 'report.html'}")


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Four digits are enough for a terminal."""
    return [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]


def sizes(config: "PointsConfig") -> dict[str, int]:
    """The network's sizes."""
    return {name: config.size(name) for name in ("orientations", "hidden", "basis", "layers")}


def check(config: "PointsConfig") -> None:
    """Refuse options that cannot be."""
    for name, least in (
        ("hidden", 1),
        ("layers", 1),
        ("basis", 1),
        ("epochs", 1),
        ("batch_size", 1),
    ):
        if config.size(name) < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {config.size(name)}; give {least} or more.")
    if config.size("orientations") < (1 if config.data == "nbody" else 0):
        raise UserError(
            f"--orientations is {config.size('orientations')}; give 1 or more (0, positions alone, "
            "cannot take or give vectors, which nbody needs)."
        )
    if not 0 <= config.size("ema") < 1:
        raise UserError(f"--ema is {config.size('ema')}; give 0 for none, or a decay below 1.")
    for name in ("train_size", "valid_size", "test_size", "cutoff", "rotations"):
        if getattr(config, name) < 0:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {getattr(config, name)}; give 0 or more.")


def train(
    config: "PointsConfig",
    run: Any,
    task: Any,
    data: Any,
    vectors: tuple[str, ...],
    watch: str,
    evaluate: Any,
    capture: bool = True,
    **options: Any,
) -> float:
    """Train with warm-up, cosine, clipping, averaged weights; seconds of training."""
    import torch

    from weightshare.equivariant import RotatedUpdate
    from weightshare.equivariant.config import WARMUP_EPOCHS
    from weightshare.equivariant.frames import FrameBatches, Frames
    from weightshare.training import (
        Captured,
        EpochBatches,
        GradientUpdate,
        Loop,
        LoopConfig,
        Update,
    )

    frames = isinstance(data, Frames)
    count = len(data) if frames else len(data[vectors[0]])
    size = config.size("batch_size")
    batches: Any = EpochBatches(torch.arange(count) if frames else data, size, config.seed)
    if frames:
        batches = FrameBatches(data, batches)
    steps = max(config.size("epochs") * count // size, 1)
    warmup = min(WARMUP_EPOCHS[config.preset] / config.size("epochs"), 0.1)
    loop_config = LoopConfig(
        steps=steps, learning_rate=config.size("learning_rate"), warmup_fraction=warmup,
        weight_decay=config.weight_decay, clip=config.clip, ema_decay=config.size("ema") or None,
        seed=config.seed, log_every=max(steps // 200, 1), evaluate_every=max(steps // 20, 1),
        watch=watch, keep_best=True, checkpoint_every=max(steps // 20, 1),
    )  # fmt: skip
    update: Update
    if config.augment:
        update = RotatedUpdate.from_config(task, loop_config, vectors=vectors, **options)
    else:
        update = GradientUpdate.from_config(task, loop_config)
    if capture:
        update = Captured(update)
    return Loop(update, batches, loop_config, run, evaluate=evaluate).fit().seconds


def trajectories(run: Any, counts: tuple[int, int, int]) -> dict[str, Any]:
    """The sets of ``nbody.training_sets``, made once a run."""
    import torch

    from weightshare.cli.console import say
    from weightshare.equivariant.nbody import NBody, training_sets
    from weightshare.report import TENSORS

    names, parts = ("charges", "start", "velocity", "target"), ("train", "valid", "test")

    def compute() -> dict[str, torch.Tensor]:
        def tell(step: int, last: int) -> None:
            if step % 1000 == 0:
                say(f"simulating {sum(counts)} trajectories: step {step} of {last}")

        sets = training_sets(counts, tell)
        return {
            f"{part}.{name}": torch.from_numpy(getattr(sets[part], name)).float()
            for part in parts
            for name in names
        }

    tensors = run.stage("trajectories", compute, TENSORS)
    return {part: NBody(*(tensors[f"{part}.{name}"].numpy() for name in names)) for part in parts}


def save(run: Any, model: Any) -> None:
    """The trained weights under the name every run uses."""
    from safetensors.torch import save_file

    def write(path: Any) -> None:
        if hasattr(model, "save"):
            model.save(path)
        else:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(path))

    run.save("checkpoint.safetensors", write)


def estimate(config: "PointsConfig", task: Any, examples: int) -> None:
    """What would be trained, and how long one step of the network's size takes here."""
    import torch

    from weightshare.cli.console import say, show_table
    from weightshare.equivariant.dynamics import VECTORS, DynamicsTask
    from weightshare.training import total

    steps = max(config.size("epochs") * examples // config.size("batch_size"), 1)
    rows = [
        {"": "parameters", "value": sum(p.numel() for p in task.parameters())},
        {"": "training examples", "value": examples},
        {"": "steps", "value": steps},
    ]
    show_table("dry run", rows)
    if isinstance(task, DynamicsTask):
        size, device = config.size("batch_size"), next(task.parameters()).device
        batch = {name: torch.randn(size, 5, 3, device=device) for name in VECTORS}
        batch["charges"] = torch.ones(size, 5, device=device)
        total(task(batch)).backward()
        begun = time.perf_counter()
        total(task(batch)).backward()
        each = time.perf_counter() - begun
        say(f"time: about {each * steps:.0f} s of training, {1000 * each:.0f} ms a step")
    say("nothing was written")
