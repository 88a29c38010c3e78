"""Mixture of Shards: low-rank adapters whose rows are put together from shards of shared pools.

Importing this package registers the method with PEFT, so that ``get_peft_model(model,
MosConfig(...))`` and ``PeftModel.from_pretrained`` know it.
"""

from weightshare._lazy import attach
from weightshare.shards.registration import register

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "mos_config": ["MosConfig"],
        "model": ["MosModel"],
        "layer": ["MosLayer", "MosLinear"],
        "conversion": ["from_lora", "to_lora"],
        "swapping": ["hotswap"],
        "users": ["add_user"],
        "planning": ["Pool", "Target", "parameter_count", "plan_pools"],
        "indices": ["SplitMix64", "draw"],
        "methods": ["adapter_config"],
        "tuning": ["TuneData", "TuneTask", "read_data", "tune"],
    },
)

register()
