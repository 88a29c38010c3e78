"""Parameter counts of published models, without their weights."""

import pytest
import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from shards.shard_models import LINEARS, adapted
from transformers import LlamaConfig, LlamaForCausalLM

from weightshare.shards import MosConfig

MODELS = {
    "LLaMA2-7B": (4096, 11008, 32, 32, 32, {1: 2_498_560, 2: 4_997_120, 8: 19_988_480}),
    "LLaMA2-13B": (5120, 13824, 40, 40, 40, {1: 3_911_680, 2: 7_823_360, 8: 31_293_440}),
    "LLaMA3.2-3B": (3072, 8192, 28, 24, 8, {1: 1_519_616, 2: 3_039_232, 8: 12_156_928}),
    "LLaMA3-8B": (4096, 14336, 32, 32, 8, {1: 2_621_440, 2: 5_242_880}),
}


@pytest.mark.parametrize("name", MODELS)
def test_counts_of_published_models(name):
    hidden, intermediate, layers, heads, groups, expected = MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=128,
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    with torch.device("meta"):
        adapted = get_peft_model(model, MosConfig(target_modules=LINEARS, private_rank=0))
        for budget, count in expected.items():
            adapted.add_adapter(
                f"e{budget}",
                MosConfig(target_modules=LINEARS, equivalent_rank=budget),
                low_cpu_mem_usage=True,
            )
            pools = adapted.base_model.mos_pools[f"e{budget}"]
            assert sum(pool.numel() for pool in pools.parameters()) == count
            assert all(pool.device.type == "meta" for pool in pools.parameters())
    assert adapted.get_nb_trainable_parameters()[0] == expected[2]


@pytest.mark.parametrize(
    "options", [{}, {"rank": 3}, {"shards_per_vector": 1}, {"private_rank": 1}, {"rank": 12}]
)
def test_the_count_does_not_move_with_rank_shards_or_privacy(options, capsys):
    model = adapted(**options)
    assert model.get_nb_trainable_parameters()[0] == 6 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    model.print_trainable_parameters()
    assert "5,568" in capsys.readouterr().out


def test_a_learned_row_scale_adds_one_number_a_rank():
    plain, scaled = adapted(rank=4), adapted(rank=4, row_scale="learned")
    more = scaled.get_nb_trainable_parameters()[0] - plain.get_nb_trainable_parameters()[0]
    assert more == 6 * 7 * 4
