"""``weightshare points qm9``: a property of small molecules."""

from typing import TYPE_CHECKING, Any

from weightshare.errors import UserError

if TYPE_CHECKING:
    from weightshare.equivariant.config import PointsConfig


def qm9(config: "PointsConfig") -> None:
    """The community's split, or its first molecules; mean absolute error in the usual unit."""
    import numpy as np
    import torch

    from weightshare.cli.console import say, show_table
    from weightshare.cli.points_training import CHECKED, estimate, rounded, save, sizes, train
    from weightshare.equivariant import Ponita, PropertyTask, figures, load_qm9, measure
    from weightshare.equivariant.qm9 import SYMBOLS, TARGETS, UNITS
    from weightshare.equivariant.symmetrised import symmetrise
    from weightshare.report import Run
    from weightshare.training import device_of, held_out

    device = device_of(config.device)
    if config.target not in TARGETS:
        raise UserError(f"--target is {config.target!r}; give one of {', '.join(TARGETS)}.")
    say("reading QM9")
    molecules, unit = load_qm9(), UNITS[config.target]
    rows = split(molecules, config)
    most = int(np.diff(molecules.start).max())
    sets = {part: molecules.columns(some, config.target, most) for part, some in rows.items()}
    truth = sets["train"]["value"]
    torch.manual_seed(config.seed)
    species = list(SYMBOLS.values())
    network = Ponita(
        len(species), scalars_out=1, level="graph", invariants=config.invariants,
        multiple_readouts=False, **sizes(config),
    )  # fmt: skip
    task = PropertyTask(network, species, float(truth.mean()), float(truth.std())).to(device)

    def batches(part: str, size: int = 250) -> Any:
        count = len(rows[part])
        for low in range(0, count, size):
            yield {k: v[low : low + size].to(device) for k, v in sets[part].items()}

    first = next(batches("train", config.size("batch_size")))
    if config.dry_run:
        estimate(config, task, len(truth), first)
        return
    with Run.open(config.out, config, command="points", resume=config.resume) as run:
        run.summary(device=str(device), data={k: len(v) for k, v in rows.items()})

        # 1. Train.
        network.calibrate_(*task.inputs(first), mask=first["mask"])
        seconds = train(
            config, run, task, sets["train"], ("positions",), watch="mae",
            evaluate=lambda: {"mae": held_out(task, batches("valid"))["mae"]},
        )  # fmt: skip

        # 2. Test, turn, compare: a sum over the atoms of each element is the baseline.
        fitted = composition_error(species, sets["train"], sets["test"])
        error = held_out(task, batches("test"))["mae"]
        table: list[dict[str, Any]] = [
            {"method": "sum over the elements", f"mae_{unit}": fitted},
            {"method": "trained network", f"mae_{unit}": error},
        ]
        if config.rotations > 1 and config.size("orientations"):
            task.network = symmetrise(network, config.rotations)
            mae = held_out(task, batches("test"))["mae"]
            name = f"averaged over {config.rotations} rotations"
            table.append({"method": name, f"mae_{unit}": mae})
            task.network = network
        checked = next(batches("test", CHECKED))
        spread = measure.property_spread(task, checked)
        run.summary(
            parameters=sum(p.numel() for p in task.parameters()),
            test={"mae": error, "unit": unit},
            baselines={"composition": fitted},
            equivariance_error=spread / float(task.deviation),
            rotation_spread=spread,
            seconds={"train": seconds},
        )
        save(run, network)

        # 3. Draw.
        run.key(f"{config.target}, error", f"{error:.3g} {unit}", "mean absolute, test")
        run.key("spread over rotations", f"{spread:.3g} {unit}")
        run.rows("test", table, f"Mean absolute error of {config.target} on test molecules.")
        names = {"mae": "training", "evaluation.mae": "validation"}
        run.figure("course", figures.course(run.metrics(), names, f"MAE ({unit})"), "Errors.")
        with torch.no_grad():
            said = task.predict(checked).cpu().tolist()
        pair = (checked["value"].cpu().tolist(), said, unit, config.target)
        run.figure("parity", figures.parity(*pair), "Test molecules.")
        show_table("test molecules", rounded(table))
        say(f"report: {run.path / 'report.html'}")


def split(molecules: Any, config: "PointsConfig") -> dict[str, Any]:
    """Rows of each part: the community's split, or as many of its first molecules as asked for."""
    whole = molecules.split()
    asked = {"train": config.train_size, "valid": config.valid_size, "test": config.test_size}
    for part, count in asked.items():
        if count > len(whole[part]):
            raise UserError(
                f"--{part}-size is {count}; the split has {len(whole[part])} molecules there."
            )
    return {part: whole[part][: count or None] for part, count in asked.items()}


def composition_error(species: list[int], train: Any, test: Any) -> float:
    """Test error of the least-squares sum over the atoms of each element, and a constant."""
    import torch

    def counts(part: Any) -> Any:
        found = (part["numbers"].unsqueeze(-1) == torch.tensor(species)).sum(1).double()
        return torch.cat([found, torch.ones(len(found), 1, dtype=torch.float64)], 1)

    fit = torch.linalg.lstsq(counts(train), train["value"][:, None], driver="gelsd").solution
    return float((counts(test) @ fit - test["value"][:, None]).abs().mean())
