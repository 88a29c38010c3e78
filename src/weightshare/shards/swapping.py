"""Exchange the adapter of a running model, without new modules and without recompiling it."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, load_peft_weights

from weightshare.errors import UserError
from weightshare.shards.conversion import mos_tuner
from weightshare.shards.mos_config import MosConfig

ALIKE = (
    "row_scale",
    "scale_by_use",
    "use_rslora",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "save_indices",
    "public_from",
    "public_rank",
)
"""Options that decide what an adapter's numbers mean, besides shapes."""


def hotswap(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Load the adapter in ``folder`` into the place of ``adapter_name``.

    Pools and indices are overwritten in place, so a compiled model goes on as it is. Both adapters
    must have pools and ranks of the same shapes; their alpha, seeds and draws may differ (a
    difference in scale goes into B).

    Raises:
        UserError: the adapter does not fit or is damaged; the model keeps the one it had.
    """
    tuner = mos_tuner(model)
    if adapter_name not in model.peft_config:
        raise UserError(
            f"The model has no adapter {adapter_name!r}; it has {', '.join(model.peft_config)}."
        )
    if any(adapter_name in layer.merged_adapters for layer in tuner._layers(adapter_name)):
        raise UserError(f"{adapter_name!r} is merged into the weights; call unmerge_adapter first.")
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} holds no adapter; give the folder of a saved one.")
    new = PeftConfig.from_pretrained(str(folder))
    if not isinstance(new, MosConfig):
        raise UserError(
            f"{folder} holds an adapter of the method {PeftType(new.peft_type).value}; give one of "
            "shards, or bring a LoRA adapter in by from_lora."
        )
    old: MosConfig = model.peft_config[adapter_name]
    for name in ALIKE:
        if getattr(new, name) != getattr(old, name):
            raise UserError(
                f"The adapters differ in {name} ({getattr(old, name)} now, {getattr(new, name)} in "
                f"{folder}); hot-swap adapters of one form, or use load_adapter."
            )
    if not new.save_indices and new.index_seed != old.index_seed:
        raise UserError(
            "The adapters differ in index_seed and the new one was saved without its indices; save "
            "it with save_indices=True, or use load_adapter."
        )
    if new.lora_alpha != old.lora_alpha and old.alpha_pattern:
        raise UserError(
            "The adapters differ in lora_alpha beside an alpha_pattern; use load_adapter."
        )
    # An adapter in use is kept where loading fails.
    tuner._fresh.discard(adapter_name)
    set_peft_model_state_dict(
        model, load_peft_weights(str(folder), device="cpu"), adapter_name=adapter_name
    )
    if new.lora_alpha != old.lora_alpha:
        with torch.no_grad():
            pools: Any = tuner.mos_pools[adapter_name]
            for key, pool in pools.items():
                if key.endswith("_B"):
                    pool.mul_(new.lora_alpha / old.lora_alpha)
    old.index_seed = new.index_seed
