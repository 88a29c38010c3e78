"""``weightshare federate``: contribution earns the model, attackers lose it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from weightshare.federated.config import FederateConfig
    from weightshare.federated.simulation import Simulation

CONFIG = "weightshare.federated.config:FederateConfig"
EXTRA = "federated"
EXAMPLES = """
  weightshare federate digits --attack sign_flip --adversaries 2
  weightshare federate digits --partition power --rounds 40 --out runs/power
  weightshare federate digits --attack alie --adversaries 4 --strategy robust
  weightshare federate mnist --samples 6000 --strategy median --attack label_flip --adversaries 11
  weightshare federate digits --attack free_rider --adversaries 2 --observe --dry-run
  weightshare federate texts/ --model tiny --adapter lora --attack sign_flip --adversaries 1
"""

FEW = 1000
"""Test samples up to which everyone is evaluated after every round."""


def run(config: "FederateConfig") -> None:
    """Run one federation and leave a run directory."""
    from pathlib import Path

    from weightshare.cli.console import say, show_table
    from weightshare.report import Run
    from weightshare.training import device_of

    device = device_of(config.device)
    config.check()
    if config.dry_run:
        with one_thread():
            show_plan(federation(config))
        return
    # Before the run is opened: options that the data refuse must not leave a folder behind.
    here = federation(config, Path(config.out) / "server")

    with (
        one_thread(),
        Run.open(
            config.out,
            config,
            command="federate",
            resume=config.resume,
            harmless=["checkpoint_every"],
        ) as run,
    ):
        # 1. Everyone trains alone: what the federation has to beat.
        run.summary(rounds=config.rounds, device=str(device), strategy=config.strategy)
        alone = run.stage("alone", here.alone)

        # 2. The rounds, from the last checkpoint on.
        done = here.restore(run.checkpoints)
        run.truncate(done)
        with progress(config.rounds) as advance:
            here.run(after=lambda now: after_round(now, run, advance))

        # 3. What it was worth, to whom.
        rows = participant_rows(here, alone)
        run.save("checkpoint.safetensors", lambda path: save_models(path, here))
        run.summary(**facts(here, rows))
        if config.model:
            run.save("adapters", lambda folder: save_adapters(folder, here))
        draw(run, here, alone, rows)
        show_table(f"{config.strategy} on {config.data}, {config.attack}", rows)
        say(verdict(run.summary()))
        say(f"report: {run.path / 'report.html'}")


def federation(config: "FederateConfig", folder: "Path | None" = None) -> "Simulation":
    """What the options describe; only this knows that a model means adapters."""
    if config.model is None:
        from weightshare.federated.simulation import simulate

        return simulate(config, folder)

    from weightshare.cli.models import add_adapter, open_model
    from weightshare.federated.texts import simulate_texts
    from weightshare.shards import adapter_config

    source = open_model(config.model, "fp32", config.device)
    adapter = adapter_config(config.adapter, source.model, equivalent_rank=config.equivalent_rank)
    model = add_adapter(source, adapter, config.seed)
    return simulate_texts(config, model, source.tokenizer, folder)


def after_round(here: "Simulation", run: Any, advance: Any) -> None:
    """Log the round, write a checkpoint when one is due, move the bar."""
    config, scores = here.config, {}
    last = here.done == config.rounds
    if last or here.material.tested <= FEW or here.done % config.checkpoint_every == 0:
        found = {name: row["accuracy"] for name, row in here.accuracies().items()}
        good = [found[name] for name in here.honest]
        scores = {"accuracy.best": max(good), "accuracy.mean": sum(good) / len(good)}
    if here.reputation is not None and (judged := here.reputation.last) is not None:
        scores |= {f"reputation.{name}": value for name, value in judged.reputation.items()}
        scores |= {f"quota.{name}": value for name, value in judged.quotas.items()}
        scores["threshold"] = judged.threshold
    run.log(here.done, **scores, **here.metrics)
    if last or here.done % config.checkpoint_every == 0:
        here.save(run.checkpoints)
    advance(here.done, scores.get("accuracy.mean"))


def participant_rows(here: "Simulation", alone: dict[str, float]) -> list[dict[str, Any]]:
    """The table of participants."""
    found, strategy = here.accuracies(), here.reputation
    rows = []
    quotas: dict[str, float] = {}
    rounds: dict[str, int] = {}
    if strategy is not None:
        # From the log: a resumed run that had only its report to write has judged nobody itself.
        for event in strategy.log.rows():
            if event["event"] == "judged" and event["round"] == strategy.standing.round:
                quotas[event["name"]] = event["quota"]
            elif event["event"] in ("expelled", "suspended"):
                rounds[event["name"]] = event["round"]
    for name in [*here.honest, *here.adversaries]:
        row: dict[str, Any] = {
            "participant": name,
            "samples": here.examples[name],
            "alone": round(alone[name], 3) if name in alone else None,
            "accuracy": round(found[name]["accuracy"], 3),
            "gain": round(found[name]["accuracy"] - alone[name], 3) if name in alone else None,
        }
        if "loss" in found[name]:
            row["loss"] = round(found[name]["loss"], 4)
        if strategy is not None:
            row["reputation"] = round(strategy.standing.reputation.get(name, 0.0), 4)
            row["quota"] = round(quotas.get(name, 0.0), 3)
            row["removed"] = rounds[name] if name in strategy.removed else None
        rows.append(row)
    return rows


def facts(here: "Simulation", rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a script reads of the run."""
    from math import isfinite

    from weightshare.federated import fairness

    good = [row for row in rows if row["participant"] in here.honest]
    bad = [row["accuracy"] for row in rows if row["participant"] in here.adversaries]
    accuracy, gain = [r["accuracy"] for r in good], [r["gain"] for r in good]
    fair = fairness([r["alone"] for r in good], accuracy)
    removed = here.reputation.removed if here.reputation else set()
    found = here.accuracies()
    result: dict[str, Any] = {
        "accuracy": {
            "best": max(accuracy),
            "mean": sum(accuracy) / len(accuracy),
            "min": min(accuracy),
            "adversaries": sum(bad) / len(bad) if bad else None,
        },
        "alone": {"mean": sum(r["alone"] for r in good) / len(good)},
        "gain": {"mean": sum(gain) / len(gain), "min": min(gain)},
        "fairness": fair.value if isfinite(fair.value) else None,
        "fairness_reason": fair.reason,
        "expelled": {
            "honest": sum(name in here.honest for name in removed),
            "adversaries": sum(name in here.adversaries for name in removed),
        },
        "bytes": {"sent": here.grid.sent_bytes, "received": here.grid.received_bytes},
    }
    losses = [row["loss"] for row in good if "loss" in row]
    if losses:
        result["loss"] = {"mean": sum(losses) / len(losses)}
    if here.config.attack == "label_flip":
        best = max(here.honest, key=lambda name: found[name]["accuracy"])
        result["label_flip"] = {key: found[best][key] for key in ("target", "success")}
    return result


def verdict(summary: dict[str, Any]) -> str:
    """The outcome in a line."""
    fair = summary["fairness"]
    fairness = f"{fair:.1f}" if fair is not None else f"undefined ({summary['fairness_reason']})"
    gain, out = summary["gain"], summary["expelled"]
    return (
        f"accuracy mean {summary['accuracy']['mean']:.3f}, gain over training alone "
        f"{gain['mean']:+.3f} (least {gain['min']:+.3f}); fairness {fairness}; removed "
        f"{out['adversaries']} adversaries and {out['honest']} honest participants"
    )


def save_models(path: Any, here: "Simulation") -> None:
    """Everyone's final model, flat, by participant."""
    from safetensors.numpy import save_file

    save_file(here.vectors(), path)


def save_adapters(folder: Any, here: "Simulation") -> None:
    """Everyone's adapter in PEFT's format, a folder each."""
    from weightshare.federated.adapters import Adapter

    model = here.material.task.model
    adapter = Adapter(model)
    for name, vector in here.vectors().items():
        adapter.write(vector)
        model.save_pretrained(folder / name)


def draw(run: Any, here: "Simulation", alone: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """The report."""
    from weightshare.federated import figures

    summary = run.summary()
    run.key("accuracy of the honest", f"{summary['accuracy']['mean']:.1%}", "mean")
    run.key("gain over training alone", f"{summary['gain']['mean']:+.1%}")
    if here.adversaries:
        out = summary["expelled"]
        run.key("adversaries removed", f"{out['adversaries']} of {len(here.adversaries)}")
        run.key("honest removed", f"{out['honest']} of {len(here.honest)}")
    note = "Fairness is 100 for training alone by definition: read it beside the gain."
    run.rows("participants", rows, f"Final accuracy on held-out data. {note}")
    if here.reputation is not None:
        logged = run.metrics()
        courses: dict[str, dict[str, list[tuple[int, float]]]] = {"reputation": {}, "quota": {}}
        for kind, course in courses.items():
            for name in [*here.honest, *here.adversaries]:
                key = f"{kind}.{name}"
                course[name] = [(row["step"], row[key]) for row in logged if key in row]
        threshold = [(row["step"], row["threshold"]) for row in logged if "threshold" in row]
        if threshold:
            run.figure(
                "reputation",
                figures.reputation_course(courses["reputation"], here.adversaries, threshold),
                "Reputation round by round; a line ends where its participant is removed.",
            )
            run.figure(
                "rewards",
                figures.rewards_received(courses["quota"], here.config.rounds),
                "Who received how much of the aggregate.",
            )
        decisions = [row for row in here.reputation.log.rows() if row["event"] != "judged"]
        if decisions:
            run.rows("decisions", decisions, "What the server has decided (the audit log).")
    together = {row["participant"]: row["accuracy"] for row in rows}
    run.figure(
        "fairness",
        figures.alone_and_together(alone, together),
        "Each honest participant, trained alone and after the federation.",
    )
    if here.config.attack == "label_flip" and here.material.confusion is not None:
        best = max(here.honest, key=lambda name: together[name])
        table = here.material.confusion(here.vectors()[best])
        run.figure(
            "confusion",
            figures.confusion_map(table),
            "The best honest model: what is taken for what (the attack wants "
            f"{here.material.flip[0]} taken for {here.material.flip[1]}).",
        )


def show_plan(here: "Simulation") -> None:
    """What a run would do: sizes, messages, memory, time."""
    import time

    from weightshare.cli.console import say, show_table

    config, size, count = here.config, len(here.initial), len(here.examples)
    # The first steps of a process take as long as many rounds: they are not part of the estimate.
    here.training.train({here.honest[0]: here.initial}, 1)
    begun = time.perf_counter()
    here.training.train(dict.fromkeys(here.honest, here.initial), 1)
    seconds = (time.perf_counter() - begun) * config.rounds * 2.2
    samples = sorted(here.examples[name] for name in here.honest)
    rows = [
        {"what": "participants", "value": f"{len(here.honest)} honest, {config.adversaries} not"},
        {"what": "samples", "value": f"{samples[0]} to {samples[-1]} each"},
        {"what": "model", "value": f"{size:,} weights"},
        {"what": "messages", "value": f"up to {8 * size * count / 1e6:.2f} MB a round"},
        {"what": "server memory", "value": f"{8 * size * count / 1e6:.1f} MB"},
        {"what": "time", "value": f"about {seconds:.0f} s for {config.rounds} rounds"},
    ]
    show_table(f"{config.strategy} on {config.data}", rows)
    say("nothing was written; leave out --dry-run to run it")


@contextmanager
def one_thread() -> Iterator[None]:
    """Small steps on one thread: more of them cost up to ten times as much on a busy machine, and
    the bits would depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress(rounds: int) -> Any:
    """A bar that is given (round, mean accuracy)."""
    from rich import progress as bars
    from rich.console import Console

    @contextmanager
    def showing() -> Any:
        with bars.Progress(
            bars.TextColumn("rounds"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[said]}"),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
        ) as bar:
            task = bar.add_task("rounds", total=rounds, said="")

            def advance(done: int, accuracy: float | None) -> None:
                bar.update(task, completed=done)
                if accuracy is not None:
                    bar.update(task, said=f"accuracy {accuracy:.3f}")

            yield advance

    return showing()
