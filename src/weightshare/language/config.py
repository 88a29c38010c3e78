"""Settings of ``weightshare evaluate``. Standard library only."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class EvaluateConfig:
    """Measure a language model: loss, bits per byte, zero-shot tasks, speed, size.

    Args:
        model: a Hugging Face folder, the run of a fold, a GGUF file, or a known name (tiny,
            smollm2-135m).
        text: text to score: a file, a folder, or a known name; "none" leaves it out.
        tasks: zero-shot tasks separated by commas (piqa,arc_easy,...): names found under
            WEIGHTSHARE_DATA, or paths of their .jsonl or .jsonl.gz files.
        against: a second model, scored on the same text and tasks, with paired differences.
        adapter: a PEFT adapter to put on the model: its folder, or the run of a tune.
        limit: examples per task, 0 for all.
        sequences: windows of text to score, 0 for all.
        sequence_length: tokens per window, 0 for the model's own limit, at most 1024.
        speed: also time the decoding of new tokens.
        batch_size: sequences per forward pass.
        out: the run directory.
        overwrite: replace the run directory if it holds a run.
        seed: of everything random.
        device: cpu, cuda, cuda:1, or auto.
        dtype: type to compute in; auto is float32 on a CPU and the stored type elsewhere.
    """

    model: str
    text: str = "pystdlib"
    tasks: str = ""
    against: str | None = None
    adapter: str | None = None
    limit: int = 0
    sequences: int = 64
    sequence_length: int = 0
    speed: bool = True
    batch_size: int = 8
    out: str = "runs/evaluate"
    overwrite: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
