"""To stock LoRA, which every serving engine reads, and back from it."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightshare.errors import UserError
from weightshare.report.store import replacing
from weightshare.shards.layer import MosLayer
from weightshare.shards.model import MosModel
from weightshare.shards.mos_config import MosConfig

PREFIX = "base_model.model."


def to_lora(
    model: PeftModel, folder: str | Path, adapter: str | Mapping[str, float] = "default"
) -> Path:
    """Write an adapter as a stock LoRA adapter that PEFT loads without this package.

    The factors are assembled and stored, so the result is exact, and rank / equivalent_rank times
    larger than the pools. Several adapters with a weight each become one LoRA whose rank is the sum
    of theirs: exactly the weighted sum of their changes.

    Args:
        model: a PEFT model with Mixture of Shards adapters.
        folder: where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter: the adapter's name, or names with weights.

    Returns:
        The folder.

    Raises:
        UserError: the model has no such adapter, or it is of another method.
    """
    tuner = mos_tuner(model)
    weights = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter)
    if not weights:
        raise UserError("No adapter is named; give a name, or names with their weights.")
    for name in weights:
        if name not in model.peft_config:
            raise UserError(
                f"The model has no adapter {name!r}; it has {', '.join(model.peft_config)}."
            )
    first: MosConfig = model.peft_config[next(iter(weights))]
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    conv1d = []
    for name, layer in tuner.model.named_modules():
        if not isinstance(layer, MosLayer):
            continue
        held = {one: weight for one, weight in weights.items() if one in layer.mos_places}
        if not held:
            continue
        parts = [(*layer.lora_factors(one), weight) for one, weight in held.items()]
        a = torch.cat([a for a, _, _, _ in parts])
        # A single adapter keeps its scale in the configuration, so that nothing is rounded.
        single = len(weights) == 1 and weights == {next(iter(weights)): 1.0}
        b = torch.cat([b if single else b * (scale * w) for _, b, scale, w in parts], dim=1)
        state[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous().cpu()
        state[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous().cpu()
        ranks[name] = len(a)
        conv1d.append(layer.fan_in_fan_out)
    if len(weights) == 1:
        rest = get_peft_model_state_dict(model, adapter_name=next(iter(weights)))
        state |= {key: t.cpu() for key, t in rest.items() if "mos_" not in key}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    single = set(weights.values()) == {1.0} and len(weights) == 1
    other = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=first.lora_alpha if single else usual,
        rank_pattern=other,
        alpha_pattern=dict(first.alpha_pattern) if single else dict(other),
        use_rslora=first.use_rslora if single else False,
        lora_dropout=first.lora_dropout,
        target_modules=sorted(ranks),
        modules_to_save=first.modules_to_save if single else None,
        bias="lora_only" if single and first.bias == "mos_only" else first.bias,
        fan_in_fan_out=all(conv1d),
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        inference_mode=True,
    )
    with replacing(folder) as fresh:
        fresh.mkdir()
        save_file(state, fresh / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(fresh))
    return Path(folder)


def from_lora(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", **options: Any
) -> PeftModel:
    """Put a stock LoRA adapter on ``model`` as a Mixture of Shards adapter, exactly.

    All its ranks are private (p = e = r): the starting point for training on with shared ones, or
    for one format for everything. ``options`` go to ``MosConfig``.

    Raises:
        UserError: no LoRA adapter in ``folder``, or one that is more than two matrices a module.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        state = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except OSError as error:
        raise UserError(
            f"{folder} holds no adapter ({error.strerror or error}); give the folder of a saved "
            "LoRA adapter with adapter_config.json and adapter_model.safetensors."
        ) from error
    _check_plain(folder, config, state)
    rank = config["r"]
    targets = config["target_modules"]
    mos = MosConfig(
        equivalent_rank=rank,
        rank=rank,
        private_rank=rank,
        lora_alpha=config["lora_alpha"],
        alpha_pattern=config.get("alpha_pattern") or {},
        use_rslora=bool(config.get("use_rslora")),
        lora_dropout=config.get("lora_dropout", 0.0),
        target_modules=targets,
        task_type=config.get("task_type"),
        **{"shards_per_vector": 1, **options},
    )
    adapted = get_peft_model(model, mos, adapter_name=adapter_name)
    tuner = mos_tuner(adapted)
    with torch.no_grad():
        for name, layer in tuner.model.named_modules():
            if not isinstance(layer, MosLayer):
                continue
            a = state[f"{PREFIX}{name}.lora_A.weight"]
            b = state[f"{PREFIX}{name}.lora_B.weight"]
            place = layer.mos_places[adapter_name]
            for (key, _), index, rows in (
                (place.a, layer.mos_indices_A[adapter_name], a),
                (place.b, layer.mos_indices_B[adapter_name], b.t()),
            ):
                pool: Any = tuner.mos_store.pool(adapter_name, key)
                shards = rows.contiguous().view(len(index), -1).to(pool)
                pool.index_copy_(0, index.long().to(pool.device), shards)
    return adapted


def mos_tuner(model: PeftModel) -> MosModel:
    """The tuner inside a PEFT model.

    Raises:
        UserError: the model's adapters are of another method.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, MosModel):
        raise UserError(
            f"A {type(model).__name__} without Mixture of Shards adapters was given; make one with "
            "get_peft_model(model, MosConfig(...))."
        )
    return tuner


def _check_plain(folder: Path, config: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds a {config.get('peft_type')} adapter; give a LoRA adapter.")
    for name in ("use_dora", "rank_pattern", "layer_replication", "target_parameters"):
        if config.get(name):
            raise UserError(
                f"The LoRA adapter in {folder} uses {name}, which shards cannot hold exactly; give "
                "one of plain matrices of one rank."
            )
    extra = [key for key in state if ".lora_A.weight" not in key and ".lora_B.weight" not in key]
    if extra:
        raise UserError(
            f"The LoRA adapter in {folder} also holds {extra[0]}; give one of linear layers alone."
        )
