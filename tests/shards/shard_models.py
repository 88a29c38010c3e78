"""Small models with Mixture of Shards adapters on them."""

import torch
from peft import PeftModel, get_peft_model
from small_models import make

from weightshare.shards import MosConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(seed: int = 0, blocks: int = 6, **options) -> PeftModel:
    """A small Llama with an adapter on its linear layers, in evaluation mode."""
    model = make("llama", blocks)
    torch.manual_seed(seed)
    usual = {"target_modules": LINEARS, "shards_per_vector": 2, "init_weights": False}
    return get_peft_model(model, MosConfig(**{**usual, **options})).eval()


def pools(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    return dict(model.base_model.mos_pools[adapter].items())


def layers(model: PeftModel, adapter: str = "default"):
    return list(model.base_model._layers(adapter))


def dense_factors(model: PeftModel, layer, adapter: str = "default"):
    """A and B by the definition: entry i * l + j of the index is segment j of rank row i."""
    found = []
    for side, place in (("A", layer.mos_places[adapter].a), ("B", layer.mos_places[adapter].b)):
        pool = pools(model, adapter)[place[0]]
        index = getattr(layer, f"mos_indices_{side}")[adapter]
        rank = layer.mos_places[adapter].rank
        count = len(index) // rank
        rows = [
            torch.cat([pool[int(index[i * count + j])] for j in range(count)]) for i in range(rank)
        ]
        found.append(torch.stack(rows))
    return found[0], found[1].t()
