"""``weightshare evaluate``: what a language model is worth, alone or beside another one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightshare.language import LanguageModel
    from weightshare.language.config import EvaluateConfig

CONFIG = "weightshare.language.config:EvaluateConfig"
EXTRA = "folding"
EXAMPLES = """
  weightshare evaluate tiny
  weightshare evaluate runs/fold --against tiny
  weightshare evaluate tiny --adapter runs/tune
  weightshare evaluate smollm2-135m --text notes.txt --tasks piqa,arc_easy --limit 200
"""

LONGEST = 1024
"""Tokens per window unless more are asked for."""


def run(config: "EvaluateConfig") -> None:
    """Score one model, or two on the same text and tasks."""
    from weightshare.cli.console import say, show_table
    from weightshare.cli.models import open_model, with_adapter
    from weightshare.language import above_chance, compare, kept, model_path
    from weightshare.report import Run

    names = [config.model, *([config.against] if config.against else [])]
    for name in names:
        model_path(name)  # a wrong second name is told before the first model is measured
    with Run.open(config.out, config, command="evaluate", overwrite=config.overwrite) as run:
        found: list[dict[str, Any]] = []
        for name in names:
            say(f"evaluating {name}")
            source = open_model(name, config.dtype, config.device)
            if config.adapter is not None and name == config.model:
                source = with_adapter(source, config.adapter)
            found.append(measure(source, config))
        first = found[0]
        run.summary(device=first["device"], **first["summary"])
        if first["tasks"]:
            run.summary(above_chance=above_chance(first["tasks"]))
        if config.against:
            second = found[1]
            run.summary(against={"model": config.against, **second["summary"]})
            if first["score"] and second["score"]:
                added, error = compare(second["score"], first["score"])
                run.summary(loss_difference={"mean": added, "stderr": error})
                say(f"loss of {names[0]} minus {names[1]}: {added:+.4f} ± {error:.4f} nats")
            if first["tasks"]:
                share = kept(second["tasks"], first["tasks"])
                run.summary(
                    kept={
                        "percent": share.percent,
                        "above_chance": share.above_chance,
                        "interval": [share.low, share.high],
                        "tasks": list(share.tasks),
                    }
                )
        rows = [{"model": name, **one["row"]} for name, one in zip(names, found, strict=True)]
        run.rows("models", rows, "The same text for every model.")
        show_table("text, size, speed", rows)
        if first["tasks"]:
            table = task_rows(names, found)
            run.rows("tasks", table, "Zero-shot accuracy; in brackets, its standard error.")
            show_table("zero-shot tasks", table)
        say(f"report: {run.path / 'report.html'}")


def measure(source: "LanguageModel", config: "EvaluateConfig") -> dict[str, Any]:
    """Everything asked for of one model: its score, its tasks, a summary and a table row."""
    from weightshare.language import decode_speed, evaluate, read_documents, windows, zero_shot
    from weightshare.sharing import size

    longest = getattr(source.model.config, "max_position_embeddings", LONGEST)
    length = config.sequence_length or min(LONGEST, longest)
    counted = size(source.model)
    summary: dict[str, Any] = {"parameters": counted.unique, "bytes": counted.bytes}
    row: dict[str, Any] = {"parameters": counted.unique, "bytes in memory": counted.bytes}
    score, tasks = None, {}
    if config.text != "none":
        documents = read_documents(config.text)
        text = windows(source.tokenizer, documents, length, limit=config.sequences or None)
        score = evaluate(source.model, text, config.batch_size)
        summary |= {
            "loss": score.loss,
            "loss_stderr": score.stderr,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "tokens": score.tokens,
        }
        row |= {
            "loss": round(score.loss, 4),
            "perplexity": round(score.perplexity, 3),
            "bits/byte": round(score.bits_per_byte, 4),
        }
    if config.tasks:
        names = [name.strip() for name in config.tasks.split(",") if name.strip()]
        tasks = zero_shot(source.model, source.tokenizer, names, config.limit or None)
        summary["tasks"] = {
            name: {key: getattr(one, key) for key in ("acc", "acc_norm", "stderr", "chance", "n")}
            for name, one in tasks.items()
        }
    if config.speed:
        speed = decode_speed(source.model, source.tokenizer, min(64, longest // 2)).median
        summary["tokens_per_second"] = speed
        row["tokens/s"] = round(speed, 1)
    device = str(source.model.device)
    return {"score": score, "tasks": tasks, "summary": summary, "row": row, "device": device}


def task_rows(names: list[str], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task, one column per model."""
    rows = []
    for task, score in found[0]["tasks"].items():
        row: dict[str, Any] = {"task": task, "n": score.n, "chance": round(score.chance, 3)}
        for name, one in zip(names, found, strict=True):
            value = one["tasks"][task]
            row[name] = f"{value.value:.3f} ({value.stderr:.3f})"
        rows.append(row)
    return rows
