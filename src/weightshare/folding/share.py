"""Carry out a plan: build the folded model, and build the ordinary model back."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from weightshare.errors import UserError
from weightshare.folding.deltas import HEAD, Delta
from weightshare.folding.families import (
    block_sizes,
    blocks_of,
    check_family,
    slice_config,
)
from weightshare.folding.modeling_folded import (
    FAMILIES,
    DeltaLinear,
    FoldedModelMixin,
    delta_modules,
)
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
    if not plan.is_stock:
        config_class, model_class = FAMILIES[family]
        config = config_class(**values, fold_plan=replace(plan, deltas=()).to_dict())
    else:
        model_class = type(model)
        config = type(model.config)(**values)
    folded = assemble(model_class, config, tensors, like=model)
    return replan(folded, plan) if plan.deltas else folded


def replan(
    model: PreTrainedModel, plan: FoldPlan, rows: Mapping[Delta, Tensor] | None = None
) -> PreTrainedModel:
    """Give a folded model, in place, a plan that shares less of it: split groups, more deltas.

    The model computes the same until it is trained, bit for bit: copies start equal, scales and
    deltas at zero. All other parameters stay the same objects.

    Args:
        rows: the row space (rank, in) that a new low-rank delta starts with, else a random one,
            always the same.

    Raises:
        UserError: the plan has a delta that the model has no parameter for, or the model is not
            one of this library's.
    """
    if not isinstance(model, FoldedModelMixin):
        raise UserError(
            f"The model is a {type(model).__name__} that weightshare does not know as folded; load "
            "it after importing weightshare.folding.modeling_folded, without trust_remote_code."
        )
    check_targets(model, plan)
    return _replanned(model, plan, rows or {})


def _replanned(model: Any, plan: FoldPlan, rows: Mapping[Delta, Tensor]) -> Any:
    known = {name for name, m in model.named_modules() if isinstance(m, DeltaLinear)}
    model.config.fold_plan = plan.to_dict()
    model._block_ties = None
    model._place_deltas()
    generator = torch.Generator().manual_seed(0)
    for delta in plan.deltas:
        places = delta_modules(model.config.fold_plan, asdict(delta))
        if places and not known & set(places):
            start(model.get_submodule(places[0]), rows.get(delta), generator)
            for place in places[1:] if delta.kind == "scale" else ():
                # Its parameters are tied below, its buffer is not.
                unit = model.get_submodule(places[0]).delta_unit
                model.get_submodule(place).delta_unit.copy_(unit)
    ties, taken = model.get_expanded_tied_weights_keys(), set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in ties:
            if parameter in taken:
                path, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(model.get_submodule(path), leaf, parameter)
            taken.add(parameter)
    model._tie_blocks()
    return model


def check_targets(model: PreTrainedModel, plan: FoldPlan) -> None:
    """Refuse deltas of parameters that the model does not have, or that cannot have them."""
    shapes = block_sizes(model, plan.private).shapes
    for delta in plan.deltas:
        dimensions = len(shapes.get(delta.parameter, ()))
        if not dimensions or (not delta.blocks and not model.config.tie_word_embeddings):
            raise UserError(
                f"The plan has a delta of {delta.parameter!r}, which this model does not share; "
                f"it shares {', '.join(name for name in shapes if name != HEAD)}."
            )
        if delta.kind != "own" and dimensions != 2:
            raise UserError(
                f"{delta.parameter!r} is a vector and has no {delta.kind} delta; use 'own'."
            )


@torch.no_grad()
def start(module: Any, rows: Tensor | None, generator: torch.Generator) -> None:
    """Values of a new delta with which a step of Adam moves the weight about as far as its own.

    A given row space counts as one whatever its rank: it may lie where activations are large.
    """
    if module.kind == "scale":
        rms = module.weight.float().square().mean().sqrt()
        module.delta_unit.copy_(1 / rms if rms > 0 else 1.0)
        return
    size = 1.0 if rows is None else len(rows) ** -0.5
    if rows is None:
        rows = torch.randn(module.delta_a.shape, generator=generator)
    module.delta_a.copy_(size * rows / rows.square().mean().sqrt())


def unfold(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as an ordinary model of the stock class, every block with its own weights.

    Scales and low-rank deltas are merged into them.

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
    deltas = model.config.fold_plan.get("deltas", ())
    tensors: dict[str, Tensor] = {
        # remove_duplicate=False: every use by its own name, each with a copy of the common tensor.
        name: nn.Parameter(value.detach().clone(), value.requires_grad)
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    folded: Any = model
    for path, module in folded.named_modules():
        if isinstance(module, DeltaLinear):
            tensors[f"{path}.weight"] = nn.Parameter(module.merged().detach())
    tensors = {name: value for name, value in tensors.items() if ".delta_" not in name}
    values["tie_word_embeddings"] &= all(delta["blocks"] for delta in deltas)
    if values["tie_word_embeddings"]:
        tensors.pop(HEAD, None)
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
