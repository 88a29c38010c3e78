"""Which models can be folded, and what changes in their configuration when blocks go."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from weightshare.errors import UserError
from weightshare.folding.deltas import HEAD
from weightshare.folding.modeling_folded import FAMILIES, FoldedModelMixin, is_private
from weightshare.folding.plans import BlockSizes

FAMILY_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

PER_BLOCK_LISTS = ("layer_types",)
"""Configuration fields with one entry per block in the supported families."""


def check_family(model: PreTrainedModel) -> str:
    """The family of a model that can be folded (its stock ``model_type``).

    Raises:
        UserError: the model is folded already, of another family, quantised, or its blocks differ.
    """
    if isinstance(model, FoldedModelMixin):
        raise UserError(
            "The model is folded already; unfold() it first and make one plan for both folds."
        )
    family = getattr(model.config, "model_type", "?")
    if family not in FAMILIES or not hasattr(model, "lm_head"):
        raise UserError(
            f"The model is a {type(model).__name__} (model_type {family!r}); folding knows causal "
            f"language models of the families {', '.join(FAMILY_NAMES.values())}, because it must "
            "know what every parameter and every per-block setting of a family means."
        )
    if getattr(model, "is_quantized", False):
        raise UserError(
            "The model is quantised; fold the unquantised model and quantise the result."
        )
    check_blocks_alike(model)
    return family


def check_blocks_alike(model: PreTrainedModel) -> None:
    """Refuse a model whose blocks do not all have the same parameters.

    Raises:
        UserError: with the name of the first parameter that differs.
    """
    first = {name: tuple(p.shape) for name, p in blocks_of(model)[0].named_parameters()}
    for index, block in enumerate(blocks_of(model)):
        shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
        differing = sorted(name for name, _ in set(shapes.items()) ^ set(first.items()))
        if differing:
            raise UserError(
                f"Block {index} differs from block 0 in {differing[0]}; only a repetition of like "
                "blocks can be folded."
            )


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a causal language model, first to last."""
    return model.model.layers


def block_sizes(model: PreTrainedModel, private: Sequence[str] = ("norm",)) -> BlockSizes:
    """Count a model's parameters the way a plan changes them (unique ones, so tied count once)."""
    first = dict(blocks_of(model)[0].named_parameters())
    mine = sum(p.numel() for name, p in first.items() if is_private(name, list(private)))
    shared = sum(p.numel() for p in first.values()) - mine
    count = len(blocks_of(model))
    total = sum(p.numel() for p in model.parameters())
    shapes = {name: p.shape for name, p in first.items()} | {HEAD: model.lm_head.weight.shape}
    return BlockSizes(count, shared, mine, total - count * (shared + mine), shapes)


def _listed(name: str) -> bool:
    """Lists that have nothing to do with blocks, whatever their length."""
    return name == "architectures" or name.endswith("token_id")


def slice_config(config: PreTrainedConfig, remaining: Sequence[int]) -> dict[str, Any]:
    """The configuration, as a dictionary, of the model that keeps only the blocks ``remaining``.

    Raises:
        UserError: a list with one entry per block whose meaning is not known here.
    """
    values = copy.deepcopy(config.to_dict())
    blocks = config.num_hidden_layers
    for name, value in values.items():
        if name in PER_BLOCK_LISTS and value is not None:
            values[name] = [value[block] for block in remaining]
        elif isinstance(value, (list, tuple)) and len(value) == blocks and not _listed(name):
            raise UserError(
                f"The configuration has the list {name} with one entry per block, which folding "
                "does not know; remove it from config.json if it means nothing."
            )
    values["num_hidden_layers"] = len(remaining)
    if "max_window_layers" in values:
        # An index: the first block with a sliding window. layer_types decides, but keep it true.
        values["max_window_layers"] = sum(b < values["max_window_layers"] for b in remaining)
    for name in ("model_type", "transformers_version", "auto_map", "architectures"):
        values.pop(name, None)
    return values
