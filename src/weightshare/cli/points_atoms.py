"""``weightshare points FILE``: a potential from structures with energies and forces."""

from typing import TYPE_CHECKING, Any

from weightshare.errors import UserError

if TYPE_CHECKING:
    from weightshare.equivariant.config import PointsConfig


def atoms(config: "PointsConfig") -> None:
    """Structures with energies and forces: a potential."""
    import torch

    from weightshare.cli.console import say, show_table
    from weightshare.cli.points_training import CHECKED, estimate, rounded, save, sizes, train
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
    from weightshare.training import device_of

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
    if config.stress_weight and not any(
        f.stress is not None and f.cell is not None for f in frames["train"]
    ):
        raise UserError(
            f"No structure of {config.data} to train on has a stress; leave out --stress-weight."
        )
    cutoff = config.cutoff or None
    most = max(len(frame) for part in frames.values() for frame in part)
    loaders = {
        part: Frames(rows, cutoff, None if periodic else most) for part, rows in frames.items()
    }
    everything = [z for part in frames.values() for f in part for z in f.numbers.tolist()]
    torch.manual_seed(config.seed)
    pulls = torch.cat([torch.from_numpy(f.forces).flatten() for f in frames["train"]])
    scale = float(pulls.square().mean().sqrt())
    if scale == 0:
        raise UserError(f"All forces in {config.data} are zero; there is nothing to learn.")
    potential = PonitaPotential(
        everything,
        cutoff=cutoff,
        scale=scale,
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
        config.stress_weight,
        per_atom=len({len(frame) for frame in frames["train"]}) > 1,
    ).to(device)
    size = min(config.size("batch_size"), len(frames["train"]))
    first = loaders["train"].batch(range(size), device)
    if config.dry_run:
        estimate(config, task, len(frames["train"]), first)
        return
    with Run.open(config.out, config, command="points", resume=config.resume) as run:
        captured = loaders["train"].dense and device.type == "cuda"
        run.summary(
            device=str(device), data={k: len(v) for k, v in frames.items()}, captured=captured
        )
        if device.type == "cuda" and not captured:
            say("steps are not captured as a CUDA graph: the number of neighbours changes")

        # 1. Train.
        options = {k: first[k] for k in ("edges", "shifts", "cell", "batch", "mask") if k in first}
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
                "force_mae_mev_a": float(checked["forces"].abs().nanmean() * 1000),
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
        typical = 1000 * float(said.forces.square().mean().sqrt())
        run.summary(
            parameters=sum(p.numel() for p in task.parameters()),
            test={k: v for k, v in rows[1].items() if k != "method"},
            baselines={k: v for k, v in rows[0].items() if k != "method"},
            equivariance_error=spread["force_mev_a"] / typical if typical else 0.0,
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
        known = torch.isfinite(checked["forces"])
        run.figure(
            "force-parity",
            figures.parity(
                checked["forces"][known].tolist(),
                said.forces[known].tolist(),
                "eV/Å",
                "force",
            ),
            "Force components of test structures.",
        )
        show_table("test structures", rounded(rows))
        say(f"report: {run.path / 'report.html'}")
