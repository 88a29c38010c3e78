"""Settings of ``weightshare tune``. Standard library only, which importing ``shards`` is not."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class TuneConfig:
    """Fine-tune a language model on text or instructions; the adapter is saved in PEFT's format.

    Args:
        model: a Hugging Face folder, the run of a fold, a GGUF file, or a known name (tiny,
            smollm2-135m).
        data: what to learn: a text (.txt, .jsonl with "text", .gz, a folder, a known name), or
            instructions (.jsonl with "prompt" or "instruction" and "response", "output" or
            "completion", or with "messages", of which the last answer is learnt).
        heldout: data to measure on; by default the last tenth of a text, every tenth instruction.
        kind: of the data; auto looks at it.
        method: mos, lora, vera, vblora, unilora, or any other PEFT method.
        equivalent_rank: the budget: as many trained parameters as LoRA of this rank; with mos and
            unilora it may be a fraction, also below 1.
        rank: rank of the updates; mos takes four times the budget, lora the budget.
        shards: mos, pieces each vector is put together from; 1 shares whole vectors.
        private_rank: mos, ranks that only one layer uses; by default an eighth of the budget.
        alpha: numerator of the scale.
        dropout: dropout of the adapter's input.
        target_modules: names of the modules to adapt, separated by commas, or all-linear.
        options: more options of the method, as num_vectors=90,topk=2.
        steps: optimiser steps.
        batch_size: sequences per step.
        accumulate: parts a batch is cut into, for less memory.
        sequence_length: tokens per sequence, 0 for the model's own limit, at most 512.
        packing: put several instructions into one sequence; later ones then see the earlier.
        learning_rate: peak, then linear to zero; by default 2e-3 for mos, 1e-3 for lora, 8e-3 for
            unilora, vblora and vera, and 5e-3 for methods that were not measured; better, sweep it.
        sweep: learning rates to try first, separated by commas; the best on held-out data is used.
        sweep_steps: steps of each trial; 0 for as many as in the run.
        warmup_fraction: share of the steps that warm up.
        evaluate_every: steps between held-out evaluations, 0 for a tenth of the steps.
        checkpoint_every: steps between checkpoints.
        gradient_checkpointing: compute activations twice, for less memory.
        out: the run directory.
        resume: go on with a run that was interrupted.
        dry_run: print what would be trained, with sizes, memory and time, and stop.
        seed: of everything random.
        device: cpu, cuda, cuda:1, or auto.
        dtype: of the frozen model; auto is float32 on a CPU and the stored type elsewhere.
    """

    model: str
    data: str = "pystdlib"
    heldout: str | None = None
    kind: Literal["auto", "text", "instructions"] = "auto"
    method: str = "mos"
    equivalent_rank: float = 2
    rank: int | None = None
    shards: int = 4
    private_rank: int | None = None
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    options: str = ""
    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    sequence_length: int = 0
    packing: bool = False
    learning_rate: float | None = None
    sweep: str = ""
    sweep_steps: int = 0
    warmup_fraction: float = 0.03
    evaluate_every: int = 0
    checkpoint_every: int = 50
    gradient_checkpointing: bool = False
    out: str = "runs/tune"
    resume: bool = False
    dry_run: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
