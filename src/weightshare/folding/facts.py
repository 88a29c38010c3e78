"""The figures a fold is judged by: parameters, bytes, losses, speed."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from weightshare.folding.families import block_sizes
from weightshare.folding.plans import FoldPlan
from weightshare.language import LanguageModel, Score


def parameter_facts(
    model: PreTrainedModel, folded: PreTrainedModel, plan: FoldPlan
) -> dict[str, Any]:
    """Unique parameters before and after, of the blocks alone and of the whole model."""
    sizes = block_sizes(model, plan.private)
    before, after = sizes.total(), sum(p.numel() for p in folded.parameters())
    blocks = before - sizes.other
    return {
        "parameters": {"before": before, "after": after, "saved_fraction": 1 - after / before},
        "blocks": {
            "before": plan.blocks,
            "after": len(plan.remaining),
            "unique": plan.unique_blocks,
            "parameters": {"before": blocks, "after": after - sizes.other},
            "saved_fraction": (before - after) / blocks,
        },
    }


def byte_facts(
    source: LanguageModel, folder: Path, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Bytes of the weight files, and of both models at the saved dtype and at a byte a weight.

    The input may be quantised, so the files alone can make a fold look like an inflation.
    """
    weights = [source.path] if source.path.is_file() else list(source.path.glob("*.safetensors"))
    width = source.stored_dtype.itemsize
    return {
        "before": sum(file.stat().st_size for file in weights),
        "after": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "equal_dtype": {when: parameters[when] * width for when in ("before", "after")},
        "int8": {when: parameters[when] for when in ("before", "after")},
    }


def loss_facts(before: Score, folded: Score, cured: Score) -> dict[str, Any]:
    """Held-out losses of the three models, as ``summary.json`` holds them."""
    scores = {"before": before, "folded": folded, "cured": cured}
    return {
        name: {when: getattr(score, name) for when, score in scores.items()}
        for name in ("loss", "perplexity", "bits_per_byte")
    }


def card_facts(facts: Mapping[str, Any], before: Score, after: Score) -> dict[str, str]:
    """Figures for the model card."""
    parameters = facts["parameters"]
    return {
        "unique parameters": f"{parameters['after']:,} of {parameters['before']:,}",
        "saved of the blocks' weights": f"{facts['blocks']['saved_fraction']:.1%}",
        "held-out loss of the original": f"{before.loss:.4f} nats per token",
        "held-out loss of this model": f"{after.loss:.4f} nats per token",
    }


def int8_rounded(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with every matrix rounded to int8, one scale a row: the plain way to halve bfloat16.

    A fold at the same bytes has to be compared with this, too.
    """
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.ndim == 2:
                scale = parameter.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
                parameter.copy_((parameter / scale).round() * scale)
    return copied


@dataclass(frozen=True)
class Row:
    """One line of the result: a model, its held-out score and its size."""

    model: str
    score: Score
    parameters: int
    bytes_per_weight: float
    tokens_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the report and the console show it."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "bytes": round(self.parameters * self.bytes_per_weight),
            "loss": round(self.score.loss, 4),
            "perplexity": round(self.score.perplexity, 2),
            "bits/byte": round(self.score.bits_per_byte, 4),
            "tokens/s": None
            if self.tokens_per_second is None
            else round(self.tokens_per_second, 1),
        }
