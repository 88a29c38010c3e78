"""``weightshare tune``: fine-tune a causal language model with a small adapter."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightshare.cli.tune_adapter import adapted, said
from weightshare.cli.tune_config import TuneConfig
from weightshare.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

    from weightshare.cli.ranks import Ranks
    from weightshare.language import LanguageModel
    from weightshare.shards import TuneData
    from weightshare.training import LoopConfig

CONFIG = "weightshare.cli.tune_config:TuneConfig"
EXTRA = "shards"
EXAMPLES = """
  weightshare tune tiny --steps 100
  weightshare tune ./my-llama --data questions.jsonl --equivalent-rank 2 --out runs/tune
  weightshare tune ./my-llama --data questions.jsonl --method lora --rank 8 --sweep 5e-4,1e-3,2e-3
  weightshare tune ./my-llama --method vblora --options num_vectors=90 --dry-run
  torchrun --nproc-per-node 4 -m weightshare tune ./my-llama --data questions.jsonl
"""

LONGEST = 512
"""Tokens per sequence unless more are asked for: memory grows with the length."""
NEW_TOKENS = 48


def run(config: TuneConfig) -> None:
    """Fine-tune one model and leave a run directory with its adapter."""
    from weightshare.cli.console import say, show_table
    from weightshare.cli.models import open_model
    from weightshare.cli.ranks import ranks
    from weightshare.language import continue_prompts
    from weightshare.report import Run
    from weightshare.shards import figures, tune
    from weightshare.shards.tuning import evaluate_loss

    rates = sweep_rates(config.sweep)
    if config.batch_size < 1:
        raise UserError(f"--batch-size is {config.batch_size}; give at least 1.")
    group = ranks(config.device)
    source = open_model(config.model, config.dtype, group.device)
    base = source.model
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    data = read(config, source)
    if config.dry_run:
        estimate(config, source, data)
        return
    check(config, source, data, rates)
    if not group.first:
        train_along(config, source, data, group)
        return

    with Run.open(config.out, config, command="tune", resume=config.resume) as run:
        say(f"{data.kind}: {data.targets:,} tokens to learn from")
        before = run.stage("before", lambda: evaluate_loss(base, data.heldout))
        texts = {"before": continue_prompts(base, source.tokenizer, data.prompts, NEW_TOKENS)}

        # 1. Try the learning rates.
        memo = run.memo("sweep")
        found = {
            rate: memo(
                f"{rate:g}", lambda rate=rate: trial(config, source, data, group.told(rate), group)
            )
            for rate in rates
        }
        group.told(None)
        rate = min(found, key=found.__getitem__) if found else usual_rate(config)
        if found:
            say("held-out loss " + ", ".join(f"{r:g}: {loss:.4f}" for r, loss in found.items()))

        # 2. Train.
        model = adapted(config, source)
        loop = loop_config(config, source, group.told(rate))
        fit = tune(model, data, loop, config.batch_size, run=run, accelerator=group.accelerator)

        # 3. Save it and say what it is worth.
        folder = run.save("adapter", lambda path: model.save_pretrained(str(path)))
        after = evaluate_loss(model, data.heldout)
        texts["after"] = continue_prompts(model, source.tokenizer, data.prompts, NEW_TOKENS)
        sizes = size_rows(config, source, model, Path(folder))
        trainable, total = model.get_nb_trainable_parameters()
        run.summary(
            method=config.method,
            model=config.model,
            data={
                "kind": data.kind,
                "tokens": data.targets,
                "sequences": len(data.train["labels"]),
            },
            parameters={"trainable": trainable, "total": total},
            loss={"before": before, "after": after},
            learning_rate=rate,
            sweep={f"{r:g}": loss for r, loss in found.items()},
            file={"bytes": (folder / "adapter_model.safetensors").stat().st_size},
            seconds={"per_step": fit.seconds / max(1, fit.step)},
            device=str(base.device),
        )
        run.key("trained parameters", f"{trainable:,}", f"{trainable / total:.2%} of the model")
        run.key("held-out loss", f"{before:.3f} → {after:.3f}", "nats per learnt token")
        logged = run.metrics()
        course = [
            [(row["step"], row[name]) for row in logged if name in row]
            for name in ("cross_entropy", "evaluation.loss")
        ]
        if any(course):
            run.figure("course", figures.course(*course), "Training and held-out loss.")
        if found:
            run.figure("sweep", figures.sweep(found, rate), "Each rate, trained from the start.")
        if config.method == "mos":
            run.figure("uses", figures.use_counts(shard_uses(model)), "Shards by their uses.")
        run.rows("sizes", sizes, "What an adapter takes, in files of float32.")
        samples = [
            {"prompt": prompt, "before": old, "after": new}
            for prompt, old, new in zip(data.prompts, texts["before"], texts["after"], strict=True)
        ]
        run.text("samples", "Held-out prompts continued", samples)
        show_table("sizes", sizes)
        say(f"held-out loss {before:.4f} before, {after:.4f} after (learning rate {rate:g})")
        say(f"report:  {run.path / 'report.html'}\nadapter: {folder}")


def train_along(
    config: TuneConfig, source: "LanguageModel", data: "TuneData", group: "Ranks"
) -> None:
    """What the processes behind the first do: train with it at the rates it names."""
    from weightshare.cli.ranks import Follower
    from weightshare.shards import tune

    while (rate := group.told()) is not None:
        trial(config, source, data, rate, group)
    tune(
        adapted(config, source),
        data,
        loop_config(config, source, group.told()),
        config.batch_size,
        run=Follower(config.out),
        accelerator=group.accelerator,
    )


def read(config: TuneConfig, source: "LanguageModel") -> "TuneData":
    """The data that the options name, cut for the model."""
    from weightshare.shards import read_data

    return read_data(
        source.tokenizer,
        config.data,
        config.heldout,
        kind=config.kind,
        length=sequence_length(config, source),
        packing=config.packing,
        limit=max(1, config.steps) * config.batch_size,
    )


def check(
    config: TuneConfig, source: "LanguageModel", data: "TuneData", rates: list[float]
) -> None:
    """Refuse what cannot be trained while there is no run directory yet to stand in the way."""
    import torch

    from weightshare.shards.methods import MEASURED
    from weightshare.shards.tuning import TuneTask

    for rate in rates or [usual_rate(config)]:
        loop_config(config, source, rate)
    model: Any = adapted(config, source)
    if config.method not in MEASURED:
        row = {name: column[:1].to(source.model.device) for name, column in data.train.items()}
        try:
            with torch.no_grad():
                TuneTask(model)(row)
        except Exception as error:  # whatever one of forty methods makes of missing options
            raise UserError(
                f"{config.method} does not run on tokens alone with these options "
                f"({said(error)}); give what it needs by --options, or another method."
            ) from error
    if hasattr(model.base_model, "unload"):
        model.base_model.unload()
    elif rates:
        raise UserError(
            f"--sweep cannot take a {config.method} adapter off the model again; give one "
            "--learning-rate."
        )


def sweep_rates(text: str) -> list[float]:
    """``"1e-3,2e-3"`` as numbers."""
    try:
        rates = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(
            f"--sweep is {text!r}; give learning rates separated by commas, as 5e-4,1e-3,2e-3."
        ) from error
    if any(not rate > 0 for rate in rates):
        raise UserError(f"--sweep is {text!r}; every learning rate must be above 0.")
    return rates


def sequence_length(config: TuneConfig, source: "LanguageModel") -> int:
    """Tokens per sequence.

    Raises:
        UserError: more than the model takes.
    """
    longest = getattr(source.model.config, "max_position_embeddings", LONGEST)
    length = config.sequence_length or min(LONGEST, longest)
    if length > longest:
        raise UserError(
            f"The sequence length is {length}, but the model takes at most {longest} tokens."
        )
    return int(length)


def usual_rate(config: TuneConfig) -> float:
    """The learning rate to use where none is swept."""
    from weightshare.shards.methods import LEARNING_RATES, USUAL_RATE

    usual = LEARNING_RATES.get(config.method, USUAL_RATE)
    return usual if config.learning_rate is None else config.learning_rate


def loop_config(config: TuneConfig, source: "LanguageModel", rate: float) -> "LoopConfig":
    """The training loop's options."""
    from weightshare.training import LoopConfig

    return LoopConfig(
        steps=config.steps,
        learning_rate=rate,
        schedule="linear",
        warmup_fraction=config.warmup_fraction,
        weight_decay=0.0,
        accumulate=config.accumulate,
        precision="bf16" if source.model.dtype.itemsize == 2 else "fp32",
        seed=config.seed,
        log_every=max(1, min(10, config.steps // 20)),
        evaluate_every=config.evaluate_every or max(1, config.steps // 10),
        keep_best=True,
        checkpoint_every=config.checkpoint_every,
    )


def trial(
    config: TuneConfig, source: "LanguageModel", data: "TuneData", rate: float, group: "Ranks"
) -> float:
    """Held-out loss after training a fresh adapter at one learning rate."""
    from dataclasses import replace

    from weightshare.cli.console import say
    from weightshare.shards import tune

    say(f"trying learning rate {rate:g}")
    short = replace(config, steps=config.sweep_steps or config.steps)
    model: Any = adapted(config, source)
    try:
        fit = tune(
            model,
            data,
            loop_config(short, source, rate),
            config.batch_size,
            accelerator=group.accelerator,
        )
    except UserError as error:
        # A rate at which the loss is no number any more is simply not the best one.
        if "became" not in str(error):
            raise
        return float("inf")
    finally:
        model.base_model.unload()
    return fit.evaluation["loss"]


def size_rows(
    config: TuneConfig, source: "LanguageModel", model: "PeftModel", folder: Path
) -> list[dict[str, Any]]:
    """This adapter beside LoRA: parameters and bytes, alone and for a thousand users."""
    from weightshare.shards.methods import linear_targets

    trainable, _ = model.get_nb_trainable_parameters()
    file = (folder / "adapter_model.safetensors").stat().st_size
    rows = [("this adapter, its file", trainable, file)]
    targets = linear_targets(source.model.base_model) if config.method != "mos" else []
    sizes = sum(t.in_features + t.out_features for t in targets)
    if config.method == "mos":
        tuner: Any = model.base_model
        layers = list(tuner._layers("default"))
        sizes = sum(layer.in_features + layer.out_features for layer in layers)
        whole = sum(
            layer.mos_places["default"].rank * (layer.in_features + layer.out_features)
            for layer in layers
        )
        rows.append(("this adapter exported to LoRA", whole, 4 * whole))
    budget = config.equivalent_rank
    rows += [
        (f"LoRA of rank {rank}, all linear layers", rank * sizes, 4 * rank * sizes)
        for rank in sorted({max(1, round(budget)), max(1, round(4 * budget))})
        if sizes
    ]
    return [
        {"": name, "parameters": count, "bytes": size, "bytes of 1,000 users": 1000 * size}
        for name, count, size in rows
    ]


def shard_uses(model: Any) -> list[int]:
    """How often each shard of the adapter is used, all pools together."""
    tuner = model.base_model
    counts: list[int] = []
    for table in tuner.mos_store.tables["default"].values():
        prepared = table.prepare(next(tuner.mos_pools.parameters()).device)
        counts += prepared.index.bincount(minlength=table.rows).tolist()
    return counts


def estimate(config: TuneConfig, source: "LanguageModel", data: "TuneData") -> None:
    """Print sizes, memory and time of a run without doing it."""
    import time

    from weightshare.cli.console import say, show_table
    from weightshare.shards.tuning import TuneTask
    from weightshare.training import total

    model = adapted(config, source)
    trainable, every = model.get_nb_trainable_parameters()
    batch = {name: column[:1].to(source.model.device) for name, column in data.train.items()}
    model.train()
    begun = time.perf_counter()
    total(TuneTask(model)(batch)).backward()
    seconds = time.perf_counter() - begun
    rows = [
        {"": "trained parameters", "value": trainable},
        {"": "of the model", "value": every},
        {"": "sequences", "value": len(data.train["labels"])},
        {"": "tokens to learn from", "value": data.targets},
        {"": "bytes of the adapter", "value": 4 * trainable},
        {"": "bytes of model, gradients and AdamW", "value": memory(model)},
    ]
    show_table("dry run", rows)
    runs = len(sweep_rates(config.sweep)) + 1
    work = runs * config.steps * config.batch_size
    say(f"time on {source.model.device}: about {seconds * work:.0f} s; nothing was written")


def memory(model: Any) -> int:
    """Bytes of all weights, and of gradient and two moments of the trained ones."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return int(weights + 3 * trained)
