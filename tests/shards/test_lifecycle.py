"""Saving, loading, several adapters, casts and copies: the pools stay shared through all of it."""

import copy
import json
import os
import pickle
from importlib.metadata import version

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from shards.shard_models import LINEARS, adapted, layers, pools
from small_models import make, tokens

from weightshare.errors import UserError
from weightshare.shards import MosConfig
from weightshare.shards.registration import check_release, register

FILE = "adapter_model.safetensors"


def shared(model, adapter="default"):
    """Every layer of the group sees the pool that is registered, and the pools count once."""
    for layer in layers(model, adapter):
        place = layer.mos_places[adapter]
        for key, _ in (place.a, place.b):
            pool = pools(model, adapter)[key]
            assert layer.mos_pools[adapter][key] is pool
            assert layer._store.pool(adapter, key) is pool
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if ".mos_" in n]
    mine = [n for n in names if f".{adapter}." in n]
    assert len(mine) == len(set(mine)) == len(pools(model, adapter))
    return sum(pool.numel() for pool in pools(model, adapter).values())


def test_it_is_registered_once_and_only_with_known_releases():
    register()
    register()
    for release in ("0.20.0", "0.21.2", "0.21.3.dev0"):
        check_release(release)
    for release in ("0.19.1", "0.22.0", "1.0.0"):
        with pytest.raises(UserError, match=r"0\.20 and 0\.21"):
            check_release(release)


@pytest.mark.parametrize("save_indices", [True, False])
@pytest.mark.parametrize("name", ["default", "other"])
def test_it_comes_back_bit_for_bit_and_the_file_holds_each_pool_once(tmp_path, save_indices, name):
    x = tokens()
    model = adapted(save_indices=save_indices, index_seed=3, row_scale="learned")
    model.save_pretrained(tmp_path)
    count = sum(pool.numel() for pool in pools(model).values())
    indices = sum(len(la.mos_indices_A["default"]) for la in layers(model)) * 2 * 2
    bound = 4 * count + save_indices * indices + 32_000
    assert os.path.getsize(tmp_path / FILE) <= bound
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "MOS"
    torch.manual_seed(99)
    back = PeftModel.from_pretrained(make("llama"), tmp_path, adapter_name=name).eval()
    assert torch.equal(back(x).logits, model(x).logits)
    assert shared(back, name) == count
    stored = [t.dtype for key, t in load_file(tmp_path / FILE).items() if "mos_indices" in key]
    # PEFT 0.20 does not ask the method what to save.
    compact = torch.int32 if version("peft").startswith("0.20") else torch.int16
    assert set(stored) == ({compact} if save_indices else set())
    assert not any(p.requires_grad for p in back.parameters())


def test_a_different_draw_in_the_file_wins_over_the_seed(tmp_path):
    x = tokens()
    model = adapted(index_seed=3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["index_seed"] = 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    back = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(back(x).logits, model(x).logits)


def damage(path, what):
    state = load_file(path / FILE)
    if what == "flipped":
        key = next(key for key in state if "mos_indices_A" in key)
        state[key][0] += 1
    elif what == "no index":
        del state[next(key for key in state if "mos_indices_B" in key)]
    elif what == "no pool":
        del state[next(key for key in state if "mos_pools" in key)]
    elif what == "no checksum":
        del state[next(key for key in state if "mos_checksum" in key)]
    else:
        key = next(key for key in state if "mos_pools" in key)
        state[key] = state[key][:-1].contiguous()
    save_file(state, path / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("flipped", "checksum"),
        ("no index", r"has no .*mos_indices_B"),
        ("no pool", r"has no mos_pools"),
        ("no checksum", "checksum"),
        ("short", "has the shape"),
    ],
)
def test_a_damaged_file_is_refused_and_the_model_left_as_it_was(tmp_path, what, said):
    x, base = tokens(), make("llama")
    want, modules = base(x).logits, [type(m) for m in base.modules()]
    adapted().save_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(UserError, match=said):
        PeftModel.from_pretrained(base, tmp_path)
    assert [type(m) for m in base.modules()] == modules
    assert torch.equal(base(x).logits, want)
    model = adapted(seed=5)
    before = model(x).logits
    with pytest.raises(UserError, match=said):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(model(x).logits, before)
    assert list(pools(model)) and "second" not in model.base_model.mos_pools


@pytest.mark.parametrize("other", [{"intermediate_size": 40}, {"num_hidden_layers": 3}])
@pytest.mark.parametrize("targets", [LINEARS, ["up_proj"]])
def test_an_adapter_of_another_model_is_refused(tmp_path, other, targets):
    """PEFT leaves keys it does not know aside, and would go on with an untrained adapter."""
    adapted(target_modules=targets).save_pretrained(tmp_path)
    config = copy.deepcopy(make("llama").config)
    vars(config).update(other)
    with pytest.raises(UserError, match=r"made for other modules|its configuration asks for"):
        PeftModel.from_pretrained(type(make("llama"))(config), tmp_path)


def test_indices_that_cannot_be_drawn_again_are_refused(tmp_path):
    adapted(save_indices=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "index_seed": 1}))
    with pytest.raises(UserError, match="checksum"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


def test_adapters_of_different_form_live_side_by_side(tmp_path):
    x = tokens()
    model = adapted()
    first = model(x).logits
    other = MosConfig(
        target_modules=["q_proj", "up_proj"],
        equivalent_rank=3,
        rank=5,
        shards_per_vector=4,
        private_rank=1,
        index_seed=7,
        init_weights=False,
    )
    model.add_adapter("other", other)
    assert shared(model) == 5568
    assert shared(model, "other") == 3 * 6 * (64 + 80)
    assert torch.equal(model(x).logits, first)
    assert all(p.requires_grad for p in pools(model).values())
    assert not any(p.requires_grad for p in pools(model, "other").values())
    model.set_adapter("other")
    second = model(x).logits
    assert not torch.equal(first, second)
    assert not any(p.requires_grad for p in pools(model).values())
    assert all(p.requires_grad for p in pools(model, "other").values())
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(make("llama"), tmp_path)
    back.load_adapter(tmp_path / "other", "other")
    back.load_adapter(tmp_path, "third")
    for name, want in (("default", first), ("other", second), ("third", first)):
        back.set_adapter(name)
        shared(back, name)
        # "default" lies at the top of the folder, the others under their names.
        assert torch.equal(back(x).logits, want), name
    model.delete_adapter("other")
    assert "other" not in model.base_model.mos_pools
    model.set_adapter("default")
    assert torch.equal(model(x).logits, first)


def test_the_pools_stay_shared_through_casts_copies_and_merges(tmp_path):
    x = tokens()
    model = adapted()
    model.train()(x, labels=x).loss.backward()
    want = model.eval()(x).logits
    clone = copy.deepcopy(model)
    assert shared(clone) == shared(model) == 5568
    assert next(iter(pools(clone).values())) is not next(iter(pools(model).values()))
    pickled = pickle.loads(pickle.dumps(model))
    assert shared(pickled) == 5568 and torch.equal(pickled(x).logits, want)
    clone.merge_adapter()
    clone.unmerge_adapter()
    shared(clone.double().to("cpu").bfloat16())
    assert all(pool.dtype == torch.bfloat16 for pool in pools(clone).values())
    assert all(la.mos_indices_A["default"].dtype == torch.int32 for la in layers(clone))
    clone(x)
    model.save_pretrained(tmp_path)
    lean = PeftModel.from_pretrained(make("llama"), tmp_path, low_cpu_mem_usage=True)
    assert shared(lean) == 5568 and torch.equal(lean(x).logits, want)
    lean.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    lean.set_adapter("other")
    assert shared(lean, "other") == 5568 and torch.equal(lean(x).logits, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_on_a_half_precision_base_pools_are_float32_unless_told(tmp_path, dtype, autocast):
    options = {"target_modules": LINEARS, "shards_per_vector": 2, "init_weights": False}
    base = make("llama").to(dtype)
    model = get_peft_model(base, MosConfig(**options), autocast_adapter_dtype=autocast)
    model.add_adapter("other", MosConfig(**options), autocast_adapter_dtype=autocast)
    for name in ("default", "other"):
        assert shared(model, name) == 5568
        kinds = {pool.dtype for pool in pools(model, name).values()}
        assert kinds == {torch.float32 if autocast else dtype}
    assert model(tokens()).logits.dtype == dtype
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(make("llama").to(dtype), tmp_path)
    for key, pool in pools(back).items():
        assert torch.equal(pool.float(), pools(model)[key].float())


def test_modules_to_save_go_along(tmp_path):
    x = tokens()
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(back(x).logits, model(x).logits)


def test_the_auto_class_and_unloading(tmp_path):
    x = tokens()
    make("llama").save_pretrained(tmp_path / "base")
    base = make("llama")
    want = base(x).logits
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(
        base, MosConfig(target_modules=LINEARS, shards_per_vector=2, init_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    back = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        adapted_logits = model.eval()(x).logits
        assert torch.allclose(back(x).logits, adapted_logits, atol=1e-5)
        merged = back.merge_and_unload()
        assert torch.allclose(merged(x).logits, adapted_logits, atol=1e-4)
        assert not any("mos_" in name for name, _ in merged.named_parameters())
        assert torch.equal(model.unload()(x).logits, want)


def test_generating_gathers_once_and_writes_the_same():
    x = tokens(2, 5)
    model = adapted()
    store = model.base_model.mos_store
    calls = []
    original = store.rows
    store.rows = lambda *a: calls.append(store._rows is not None) or original(*a)
    written = model.generate(input_ids=x, max_new_tokens=6, do_sample=False)
    assert calls and all(calls)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(written, merged.generate(input_ids=x, max_new_tokens=6, do_sample=False))


def test_peft_s_switch_for_casts_of_inputs_is_accepted():
    model = adapted()
    with torch.no_grad():
        want = model(tokens(2)).logits
        with disable_input_dtype_casting(model):
            assert torch.equal(model(tokens(2)).logits, want)


def test_kept_factors_follow_a_change_of_the_pools():
    x = tokens()
    model = adapted()
    with model.base_model.assembled():
        first = model(x).logits
        for pool in pools(model).values():
            pool.mul_(0.5)
        second = model(x).logits
    assert not torch.equal(first, second)
    assert torch.equal(second, model(x).logits)
