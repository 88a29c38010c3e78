"""To stock LoRA and back, hot-swapping, and weighted sums."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from shards.shard_models import LINEARS, adapted, pools
from small_models import make, tokens

from weightshare.errors import UserError
from weightshare.shards import MosConfig, from_lora, hotswap, to_lora


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "private_rank": 1, "rank": 6},
        {"rank_pattern": {"q_proj": 3}, "rank": 4, "alpha_pattern": {"up_proj": 8}},
        {"row_scale": "learned", "scale_by_use": True, "pool_scope": "all"},
        {"row_scale": "random", "modules_to_save": ["lm_head"]},
    ],
)
def test_the_export_is_stock_lora_with_equal_logits(tmp_path, options):
    x = tokens()
    model = adapted(**options)
    to_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    lora = PeftModel.from_pretrained(make("llama"), tmp_path / "lora")
    torch.testing.assert_close(lora(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_peft_alone_loads_the_export(tmp_path):
    x = tokens()
    model = adapted()
    to_lora(model, tmp_path / "lora")
    make("llama").save_pretrained(tmp_path / "base")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "from peft import PeftModel\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'lora')!r})\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"torch.save(model(x).logits, {str(tmp_path / 'y.pt')!r})\n"
        "assert not any(m.startswith('weightshare') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    logits = torch.load(tmp_path / "y.pt")
    torch.testing.assert_close(logits, model(x).logits, rtol=1e-5, atol=1e-5)


def test_a_weighted_sum_of_adapters_is_one_lora(tmp_path):
    x = tokens()
    model = adapted()
    for name, options in (("b", {"rank": 3}), ("c", {"target_modules": ["q_proj"]})):
        config = {"target_modules": LINEARS, "shards_per_vector": 2, "init_weights": False}
        model.add_adapter(name, MosConfig(**{**config, **options, "index_seed": len(name)}))
    weights = {"default": 0.5, "b": -1.5, "c": 2.0}
    to_lora(model, tmp_path / "sum", weights)
    lora = PeftModel.from_pretrained(make("llama"), tmp_path / "sum")
    want = make("llama")
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if hasattr(layer, "mos_places"):
                for one, weight in weights.items():
                    if one in layer.mos_places:
                        want.get_submodule(name).weight += weight * layer.get_delta_weight(one)
        torch.testing.assert_close(lora(x).logits, want(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 2])
def test_lora_comes_in_exactly(tmp_path, shards):
    x = tokens()
    torch.manual_seed(0)
    lora = get_peft_model(
        make("llama"),
        LoraConfig(r=3, lora_alpha=7, target_modules=LINEARS, init_lora_weights=False),
    )
    lora.save_pretrained(tmp_path)
    model = from_lora(make("llama"), tmp_path, shards_per_vector=shards)
    assert torch.equal(model.eval()(x).logits, lora.eval()(x).logits)
    to_lora(model, tmp_path / "again")
    old, new = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_what_is_no_plain_lora_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        from_lora(make("llama"), tmp_path / "nowhere")
    get_peft_model(make("llama"), LoraConfig(use_dora=True)).save_pretrained(tmp_path / "dora")
    with pytest.raises(UserError, match="use_dora"):
        from_lora(make("llama"), tmp_path / "dora")
    adapted().save_pretrained(tmp_path / "mos")
    with pytest.raises(UserError, match="MOS adapter"):
        from_lora(make("llama"), tmp_path / "mos")
    lora = get_peft_model(make("llama"), LoraConfig())
    with pytest.raises(UserError, match="without Mixture of Shards"):
        to_lora(lora, tmp_path / "x")
    with pytest.raises(UserError, match="no adapter 'b'"):
        to_lora(adapted(), tmp_path / "x", "b")


def test_hotswap_overwrites_in_place(tmp_path):
    x = tokens()
    one, two = adapted(index_seed=1), adapted(seed=4, index_seed=2, lora_alpha=4)
    want = two(x).logits
    two.save_pretrained(tmp_path)
    kept = dict(pools(one))
    one(x)
    hotswap(one, tmp_path)
    assert all(pools(one)[key] is pool for key, pool in kept.items())
    torch.testing.assert_close(one(x).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_hotswap_does_not_recompile(tmp_path):
    torch._dynamo.reset()
    x = tokens()
    one, two = adapted(blocks=2, index_seed=1), adapted(blocks=2, seed=4, index_seed=2)
    with torch.no_grad():
        want = two(x).logits
        two.save_pretrained(tmp_path)
        compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
        compiled(x)
        hotswap(one, tmp_path)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x).logits, want, rtol=1e-5, atol=1e-5)


def test_a_hotswap_that_fails_changes_nothing(tmp_path):
    x = tokens()
    model = adapted()
    before = model(x).logits
    for name, options in (("rank", {"rank": 3}), ("scale", {"row_scale": "learned"})):
        adapted(**options).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=r"has the shape|differ in row_scale"):
            hotswap(model, tmp_path / name)
        assert torch.equal(model(x).logits, before)
    with pytest.raises(UserError, match="no adapter 'x'"):
        hotswap(model, tmp_path / "rank", "x")
    with pytest.raises(UserError, match="holds no adapter"):
        hotswap(model, tmp_path)
    adapted().save_pretrained(tmp_path / "alike")
    model.merge_adapter()
    with pytest.raises(UserError, match="is merged into the weights"):
        hotswap(model, tmp_path / "alike")
    model.unmerge_adapter()
    to_lora(model, tmp_path / "lora")
    with pytest.raises(UserError, match=r"method LORA; .*from_lora"):
        hotswap(model, tmp_path / "lora")
