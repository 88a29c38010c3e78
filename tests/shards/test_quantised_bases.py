"""Bases really quantised by bitsandbytes, as QLoRA has them; test_capabilities has a stand-in."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from weightshare.language import model_path, quiet
from weightshare.shards import MosConfig, to_lora

pytest.importorskip("bitsandbytes")

KINDS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_is_saved_exported_and_merged_as_lora_is(kind, tmp_path):
    def load():
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                model_path("tiny"),
                quantization_config=BitsAndBytesConfig(**KINDS[kind]),
                device_map={"": "cpu"},
                dtype=torch.float32,
            )

    ids = torch.randint(5, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    base = load()
    plain = base(ids).logits
    torch.manual_seed(0)
    config = MosConfig(target_modules="all-linear", init_weights=False, lora_alpha=0.5)
    model = get_peft_model(base, config)
    found = model(ids, labels=ids)
    found.loss.backward()
    pools = list(model.base_model.mos_pools.parameters())
    assert all(pool.dtype == torch.float32 and pool.grad.any() for pool in pools)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)
        model.save_pretrained(tmp_path / "mos")
        again = PeftModel.from_pretrained(load(), tmp_path / "mos")
        assert torch.equal(again(ids).logits, found.logits)
        to_lora(model, tmp_path / "lora")
        lora = PeftModel.from_pretrained(load(), tmp_path / "lora")
        torch.testing.assert_close(lora(ids).logits, found.logits, rtol=1e-3, atol=1e-3)
        # Merging rounds to the grid again; it does so as PEFT's LoRA does.
        model.merge_adapter()
        lora.merge_adapter()
        torch.testing.assert_close(model(ids).logits, lora(ids).logits, rtol=1e-3, atol=1e-2)
