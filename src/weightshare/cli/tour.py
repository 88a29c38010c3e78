"""``weightshare tour``: every system on real data that ships with the library.

A stop runs one command at a small size and returns a line for the closing table. It is the short
form: minutes of two CPU cores, one seed. The figures of record are in docs/ and benchmarks/.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightshare.errors import UserError

CONFIG = "weightshare.cli.tour:TourConfig"
EXTRA = "all"
EXAMPLES = """
  weightshare tour
  weightshare tour --only fold --out runs/tour
"""

MARK = "tour.json"
"""What marks a folder as a tour's, so that --overwrite removes nothing else."""


@dataclass
class TourConfig:
    """Run every system, small, on real data that ships inside the package.

    Args:
        out: folder for the runs of the tour and their common report.
        only: stops to visit, separated by commas; all by default.
        short: a one-minute cut, for checking that everything works.
        overwrite: replace an earlier tour in the same folder.
    """

    out: str = "runs/tour"
    only: str = ""
    short: bool = False
    overwrite: bool = False


def run(config: TourConfig) -> None:
    """Visit the stops, then print the table and write the common report."""
    from weightshare.cli.console import say, show_table
    from weightshare.report import index

    chosen = [name.strip() for name in config.only.split(",") if name.strip()] or list(STOPS)
    for name in chosen:
        if name not in STOPS:
            raise UserError(f"{name!r} is not a stop of the tour; use {', '.join(STOPS)}.")
    out = Path(config.out)
    prepare(out, config.overwrite)
    rows, runs = [], {}
    for number, name in enumerate(chosen, 1):
        title, stop = STOPS[name]
        say(f"\n[{number}/{len(chosen)}] {title}")
        begun = time.perf_counter()
        row = stop(out / name, config.short)
        rows.append({"system": name, **row, "seconds": round(time.perf_counter() - begun)})
        runs[title] = out / name
    (out / MARK).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    title = "A tour of weightshare"
    text = "Every system at a small size, one seed, on two CPU cores: the short form of each."
    index(runs, out / "report.html", title=title, text=text, rows=rows)
    show_table(title, rows)
    say(f"report: {out / 'report.html'}")


def prepare(out: Path, overwrite: bool) -> None:
    """An empty folder for the tour.

    Raises:
        UserError: the folder holds something that may not be removed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARK).is_file():
            raise UserError(f"{out} exists and is not a tour's; give another --out.")
        if not overwrite:
            raise UserError(f"{out} holds an earlier tour; add --overwrite or give another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("[]\n", encoding="utf-8")


def fold_stop(out: Path, short: bool) -> dict[str, Any]:
    """Fold the shipped model by about the paper's 36 % of its blocks, cure it, load it back."""
    from weightshare.cli.fold import run as fold
    from weightshare.folding.config import CureConfig, FoldConfig

    cure = CureConfig(steps=5 if short else 20, batch_size=4, learning_rate=3e-3, evaluate_every=10)
    config = FoldConfig(
        model="tiny",
        remove=0.17,
        target_params=1_720_000,
        ranking="greedy",
        calibration_sequences=4 if short else 8,
        sequence_length=128 if short else 256,
        cure=cure,
        out=str(out),
    )
    fold(config)
    facts = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    losses = facts["loss"]
    if not short:
        say_gates_beside_greedy(config, facts["removed"])
    return {
        "shared": "blocks at several depths",
        "saved": f"{facts['blocks']['saved_fraction']:.0%} of the blocks' weights",
        "cost": f"loss {losses['before']:.2f} → {losses['cured']:.2f} nats",
        "baseline": f"{losses['folded']:.2f} before the cure",
        "paper": "36 % saved, 96 % of accuracy kept (LLaMA-2-7B)",
    }


def say_gates_beside_greedy(config: Any, removed: list[int]) -> None:
    """Print what 60 steps of one seed of gates would have removed, and what that costs."""
    from weightshare.cli.console import say
    from weightshare.cli.models import open_model
    from weightshare.folding import GateConfig, rank
    from weightshare.folding.blocks import BlockLosses
    from weightshare.folding.texts import fold_texts

    source = open_model(config.model)
    calibration = fold_texts(config, source)[0]["calibration"].input_ids
    quick = GateConfig(steps=60, seeds=1, sequences=4)
    found = rank(source.model, calibration, "gates", remove=len(removed), gates=quick, progress=say)
    losses = BlockLosses(source.model, calibration)
    by_gates = sorted(found.order[: len(removed)])
    costs = [
        losses.of([block for block in range(losses.blocks) if block not in gone])
        for gone in (by_gates, removed)
    ]
    say(f"calibration loss without {by_gates}, by gates (short form): {costs[0]:.3f}")
    say(f"calibration loss without {removed}, by greedy removal: {costs[1]:.3f}")


def tune_stop(out: Path, short: bool) -> dict[str, Any]:
    """Tune the shipped model with shards, and with LoRA of the same budget beside it."""
    from dataclasses import replace

    from weightshare.cli.console import say
    from weightshare.cli.models import open_model
    from weightshare.cli.ranks import ranks
    from weightshare.cli.tune import read, trial, usual_rate
    from weightshare.cli.tune import run as tune
    from weightshare.cli.tune_config import TuneConfig

    config = TuneConfig(
        model="tiny",
        steps=6 if short else 25,
        batch_size=4,
        sequence_length=64 if short else 128,
        evaluate_every=100,
        out=str(out),
    )
    tune(config)
    facts = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    source = open_model(config.model)
    data = read(config, source)
    budget = round(config.equivalent_rank)
    lora = replace(config, method="lora", rank=budget)
    beside = trial(lora, source, data, usual_rate(lora), ranks(config.device))
    say(f"held-out loss with LoRA of rank {budget}: {beside:.4f}")
    losses = facts["loss"]
    return {
        "shared": "adapters of all layers",
        "saved": f"rank {4 * budget} in {facts['parameters']['trainable']:,} parameters, "
        f"LoRA takes {4 * facts['parameters']['trainable']:,}",
        "cost": f"loss {losses['before']:.3f} → {losses['after']:.3f} nats",
        "baseline": f"{beside:.3f} by LoRA of equal budget",
        "paper": "36.4 against 35.0 points (LLaMA2-7B, 5 M parameters)",
    }


def points_stop(out: Path, short: bool) -> dict[str, Any]:
    """Simulate charged particles, learn where they go, turn the network."""
    from weightshare.cli.points import run as points
    from weightshare.equivariant.config import PointsConfig

    sizes = (60, 30, 60) if short else (400, 50, 150)
    points(
        PointsConfig(
            data="nbody",
            train_size=sizes[0],
            valid_size=sizes[1],
            test_size=sizes[2],
            epochs=8 if short else 30,
            batch_size=30 if short else 40,
            out=str(out),
        )
    )
    facts = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {
        "shared": "one kernel for all pairs that are equal up to a rotation",
        "saved": f"{facts['parameters']:,} weights serve every pose",
        "cost": f"{facts['equivariance_error']:.1%} change under rotation",
        "baseline": f"test MSE {facts['test']['mse']:.3f}, "
        f"constant velocity {facts['baselines']['constant_velocity']:.3f}",
        "paper": "0.0043 (EGNN 0.0070) after 10,000 epochs",
    }


def audit_stop(out: Path, short: bool) -> dict[str, Any]:
    """Audit a folded model before its cure, where the blocks' wishes still differ, and probe it."""
    from weightshare.audit.config import AuditConfig
    from weightshare.cli.audit import run as audit
    from weightshare.folding import FoldPlan, fold
    from weightshare.language import load_model

    source = load_model("tiny")
    folded = fold(source.model, FoldPlan(len(source.model.model.layers), groups=((3, 4), (6, 7))))
    model = out.parent / "audited"
    folded.save_pretrained(model)
    source.tokenizer.save_pretrained(model)
    config = AuditConfig(
        model=str(model),
        batches=4 if short else 6,
        batch_size=2,
        sequence_length=64 if short else 128,
        probe=1 if short else 2,
        probe_steps=3 if short else 10,
        out=str(out),
    )
    audit(config)
    facts = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    cosines = {name: one["cosine"] for name, one in facts["agreement"].items()}
    least = min(cosines, key=lambda name: cosines[name])
    gains = facts["probe"]["gain_per_parameter"]
    return {
        "shared": f"{facts['shared_weights']} weights; {least}: {cosines[least]:+.2f}",
        "saved": f"{facts['saved_parameters']:,} parameters",
        "cost": f"suggested unsharings gain {1e6 * gains['suggested']:.1f} nats per million",
        "baseline": f"random ones {1e6 * gains['random']:.1f}",
        "paper": "–",
    }


def federate_stop(out: Path, short: bool) -> dict[str, Any]:
    """Ten honest participants and two that send the opposite of what they have learnt."""
    from weightshare.cli.federate import run as federate
    from weightshare.federated.config import FederateConfig

    federate(
        FederateConfig(
            data="digits",
            attack="sign_flip",
            adversaries=2,
            rounds=12 if short else 25,
            out=str(out),
        )
    )
    facts = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    removed = facts["expelled"]
    return {
        "shared": "a model between participants",
        "saved": f"removed {removed['adversaries']} of 2 attackers, {removed['honest']} honest",
        "cost": f"accuracy {facts['accuracy']['mean']:.3f}, attackers "
        f"{facts['accuracy']['adversaries']:.3f}",
        "baseline": f"{facts['alone']['mean']:.3f} trained alone",
        "paper": "contribution earns the model, attackers are removed (no figure)",
    }


STOPS: dict[str, tuple[str, Callable[[Path, bool], dict[str, Any]]]] = {
    "fold": ("FoldGPT: fold a language model", fold_stop),
    "audit": ("Audit: who disagrees, and is unsharing worth it", audit_stop),
    "tune": ("Mixture of Shards: adapt it with a small adapter", tune_stop),
    "points": ("PONITA: learn where particles go, in any orientation", points_stop),
    "federate": ("RFFL: contribution earns the model, attackers lose it", federate_stop),
}
"""Stops in order: name -> (title, function of the run directory and whether the tour is short)."""
