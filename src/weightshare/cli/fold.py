"""``weightshare fold``: rank, remove, share, cure, save."""

from typing import TYPE_CHECKING, Any

from weightshare.errors import UserError

if TYPE_CHECKING:
    import torch

    from weightshare.cli.ranks import Ranks
    from weightshare.folding.config import FoldConfig
    from weightshare.folding.plans import FoldPlan
    from weightshare.language import LanguageModel, Windows
    from weightshare.training import RunLike

CONFIG = "weightshare.folding.config:FoldConfig"
EXTRA = "folding"
EXAMPLES = """
  weightshare fold tiny --remove 0.25 --share 2 --cure-steps 200 --out runs/fold
  weightshare fold ./my-llama --text notes.txt --target-params 800000000 --refine swaps
  weightshare fold ./my-llama --text notes.txt --remove-blocks 20,21 --cure-steps 0
  weightshare fold tiny --share 2 --dry-run
  torchrun --nproc-per-node 4 -m weightshare fold ./my-llama --text notes.txt --remove 0.25
"""

TIMED_TOKENS = 48
"""New tokens whose decoding is timed."""
WATCHED_WINDOWS = 16
"""Held-out sequences the cure watches between steps."""


def run(config: "FoldConfig") -> None:
    """Fold one model and leave a run directory."""
    from weightshare.cli.console import say, show_table
    from weightshare.cli.estimate import show_estimate
    from weightshare.cli.models import open_model
    from weightshare.cli.ranks import ranks
    from weightshare.cli.trackers import tracking
    from weightshare.folding import Ranking, facts, fold, plan, rank
    from weightshare.folding.blocks import BlockLosses
    from weightshare.folding.card import model_card, save_model
    from weightshare.folding.representatives import resolve
    from weightshare.folding.texts import continuations, fold_texts
    from weightshare.language import cast, compare, decode_speed, evaluate
    from weightshare.report import Run

    protect = block_list(config.protect, "protect")
    group = ranks(config.device)
    source = open_model(config.model, config.dtype, group.device)
    model = source.model
    given = given_plan(config, source)
    texts, documents = fold_texts(config, source)
    if config.dry_run:
        show_estimate(config, source, given, protect, texts)
        return
    if not group.first:
        help_to_cure(config, source, texts, group)
        return

    with (
        Run.open(config.out, config, command="fold", resume=config.resume) as run,
        tracking(run, config.log_with),
    ):
        run.summary(documents=documents, device=str(model.device), model=config.model)
        calibration, heldout = texts["calibration"].input_ids, texts["heldout"]

        # 1. Rank the blocks and make the plan.
        losses = BlockLosses(model, calibration, memo=run.memo("losses"))
        ranking = None
        if given is None and (count := removals(config, source)):
            found = run.stage(
                "ranking",
                lambda: rank(
                    model,
                    calibration,
                    config.ranking,
                    remove=count,
                    protect=protect,
                    refine=config.refine,
                    seed=config.seed,
                    gates=config.gates,
                    memo=run.memo("ranking"),
                    progress=say,
                ).to_dict(),
            )
            ranking = Ranking.from_dict(found)
        chosen = given or plan(
            model,
            ranking or (),
            remove=config.remove,
            share=config.share,
            target_params=config.target_params,
            protect=protect,
            grouping=config.grouping,
            representative=config.representative,
            losses=losses,
        )
        chosen = resolve(model, chosen, calibration, memo=run.memo("representatives"))
        run.save("plan.json", chosen.save)
        say(describe(chosen))
        group.told(chosen.to_dict())

        # 2. Build the folded model.
        folded = fold(model, chosen, calibration)
        scores = {"dense": evaluate(model, heldout), "folded": evaluate(folded, heldout)}
        samples = continuations(source, {"dense": model, "folded": folded}, heldout)

        # 3. Cure it.
        if config.cure.steps:
            cure_folded(config, model, folded, texts, group, run)
            scores["cured"] = evaluate(folded, heldout)
            cured = continuations(source, {"cured": folded}, heldout)
            samples = [{**row, **new} for row, new in zip(samples, cured, strict=True)]

        # 4. Save it and say what it is worth.
        before, last = scores["dense"], list(scores.values())[-1]
        sizes = facts.parameter_facts(model, folded, chosen)
        speed = {
            "before": decode_speed(model, source.tokenizer, TIMED_TOKENS).median,
            "after": decode_speed(folded, source.tokenizer, TIMED_TOKENS).median,
        }
        if config.dtype == "auto":
            cast(folded, source.stored_dtype)
        card = model_card(source, folded, chosen, facts.card_facts(sizes, before, last))
        folder = run.save("model", lambda path: save_model(path, folded, source.tokenizer, card))
        sizes["bytes"] = facts.byte_facts(source, folder, sizes["parameters"])
        added, error = compare(before, last)
        run.summary(
            **sizes,
            **facts.loss_facts(before, scores["folded"], last),
            loss_added={"mean": added, "stderr": error},
            removed=list(chosen.removed),
            groups=[list(group) for group in chosen.groups],
            representatives=list(chosen.representatives or ()),
            ranking=ranking.method if ranking else "given",
            tokens_per_second=speed,
        )
        width = source.stored_dtype.itemsize
        rows = compare_sizes(model, chosen, scores, sizes, speed, width, heldout)
        draw(run, model, calibration, ranking, chosen, rows, samples)
        show_table("held-out text", rows)
        say(f"report: {run.path / 'report.html'}\nmodel:  {folder}")


def cure_folded(
    config: "FoldConfig",
    model: Any,
    folded: Any,
    texts: dict[str, "Windows"],
    group: "Ranks",
    run: "RunLike",
) -> None:
    """Cure ``folded`` in place: half-precision models under autocast, all others in float32."""
    from weightshare.folding import cure

    cure(
        folded,
        model,
        texts["train"],
        texts["heldout"][:WATCHED_WINDOWS],
        config.cure,
        seed=config.seed,
        run=run,
        accelerator=group.accelerator,
        precision="bf16" if model.dtype.itemsize == 2 else "fp32",
    )


def help_to_cure(
    config: "FoldConfig", source: "LanguageModel", texts: dict[str, "Windows"], group: "Ranks"
) -> None:
    """What the processes behind the first do: wait for the plan, then train along."""
    from weightshare.cli.ranks import Follower
    from weightshare.folding import FoldPlan, fold

    chosen = FoldPlan.from_dict(group.told())
    if config.cure.steps:
        folded = fold(source.model, chosen, texts["calibration"].input_ids)
        cure_folded(config, source.model, folded, texts, group, Follower(config.out))


def block_list(text: str, option: str) -> list[int]:
    """``"3,7"`` as block numbers."""
    try:
        return [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError as error:
        raise UserError(
            f"--{option} is {text!r}; give block numbers separated by commas, as 3,7."
        ) from error


def removals(config: "FoldConfig", source: "LanguageModel") -> int:
    """How many blocks the options ask to remove."""
    from weightshare.folding.families import block_sizes, check_family
    from weightshare.folding.planner import budget

    check_family(source.model)
    return budget(
        block_sizes(source.model), config.remove, config.share, config.target_params
    ).removals


def given_plan(config: "FoldConfig", source: "LanguageModel") -> "FoldPlan | None":
    """The plan of ``--plan`` or ``--remove-blocks``; None where the blocks are to be ranked."""
    from weightshare.folding import FoldPlan, plan
    from weightshare.folding.families import blocks_of, check_family

    check_family(source.model)
    blocks = len(blocks_of(source.model))
    if config.plan is not None:
        if config.remove or config.share > 1 or config.target_params or config.remove_blocks:
            raise UserError(
                "--plan says everything already; leave out --remove, --share, --target-params "
                "and --remove-blocks."
            )
        given = FoldPlan.load(config.plan)
        if given.blocks != blocks:
            raise UserError(
                f"The plan {config.plan} is for {given.blocks} blocks, the model has {blocks}."
            )
        return given
    if config.remove_blocks is not None:
        if config.remove or config.target_params:
            raise UserError(
                "--remove-blocks names the blocks; leave out --remove, --target-params."
            )
        chosen = block_list(config.remove_blocks, "remove-blocks")
        FoldPlan(blocks, removed=tuple(chosen))
        return plan(
            source.model,
            chosen,
            remove=len(chosen) / blocks,
            share=config.share,
            protect=block_list(config.protect, "protect"),
            representative=config.representative,
        )
    if not config.remove and config.share == 1 and config.target_params is None:
        raise UserError(
            "Nothing to do: give --remove, --share, --target-params, --remove-blocks or --plan."
        )
    removals(config, source)
    return None


def describe(plan: "FoldPlan") -> str:
    """The plan in a line."""
    groups = " ".join("{" + ",".join(map(str, g)) + "}" for g in plan.shared_groups) or "none"
    removed = ",".join(map(str, plan.removed)) or "none"
    deltas = f"; {len(plan.deltas)} deltas of their own" if plan.deltas else ""
    return (
        f"plan: remove {removed}; share {groups}; {plan.unique_blocks} sets of weights remain"
        + deltas
    )


def compare_sizes(
    model: Any,
    chosen: "FoldPlan",
    scores: dict[str, Any],
    sizes: dict[str, Any],
    speed: dict[str, float],
    width: int,
    heldout: "Windows",
) -> list[dict[str, Any]]:
    """One row per model: the original, two plain ways of making it smaller, the folded ones."""
    from weightshare.folding import FoldPlan, fold
    from weightshare.folding.facts import Row, int8_rounded
    from weightshare.language import evaluate

    before, after = sizes["parameters"]["before"], sizes["parameters"]["after"]
    shorter = fold(
        model, FoldPlan(chosen.blocks, removed=tuple(range(chosen.unique_blocks, chosen.blocks)))
    )
    dropped = sum(parameter.numel() for parameter in shorter.parameters())
    rows = [
        Row("dense", scores["dense"], before, width, speed["before"]),
        Row("dense, int8", evaluate(int8_rounded(model), heldout), before, 1),
        Row("last dropped", evaluate(shorter, heldout), dropped, width),
        Row("folded", scores["folded"], after, width, speed["after"]),
    ]
    if "cured" in scores:
        rows.append(Row("cured", scores["cured"], after, width, speed["after"]))
    return [row.to_dict() for row in rows]


def draw(
    run: Any,
    model: Any,
    calibration: "torch.Tensor",
    ranking: Any,
    chosen: "FoldPlan",
    rows: list[dict[str, Any]],
    samples: list[dict[str, str]],
) -> None:
    """The report's key figures, pictures and samples."""
    from weightshare.folding import figures, similarity

    dense, last = rows[0], rows[-1]
    run.key("weights of the blocks saved", f"{run.summary()['blocks']['saved_fraction']:.1%}")
    run.key("weights of the model saved", f"{1 - last['parameters'] / dense['parameters']:.1%}")
    run.key("held-out loss", f"{dense['loss']:.3f} → {last['loss']:.3f}", "nats per token")
    run.figure(
        "plan",
        figures.plan_strip(chosen),
        "What happened to each block. Blocks with the same letter have one set of weights.",
    )
    run.rows(
        "result",
        rows,
        "Held-out text, the same sequences in every row. Dense, int8: every matrix rounded to a "
        "byte a weight. Last dropped: as many blocks as the fold has sets of weights, no cure.",
    )
    run.figure(
        "loss",
        figures.loss_steps({row["model"]: row["loss"] for row in rows}),
        "Held-out loss through the fold, beside the plain ways of making the model smaller.",
    )
    run.figure(
        "size",
        figures.size_and_loss([(row["bytes"], row["loss"], row["model"]) for row in rows]),
        "Size against held-out loss.",
    )
    run.text("samples", "Three prompts continued", samples)
    if ranking is not None:
        label = f"importance by {ranking.method}"
        run.figure(
            "ranking",
            figures.scores_bars(ranking.scores, chosen.removed, label),
            "Importance of each block; the removed ones stand out.",
        )
    if ranking is not None and "runs" in ranking.metadata:
        history = ranking.metadata["runs"][0]["history"]
        run.figure("gates", figures.gate_course(history, chosen.removed), "Gates of one seed.")
    logged = run.metrics()
    train = [(row["step"], row["cross_entropy"]) for row in logged if "cross_entropy" in row]
    watched = [(row["step"], row["evaluation.kl"]) for row in logged if "evaluation.kl" in row]
    if train or watched:
        run.figure("cure", figures.cure_course(train, watched), "The cure, step by step.")
    run.figure(
        "similarity",
        figures.similarity_map(similarity(model, calibration[:8]).tolist()),
        "Mean cosine between the original model's hidden states at two depths.",
    )
