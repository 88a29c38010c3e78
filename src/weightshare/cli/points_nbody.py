"""``weightshare points nbody``: charged particles, where will they be?"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightshare.equivariant.config import PointsConfig


def nbody(config: "PointsConfig") -> None:
    """Charged particles: where will they be?"""
    import torch

    from weightshare.cli.console import say, show_table
    from weightshare.cli.points_training import CHECKED, estimate, rounded, save, sizes, train
    from weightshare.equivariant import DynamicsTask, Ponita, figures, measure
    from weightshare.equivariant.dynamics import VECTORS, Even, columns, sample_errors
    from weightshare.equivariant.nbody import HORIZON, check_counts, constant_velocity
    from weightshare.equivariant.symmetrised import symmetrise
    from weightshare.report import Run
    from weightshare.training import device_of

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
    horizon = HORIZON if config.momentum else None
    task = DynamicsTask(network, horizon).to(device)
    counts = (config.train_size or 3000, config.valid_size or 2000, config.test_size or 2000)
    check_counts(counts)
    if config.dry_run:
        batch = {name: torch.randn(config.size("batch_size"), 5, 3) for name in VECTORS}
        batch["charges"] = torch.ones(config.size("batch_size"), 5)
        estimate(config, task, counts[0], {k: v.to(device) for k, v in batch.items()})
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
            signs=("charges",) if config.signs else (), rescaled=config.scales,
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
            even = Even(network) if config.signs else network
            averaged = DynamicsTask(symmetrise(even, config.rotations), horizon)
            signs = " and both signs" if config.signs else ""
            rows.append(
                {
                    "method": f"averaged over {config.rotations} rotations{signs}",
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
