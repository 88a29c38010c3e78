"""Any PEFT method by name, brought to one budget where its options allow it."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from weightshare.errors import UserError
from weightshare.shards.planning import Target

MEASURED = ("mos", "lora", "vera", "vblora", "unilora")
"""Methods that are known to train on tokens alone, with what adapter_config gives them."""
LEARNING_RATES = {"lora": 1e-3, "mos": 2e-3, "unilora": 8e-3, "vblora": 8e-3, "vera": 8e-3}
"""LoRA's and MoS's are the best of a sweep on SmolLM2-135M with alpha 16. The other three were not
swept there; in benchmarks/shards/replica.py each wanted eight times LoRA's rate."""
USUAL_RATE = 5e-3
VIRTUAL_TOKENS = 20
"""Length of a learnt prompt, as in PEFT's own examples; prompt methods have no default."""
VB_WIDTH = 256
"""Vector length of VB-LoRA (Li et al. 2024); less where it does not divide the layers."""


def adapter_config(
    method: str,
    model: nn.Module,
    *,
    equivalent_rank: float = 2,
    rank: int | None = None,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    options: Mapping[str, Any] | None = None,
) -> PeftConfig:
    """The PEFT configuration of ``method`` (mos, lora, vera, vblora, unilora, ...) for ``model``.

    ``equivalent_rank`` is a budget of e * sum(h + o) parameters: LoRA gets that rank, Uni-LoRA a
    vector of that length; VeRA, VB-LoRA and the others keep their own sizes, to be set by
    ``options``, which are passed on as they are. ``rank`` is that of the updates.

    Raises:
        UserError: a method that PEFT does not have, an option that the method does not have, or a
            fraction of a rank for a method of whole ranks.
    """
    known = {str(kind.value).lower(): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method not in known:
        raise UserError(
            f"{method!r} is not a PEFT method; give mos, lora, vera, vblora, unilora, or one of "
            f"{', '.join(sorted(known))}."
        )
    config_class = known[method]
    targets = linear_targets(model)
    sizes = [size for t in targets for size in (t.in_features, t.out_features)]
    wanted: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": target_modules,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        f"{method}_dropout": dropout,
        "num_virtual_tokens": VIRTUAL_TOKENS,
    }
    if method == "mos":
        wanted |= {"equivalent_rank": equivalent_rank, "rank": rank}
    elif method == "vblora":
        common = math.gcd(*sizes)
        width = next(n for n in range(min(VB_WIDTH, common), 0, -1) if common % n == 0)
        wanted |= {"vector_length": width, "r": rank or 4}
    elif method == "unilora":
        wanted |= {"theta_d_length": round(equivalent_rank * sum(sizes)), "r": rank or 4}
    elif method == "vera":
        wanted |= {"r": rank or 256}
    elif rank is not None or method == "lora":
        whole = rank or int(equivalent_rank)
        if rank is None and whole != equivalent_rank:
            raise UserError(
                f"equivalent_rank is {equivalent_rank:g}, but {method} has whole ranks; give a "
                "whole number, or the method mos or unilora."
            )
        wanted |= {"r": whole, "rank": whole}
    names = {field.name for field in fields(config_class)}
    asked = dict(options or {})
    if unknown := sorted(set(asked) - names):
        raise UserError(
            f"{method} has no option {unknown[0]!r}; it has {', '.join(sorted(names))}."
        )
    chosen = {name: value for name, value in wanted.items() if name in names} | asked
    try:
        return config_class(**chosen)
    except (ImportError, TypeError, ValueError) as error:
        said = str(error).rstrip(" .")
        raise UserError(f"{method} cannot be set up: {said}; see --options.") from error


def linear_targets(model: nn.Module) -> list[Target]:
    """The linear layers that "all-linear" means: all but the output layer."""
    embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = embeddings()
    found = []
    for name, module in model.named_modules():
        if module is output:
            continue
        if isinstance(module, nn.Linear):
            found.append(Target(name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            found.append(Target(name, *module.weight.shape))
    return found


def parse_options(text: str) -> dict[str, Any]:
    """``"num_vectors=90, use_dora=true"`` as a dictionary; values are JSON or plain words."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{part!r} is no option; write NAME=VALUE, separated by commas.")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value.strip()
    return found
