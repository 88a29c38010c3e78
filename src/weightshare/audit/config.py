"""Settings of ``weightshare audit``. Standard library only."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class AuditConfig:
    """Who shares which weight, do they agree, and what would it buy to unshare.

    Args:
        model: a Hugging Face folder, the run of a fold, a GGUF file, or a known name; audited as
            it runs, at every depth.
        data: text to measure gradients on: a file, a folder, or a known name. The last fifth of
            its documents is kept for the probe.
        per: look at all tensors with the same users together (layer), or at each (tensor).
        batches: distinct batches; agreement is measured between them, so at least 2, better 16.
        patience: stop measuring once the grouping of every layer has come out the same so often in
            a row (never before the fourth batch); 0 measures all batches.
        batch_size: sequences per batch.
        sequence_length: tokens per sequence, 0 for the model's own limit, at most 256.
        groups: into how many groups the users of a layer may be split.
        rank: of suggested low-rank deltas.
        trial: predict gains by a trial of so many steps that trains every use of the shared weights
            apart, then credits each part of what that saved, 50 are enough; 0 predicts them from
            the gradients of the model as it is.
        metric: without a trial, predict for training with Adam, or for plain gradient descent.
        budget: also name the best way to spend so many additional parameters; 0 leaves it out.
        scales_first: of the budget, private scales on every shared weight, then weights of their
            own for the rest, which a trial chooses best; for folded models audited per tensor.
        probe: carry out so many suggested and as many random unsharings, and compare predicted with
            realised gain; 0 leaves it out.
        probe_steps: training steps of each unsharing in the probe.
        probe_learning_rate: of AdamW in the probe and in the trial; best that of later training.
        sketch: numbers kept of each gradient; 0 keeps whole gradients.
        out: the run directory.
        resume: go on with a run that was interrupted; trials of the probe are not repeated.
        overwrite: replace the run directory if it holds a run.
        seed: of everything random.
        device: cpu, cuda, cuda:1, or auto.
        dtype: type to compute in; auto is float32 on a CPU and the stored type elsewhere.
    """

    model: str
    data: str = "pystdlib"
    per: Literal["layer", "tensor"] = "layer"
    batches: int = 16
    patience: int = 0
    batch_size: int = 4
    sequence_length: int = 0
    groups: int = 2
    rank: int = 4
    trial: int = 0
    metric: Literal["adam", "plain"] = "adam"
    budget: int = 0
    scales_first: bool = False
    probe: int = 0
    probe_steps: int = 30
    probe_learning_rate: float = 1e-3
    sketch: int = 4096
    out: str = "runs/audit"
    resume: bool = False
    overwrite: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
