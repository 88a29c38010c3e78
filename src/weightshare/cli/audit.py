"""``weightshare audit``: who shares which weight, do they agree, what would it buy to unshare."""

import math
from typing import TYPE_CHECKING, Any

from weightshare.cli.options import dashed
from weightshare.errors import UserError

if TYPE_CHECKING:
    from weightshare.audit import Audit, Probe, Suggestion
    from weightshare.audit.config import AuditConfig
    from weightshare.language import LanguageModel

CONFIG = "weightshare.audit.config:AuditConfig"
EXTRA = "folding"
EXAMPLES = """
  weightshare audit runs/fold
  weightshare audit runs/fold --data notes.txt --per tensor --budget 100000
  weightshare audit runs/fold --per tensor --trial 50 --budget 100000 --scales-first
  weightshare audit tiny --probe 4 --out runs/audit
"""

LONGEST = 256
MAPS, LISTED = 12, 12
"""Heat maps in the report, and suggestions printed."""


def run(config: "AuditConfig") -> None:
    """Audit one language model and leave a run directory."""
    from weightshare.audit import ProbeConfig, audit, figures, probe, scales_first, spend
    from weightshare.audit.language import language_loss
    from weightshare.cli.console import say, show_table, working
    from weightshare.cli.models import open_model
    from weightshare.report import Run

    check(config)
    source = open_model(config.model, config.dtype, config.device)
    audited, trial, heldout = read_batches(config, source)
    with Run.open(
        config.out, config, command="audit", resume=config.resume, overwrite=config.overwrite
    ) as run:
        run.summary(device=str(source.model.device), model=config.model)

        # 1. Measure.
        with working("measuring") as tell:
            found = audit(
                source.model,
                audited,
                language_loss,
                per=config.per,
                sketch=config.sketch or None,
                groups=config.groups,
                rank=config.rank,
                metric=config.metric,
                trial=trial,
                learning_rate=config.probe_learning_rate,
                patience=config.patience or None,
                seed=config.seed,
                progress=tell,
            )
        run.summary(**summary_of(found))
        if not found.findings:
            say_unshared(run, found)
            return
        show_table("who shares what, and do they agree", found.rows())
        run.rows("shared", found.rows(), "Shared weights, the least agreeing first.")
        run.figure(
            "agreement",
            figures.agreement_bars(**figures.agreements_data(found)),
            "Mean cosine of the users' gradients with its 95 % interval.",
        )
        for number, one in enumerate(found.findings[:MAPS]):
            run.figure(
                f"users-{number}",
                figures.agreement_map(**figures.agreement_data(one)),
                f"{one.layer.name}: cosines of its users.",
            )
        for one in found.findings:
            if one.never:
                say(f"never got a gradient: {', '.join(one.never)}")

        # 2. Advise.
        rows = [suggestion.row() for suggestion in found.suggestions]
        show_table("what to unshare, best first", rows[:LISTED])
        about = f"after a trial of {config.trial} steps" if config.trial else "along one step"
        run.rows("suggestions", rows, f"Gain in loss {about}, per added parameter.")
        useful = [s for s in found.suggestions if s.beyond_chance and s.predicted > 0]
        chosen = useful[:1]
        if config.budget:
            if config.scales_first:
                chosen = scales_first(found.suggestions, config.budget)
            else:
                chosen = spend(useful, config.budget)
            run.rows(
                "budget", [s.row() for s in chosen], f"{config.budget} parameters, best spent."
            )
            if chosen:
                show_table(f"{config.budget:,} parameters, best spent", [s.row() for s in chosen])
            else:
                say("nothing is worth the budget: no shared weight disagrees beyond chance")
        save_plan(run, source, chosen)

        # 3. Check the promises.
        if config.probe:
            tried = probe(
                source.model,
                audited,
                heldout,
                language_loss,
                found,
                ProbeConfig(
                    suggested=config.probe,
                    random=config.probe,
                    steps=config.probe_steps,
                    learning_rate=config.probe_learning_rate,
                    metric=config.metric,
                    seed=config.seed,
                ),
                progress=say,
                memo=run.memo("probe"),
            )
            report_probe(run, tried)
        say(f"report: {run.path / 'report.html'}")


def check(config: "AuditConfig") -> None:
    """Refuse numbers that make no sense."""
    least = {
        "batches": 4 if config.trial else 2,
        "trial": 0,
        "batch_size": 1,
        "groups": 2,
        "rank": 1,
        "probe": 0,
        "probe_steps": 1,
        "budget": 0,
        "patience": 0,
    }
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UserError(f"--{dashed(name)} is {getattr(config, name)}; give at least {value}.")
    for name, value in {"sketch": 8, "sequence_length": 2}.items():
        if getattr(config, name) != 0 and getattr(config, name) < value:
            raise UserError(
                f"--{dashed(name)} is {getattr(config, name)}; give 0 or at least {value}."
            )
    if config.scales_first and not config.budget:
        raise UserError("--scales-first says how to spend a budget; give --budget too.")
    if not config.probe_learning_rate > 0:
        raise UserError(f"--probe-learning-rate is {config.probe_learning_rate}; give one above 0.")


def read_batches(
    config: "AuditConfig", source: "LanguageModel"
) -> tuple[list[Any], list[Any], list[Any]]:
    """Batches to audit, those of a trial, and held-out ones for the probe."""
    from weightshare.audit.language import text_batches
    from weightshare.language import read_documents, windows

    documents = read_documents(config.data)
    cut = max(1, len(documents) * 4 // 5)
    longest = getattr(source.model.config, "max_position_embeddings", LONGEST)
    length = config.sequence_length or min(LONGEST, longest)
    if length > longest:
        raise UserError(
            f"--sequence-length is {length}, but the model was made for {longest} tokens at most."
        )
    device = source.model.device
    wanted = config.batches + config.trial
    batches = text_batches(
        windows(source.tokenizer, documents[:cut], length), wanted, config.batch_size, device
    )
    if config.trial and len(batches) < wanted:
        raise UserError(
            f"the text gives {len(batches)} batches, but --batches {config.batches} and --trial "
            f"{config.trial} take {wanted}; give more text, shorter sequences or smaller batches."
        )
    audited, trial = batches[: config.batches], batches[config.batches :]
    if not config.probe:
        return audited, trial, []
    if cut == len(documents):
        raise UserError(
            "--probe needs held-out text, but the data is a single document; give more than one."
        )
    rest = windows(source.tokenizer, documents[cut:], length)
    return audited, trial, text_batches(rest, config.batches, config.batch_size, device)


def summary_of(found: "Audit") -> dict[str, Any]:
    """What a script may rely on."""
    return {
        "shared_weights": len(found.findings),
        "parameters": {"unique": found.size.unique, "total": found.size.total},
        "saved_parameters": found.saved,
        "batches": found.batches,
        "agreement": {
            f.layer.name: {
                "cosine": defined(f.agreement),
                "low": defined(f.low),
                "high": defined(f.high),
                "conflict_rate": defined(f.conflict_rate),
                "beyond_chance": f.split.advised,
                "never_used": list(f.never),
            }
            for f in found.findings
        },
        "suggestions": [suggestion.row() for suggestion in found.suggestions],
    }


def defined(value: float) -> float | None:
    """What could not be estimated is null for a script, not a number that is none."""
    return value if math.isfinite(value) else None


def say_unshared(run: Any, found: "Audit") -> None:
    """No shared weight is an answer: show what could be shared."""
    from weightshare.cli.console import say, show_table

    say("no weight of this model is shared")
    rows = [
        {"first": s.first, "second": s.second, "cosine": round(s.cosine, 3), "would save": s.saved}
        for s in found.similar
    ]
    run.summary(similar=rows)
    if rows:
        run.rows("similar", rows, "Matrices of one shape with the most similar values.")
        show_table("most similar matrices of one shape", rows)
    say(f"report: {run.path / 'report.html'}")


def save_plan(run: Any, source: "LanguageModel", chosen: "list[Suggestion]") -> None:
    """For a folded model, what is worth unsharing as a fold plan."""
    from weightshare.audit.folded import is_folded, unshared_plan
    from weightshare.cli.console import say

    if not chosen or not is_folded(source.model):
        return
    path = run.save("plan.json", unshared_plan(source.model, *chosen).save)
    done = "; ".join(f"{s.row()['do']} for {s.unsharing.layer.name}" for s in chosen)
    say(f"plan with {done}: {path} (weightshare fold --plan)")


def report_probe(run: Any, tried: "Probe") -> None:
    """Promised and realised, side by side, with the correlation whatever its sign."""
    from weightshare.audit import figures
    from weightshare.cli.console import say, show_table

    rows = [trial.row() for trial in tried.trials]
    show_table("promised and realised", rows)
    run.rows("probe", rows, "Suggested and random unsharings, carried out at one budget.")
    run.figure(
        "probe",
        figures.promise_scatter(**figures.trials_data(tried)),
        "Realised against predicted gain of every trial.",
    )
    origins = ("suggested", "random")
    run.summary(
        probe={
            "rank_correlation": defined(tried.correlation),
            "low": defined(tried.low),
            "high": defined(tried.high),
            "rank_correlation_per_parameter": defined(tried.per_parameter),
            "gain": {k: defined(tried.mean_gain(k)) for k in origins},
            "gain_per_parameter": {k: defined(tried.mean_gain(k, True)) for k in origins},
        }
    )
    says = "rank correlation of predicted and realised gain: "
    if math.isnan(tried.correlation):
        say(says + "undefined; it takes at least three trials with different gains")
    elif math.isnan(tried.low):
        say(says + f"{tried.correlation:+.2f} (too few trials for an interval)")
    else:
        say(says + f"{tried.correlation:+.2f} (95 % {tried.low:+.2f} to {tried.high:+.2f})")
