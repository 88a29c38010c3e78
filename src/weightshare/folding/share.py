"""Carry out a plan: build the folded model, and build the ordinary model back."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from weightshare.errors import UserError
from weightshare.folding.families import (
    block_sizes,
    blocks_of,
    check_family,
    slice_config,
)
from weightshare.folding.modeling_folded import FAMILIES, FoldedModelMixin
from weightshare.folding.plans import FoldPlan
from weightshare.folding.representatives import Merger, resolve


def fold(
    model: PreTrainedModel, plan: FoldPlan, calibration: Tensor | None = None
) -> PreTrainedModel:
    """Remove and share blocks as ``plan`` says. ``model`` stays as it is.

    A plan without shared groups gives a model of the stock class: an ordinary, shorter checkpoint.
    Otherwise the result is a folded model, an ordinary Hugging Face causal LM whose groups hold one
    set of weights (see ``modeling_folded``).

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal LM.
        plan: made by hand or by ``folding.plan``.
        calibration: token ids (n, length), needed by the representatives ``best`` and ``whitened``.

    Returns:
        A new model on the same device and in the same dtype, in evaluation mode.

    Raises:
        UserError: the model cannot be folded, or the plan is for another number of blocks.
    """
    family = check_family(model)
    if plan.blocks != len(blocks_of(model)):
        raise UserError(
            f"The plan is for a model of {plan.blocks} blocks, this one has "
            f"{len(blocks_of(model))}; make the plan for this model."
        )
    if plan.shared_groups and block_sizes(model, plan.private).shared == 0:
        raise UserError(
            f"private={list(plan.private)} keeps every parameter private, so nothing is shared; "
            "name fewer parts."
        )
    plan = resolve(model, plan, calibration)
    merge = Merger(model, plan, calibration)
    tensors: dict[str, Tensor] = {
        name: nn.Parameter(value.detach().clone(), value.requires_grad)
        for name, value in model.named_parameters()
        if not name.startswith("model.layers.")
    }
    position = {block: index for index, block in enumerate(plan.remaining)}
    for group in plan.groups:
        blocks = [dict(blocks_of(model)[block].named_parameters()) for block in group]
        shared, private = merge(group, blocks)
        common = {name: nn.Parameter(value.detach().clone()) for name, value in shared.items()}
        for block, own in zip(group, private, strict=True):
            mine = {name: nn.Parameter(value.detach().clone()) for name, value in own.items()}
            for name, value in {**common, **mine}.items():
                tensors[f"model.layers.{position[block]}.{name}"] = value

    values = slice_config(model.config, plan.remaining)
    if plan.shared_groups:
        config_class, model_class = FAMILIES[family]
        config = config_class(**values, fold_plan=plan.to_dict())
    else:
        model_class = type(model)
        config = type(model.config)(**values)
    return assemble(model_class, config, tensors, like=model)


def unfold(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as an ordinary model of the stock class, every block with its own weights.

    Raises:
        UserError: the model is not folded.
    """
    if not isinstance(model, FoldedModelMixin):
        raise UserError(f"The model is a {type(model).__name__}, which is not folded.")
    model_class: Any = next(
        base for base in type(model).__mro__ if base.__module__.startswith("transformers.")
    )
    values = {
        name: value
        for name, value in slice_config(model.config, range(model.config.fold_depth)).items()
        if name not in ("fold_plan", "fold_depth")
    }
    tensors: dict[str, Tensor] = {
        # remove_duplicate=False: every use by its own name, each with a copy of the common tensor.
        name: nn.Parameter(value.detach().clone(), value.requires_grad)
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return assemble(model_class, model_class.config_class(**values), tensors, like=model)


def assemble(
    model_class: type, config: Any, tensors: dict[str, Tensor], like: PreTrainedModel
) -> PreTrainedModel:
    """A model made of the given parameters; what has no parameters comes from ``like``.

    Built on the meta device, so that nothing is initialised, no random number is drawn and every
    weight exists once. Parameters given under several names stay tied.
    """
    config._attn_implementation = like.config._attn_implementation
    config.dtype = like.dtype
    with torch.device("meta"):
        model = model_class(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    tied = model.get_expanded_tied_weights_keys()
    absent = [name for name in missing if name not in tied]
    if absent or unexpected:
        raise RuntimeError(f"parameters do not fit: missing {absent}, unexpected {unexpected}")
    model.tie_weights()
    # Rotary frequencies are buffers that no file holds; folding changes nothing they depend on.
    model.model.rotary_emb = copy.deepcopy(like.model.rotary_emb)
    left = [name for name, value in model.named_buffers() if value.is_meta]
    if left:
        raise RuntimeError(f"buffers without a value: {left}")
    if like.generation_config is not None:
        model.generation_config = GenerationConfig.from_dict(like.generation_config.to_dict())
    return model.eval()
