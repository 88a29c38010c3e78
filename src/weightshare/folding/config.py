"""Settings of folding. Standard library only: ``weightshare fold --help`` reads this file."""

from dataclasses import dataclass, field
from typing import Literal, get_args

RankingName = Literal[
    "gates",
    "block_influence",
    "angular",
    "one_shot",
    "greedy",
    "coupling",
    "random",
    "exhaustive",
]
RANKINGS: tuple[str, ...] = get_args(RankingName)
"""Ways to choose the blocks to remove."""


@dataclass
class GateConfig:
    """How the gates are learnt (defaults measured on a small replica unless a paper is named).

    Args:
        steps: optimiser steps per seed.
        seeds: independent runs; the ranks are averaged.
        sequences: calibration sequences per step.
        objective: keep the next-token loss low (ce) or stay close to the ungated model (kl).
        learning_rate: of Adam on the N gate parameters.
        start: initial gate parameter; 1 gives the gate 0.909 at the initial epsilon, 3 gives 0.989.
        epsilon_start: smoothness of the gate theta^2 / (theta^2 + epsilon) in the first half (GDP).
        epsilon_end: and at the end; small values make the gates all or nothing.
        penalty: weight of the squared constraint gap; small, or noise closes gates before the task
            has spoken.
    """

    steps: int = 300
    seeds: int = 3
    sequences: int = 8
    objective: Literal["ce", "kl"] = "ce"
    learning_rate: float = 0.05
    start: float = 1.0
    epsilon_start: float = 0.1
    epsilon_end: float = 1e-3
    penalty: float = 0.5


@dataclass
class CureConfig:
    """Fine-tuning of a folded model towards the original one.

    Args:
        steps: optimiser steps; 0 leaves the folded model as it is.
        batch_size: sequences per step.
        trainable: every weight (all), low-rank updates of the shared matrices merged at the end
            (lora), or the norms alone (norms); what uses have of their own is always trained.
        learning_rate: 1e-4 for all, 2e-4 for lora, 5e-3 for norms where it is not given.
        lora_rank: rank of the low-rank updates.
        cross_entropy: weight of the next-token loss on the text.
        distillation: weight of the temperature KL to the original model.
        temperature: of that KL.
        tail: weight of the distance of the last hidden states to the original's.
        tail_blocks: how many of the last blocks the tail term aligns.
        warmup_fraction: share of the steps that warm up; then cosine to zero.
        clip: largest norm of the gradient.
        accumulate: parts a batch is cut into, for less memory.
        evaluate_every: steps between evaluations on held-out text, 0 for a tenth of the steps.
        patience: stop after so many evaluations without a better held-out KL; 0 never stops.
        checkpoint_every: steps between checkpoints.
    """

    steps: int = 200
    batch_size: int = 8
    trainable: Literal["all", "lora", "norms"] = "all"
    learning_rate: float | None = None
    lora_rank: int = 8
    cross_entropy: float = 1.0
    distillation: float = 1.0
    temperature: float = 1.0
    tail: float = 1.0
    tail_blocks: int = 1
    warmup_fraction: float = 0.05
    clip: float = 1.0
    accumulate: int = 1
    evaluate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 50

    def rate(self) -> float:
        """The learning rate to use."""
        usual = {"all": 1e-4, "lora": 2e-4, "norms": 5e-3}
        return usual[self.trainable] if self.learning_rate is None else self.learning_rate


@dataclass
class FoldConfig:
    """Make a language model smaller: remove blocks, share the weights of others, cure.

    Args:
        model: a Hugging Face folder, the run of a fold, a GGUF file, or a known name (tiny,
            smollm2-135m).
        text: text to calibrate and cure on: a .txt, .jsonl or .gz file, a folder, or a known name.
        heldout: text to measure on; by default the last tenth of the documents of text.
        remove: fraction of the blocks to remove.
        share: blocks per group that share one set of weights; 1 shares nothing.
        target_params: unique parameters to reach, by removing and sharing as needed.
        remove_blocks: remove exactly these blocks (numbers from 0, as 3,7) instead of ranking.
        plan: a plan written earlier or by hand (JSON) instead of ranking.
        ranking: how the blocks to remove are chosen.
        refine: swaps exchanges removed and kept blocks while the calibration loss falls.
        representative: whose weights stand for a group.
        grouping: share neighbours in order (adjacent), the neighbours that replace each other best
            (distance), or those whose gradients agree most (agreement).
        protect: blocks that must neither be removed nor shared, as 0,11.
        calibration_sequences: sequences the ranking looks at.
        sequence_length: tokens per sequence, 0 for the model's own limit, at most 512.
        gates: how gates are learnt.
        cure: how the folded model is cured.
        out: the run directory.
        resume: go on with a run that was interrupted.
        dry_run: print what would be done, with size, memory and time, and stop.
        seed: of everything random.
        device: cpu, cuda, cuda:1, or auto.
        dtype: of the saved model: auto keeps the input's; fp32 and bf16 also set the computation.
        log_with: also send metrics to an accelerate tracker (tensorboard, trackio, wandb).
    """

    model: str
    text: str = "pystdlib"
    heldout: str | None = None
    remove: float = 0.0
    share: int = 1
    target_params: int | None = None
    remove_blocks: str | None = None
    plan: str | None = None
    ranking: RankingName = "greedy"
    refine: Literal["none", "swaps"] = "none"
    representative: Literal["first", "last", "best", "mean", "whitened"] = "first"
    grouping: Literal["adjacent", "distance", "agreement"] = "adjacent"
    protect: str = ""
    calibration_sequences: int = 32
    sequence_length: int = 0
    gates: GateConfig = field(default_factory=GateConfig)
    cure: CureConfig = field(default_factory=CureConfig)
    out: str = "runs/fold"
    resume: bool = False
    dry_run: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    log_with: str | None = None


@dataclass
class ExportConfig:
    """Write what a run made in a format for elsewhere.

    Args:
        run: the run directory of a finished fold or tune, or a folded model's folder.
        to: of a fold, stock is an ordinary checkpoint of the model's family with every block's
            weights written out, and onnx a graph from token ids to logits; of a tune, lora is a
            shard adapter as a stock LoRA adapter, which any PEFT or serving engine loads.
        out: where to write; by default RUN/stock, RUN/model.onnx or RUN/lora.
    """

    run: str
    to: Literal["stock", "onnx", "lora"] = "stock"
    out: str | None = None
