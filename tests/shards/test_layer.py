"""What the adapted layer computes, against the definition and against PEFT's LoRA."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from shards.shard_models import LINEARS, adapted, dense_factors, layers, pools
from small_models import make, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from weightshare.errors import UserError
from weightshare.shards import MosConfig


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_with_full_privacy_its_outputs_are_those_of_lora_bit_for_bit(shards):
    x = tokens()
    mos = adapted(equivalent_rank=4, rank=4, private_rank=4, shards_per_vector=shards)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=LINEARS)
    lora = get_peft_model(make("llama"), config).eval()
    theirs = dict(lora.base_model.model.named_modules())
    for name, layer in mos.base_model.model.named_modules():
        if layer in layers(mos):
            a, b, _ = layer.lora_factors("default")
            theirs[name].lora_A["default"].weight.data.copy_(a)
            theirs[name].lora_B["default"].weight.data.copy_(b)
    ours, want = mos(x, labels=x), lora(x, labels=x)
    assert torch.equal(ours.logits, want.logits)
    ours.loss.backward()
    want.loss.backward()
    for name, layer in mos.base_model.model.named_modules():
        if layer in layers(mos):
            key, member = layer.mos_places["default"].a
            grad = pools(mos)[key].grad.view(6, 4, -1)[member]
            want_grad = theirs[name].lora_A["default"].weight.grad
            torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-5)
            key, member = layer.mos_places["default"].b
            grad = pools(mos)[key].grad.view(6, 4, -1)[member]
            want_grad = theirs[name].lora_B["default"].weight.grad.t()
            torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-5)


def test_it_starts_as_the_identity_with_the_range_of_whole_vectors():
    x, base = tokens(), make("llama")
    want = base(x).logits
    big = get_peft_model(
        nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)]),
        MosConfig(target_modules=["0", "1", "2", "3"], equivalent_rank=8, pool_scope="shape"),
    )
    model = adapted(init_weights=True)
    assert torch.equal(model(x).logits, want)
    for key, pool in pools(model).items():
        if key.endswith("_B"):
            assert not pool.any()
    a = pools(big)["512_w128_A"]
    assert a.abs().max() <= 1 / 512**0.5
    assert abs(a.std() / (3 * 512) ** -0.5 - 1) < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shards_per_vector": 1},
        {"private_rank": 1, "rank": 5, "shards_per_vector": 4},
        {"pool_scope": "shape"},
        {"pool_scope": "all", "rank": 4},
        {"equivalent_rank": 1, "output_rank": 3, "rank": 4},
        {"index_strategy": "balanced"},
        {"rank_pattern": {"q_proj": 3, "layers.0.self_attn.k_proj": 5}, "rank": 4},
        {"shard_pattern": {"up_proj": 8}},
    ],
)
def test_the_gather_is_the_double_loop_over_rows_and_segments(options):
    model = adapted(**options)
    with torch.no_grad(), model.base_model._gathered(["default"]):
        for layer in layers(model):
            a, b = layer.factors("default", torch.float32)
            want_a, want_b = dense_factors(model, layer)
            assert torch.equal(a, want_a) and torch.equal(b.t(), want_b)
    for layer in layers(model):
        a, b = layer.factors("default", torch.float32)
        want_a, want_b = dense_factors(model, layer)
        assert torch.equal(a, want_a) and torch.equal(b.t(), want_b)


@pytest.mark.parametrize("options", [{}, {"private_rank": 1}, {"pool_scope": "all", "rank": 4}])
def test_the_gradient_of_a_shard_is_the_sum_over_its_uses(options):
    x = tokens()
    model = adapted(**options)
    model(x, labels=x).loss.backward()
    got = {key: pool.grad.clone() for key, pool in pools(model).items()}
    # The same loss with dense factors as leaves.
    plain = adapted(**options)
    leaves = {}
    for layer in layers(plain):
        a, b = (m.detach().requires_grad_() for m in layer.factors("default", torch.float32))
        layer.factors = lambda name, dtype, ab=(a, b): ab
        leaves[layer] = {"A": a, "B": b}
    plain(x, labels=x).loss.backward()
    want = {key: torch.zeros_like(grad) for key, grad in got.items()}
    for layer, sides in leaves.items():
        for side, place in (
            ("A", layer.mos_places["default"].a),
            ("B", layer.mos_places["default"].b),
        ):
            index = getattr(layer, f"mos_indices_{side}")["default"]
            segments = sides[side].grad.reshape(len(index), -1)
            for entry, shard in enumerate(index.tolist()):
                want[place[0]][shard] += segments[entry]
    for key, grad in got.items():
        torch.testing.assert_close(grad, want[key], rtol=1e-4, atol=1e-6)
        used = torch.zeros(len(grad), dtype=torch.bool)
        table = plain.base_model.mos_store.tables["default"][key]
        used[table.prepare(grad.device).index] = True
        assert not grad[~used].any()


@pytest.mark.parametrize(
    "options", [{}, {"scale_by_use": True}, {"row_scale": "learned"}, {"row_scale": "random"}]
)
def test_gradients_are_those_of_finite_differences(options):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model = get_peft_model(
        model,
        MosConfig(
            target_modules=["0", "1", "2"],
            pool_scope="shape",
            shards_per_vector=2,
            equivalent_rank=1,
            rank=1,
            init_weights=False,
            **options,
        ),
        autocast_adapter_dtype=False,
    )
    named = dict(model.base_model.mos_pools["default"].named_parameters())
    x = torch.randn(3, 4, dtype=torch.float64)

    def run(*values):
        replaced = dict(zip((f"base_model.mos_pools.default.{n}" for n in named), values))  # noqa: B905
        return torch.func.functional_call(model, replaced, (x,))

    assert torch.autograd.gradcheck(run, tuple(p.detach().requires_grad_() for p in named.values()))


def test_a_module_touches_no_private_shard_of_another():
    model = adapted(private_rank=1)
    layer = layers(model)[0]
    layer(torch.randn(2, 32)).sum().backward()
    key, _ = layer.mos_places["default"].a
    touched = pools(model)[key].grad.abs().sum(1) > 0
    public = 1 * 6 * 2
    assert touched[public : public + 2].all() and not touched[public + 2 :].any()


def test_pure_sharing_gives_every_layer_the_same_update():
    model = adapted(rank=12, shards_per_vector=1, private_rank=0, pair_dissociation=False)
    of_type = [la for la in layers(model) if la.mos_places["default"].a[0] == "q_proj_32x32_A"]
    deltas = [layer.get_delta_weight("default") for layer in of_type]
    assert len(deltas) == 6
    for delta in deltas[1:]:
        torch.testing.assert_close(delta, deltas[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged_and_comes_back(dtype):
    x = tokens()
    model = adapted().to(dtype)
    model.add_adapter(
        "other", MosConfig(target_modules=LINEARS, shards_per_vector=2, init_weights=False)
    )
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.3}
    with torch.no_grad():
        alone = model(x).logits
        model.merge_adapter()
        torch.testing.assert_close(model(x).logits, alone, **tolerance)
        merged = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            model.merge_adapter()
        after = dict(model.named_parameters())
        assert all(torch.equal(p, after[n]) for n, p in merged.items())
        model.unmerge_adapter()
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())
        # In either order.
        model.merge_adapter(["default", "other"])
        first = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
        model.unmerge_adapter()
        model.merge_adapter(["other", "default"])
        for name, value in first.items():
            error = (dict(model.named_parameters())[name] - value).abs().max()
            assert error <= (1e-6 if dtype == torch.float32 else 4e-2)


@pytest.mark.filterwarnings("ignore:Already following adapters")
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_refuses_nan_and_leaves_the_base_alone(how):
    model = adapted()
    model.add_adapter("b", MosConfig(target_modules=["q_proj"], init_weights=False))
    model.merge_adapter(["b"])
    # Layers before the broken one are merged already when it is found.
    key, _ = layers(model)[-1].mos_places["default"].a
    pools(model)[key].data[:] = torch.nan
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, how)(safe_merge=True)
    after = dict(model.named_parameters())
    weights = [name for name in before if "mos_pools" not in name]
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in weights)
    assert {tuple(layer.merged_adapters) for layer in layers(model)} == {("b",), ()}


@pytest.mark.filterwarnings("ignore")
def test_merging_a_tied_weight_leaves_the_other_end_of_the_tie_alone():
    x = tokens()
    base = make("llama", tie_word_embeddings=True)
    options = {"target_modules": ["lm_head", "q_proj"], "shards_per_vector": 1}
    model = get_peft_model(base, MosConfig(**options, init_weights=False)).eval()
    with torch.no_grad():
        want = model(x).logits
        model.merge_adapter()
        torch.testing.assert_close(model(x).logits, want, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert base.lm_head.weight is base.model.embed_tokens.weight
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x).logits, want, rtol=1e-4, atol=1e-5)
    assert not merged.config.tie_word_embeddings


def test_a_base_that_is_offloaded_is_refused_and_left_as_it_was():
    base = cpu_offload(make("llama"), execution_device="cpu")
    with pytest.raises(UserError, match=r"q_proj are offloaded"):
        get_peft_model(base, MosConfig(target_modules=["q_proj"]))
    x = tokens()
    assert torch.equal(base(x).logits, make("llama")(x).logits)


def test_disabled_it_is_the_base_bit_for_bit():
    x = tokens()
    want = make("llama")(x).logits
    model = adapted()
    adapted_logits = model(x).logits
    assert not torch.equal(adapted_logits, want)
    with model.disable_adapter():
        assert torch.equal(model(x).logits, want)
    assert torch.equal(model(x).logits, adapted_logits)
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x).logits, want)
    assert torch.equal(model(x).logits, adapted_logits)


def test_conv1d_computes_the_same_as_linear():
    torch.manual_seed(0)
    conv, linear = nn.Sequential(Conv1D(12, 8)), nn.Sequential(nn.Linear(8, 12))
    linear[0].weight.data.copy_(conv[0].weight.t())
    linear[0].bias.data.copy_(conv[0].bias)
    x = torch.randn(3, 8)
    found = []
    for model in (conv, linear):
        torch.manual_seed(1)
        config = MosConfig(target_modules=["0"], rank=2, init_weights=False)
        model = get_peft_model(model, config)
        y = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        found.append(y)
    torch.testing.assert_close(*found)


def test_targets_that_cannot_be_are_refused_and_the_model_is_as_it_was():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 7))
    before = [(type(m), p.requires_grad) for m in model.modules() for p in m.parameters()]
    with pytest.raises(UserError, match=r"12 inputs and 7 outputs.*give one of 1,"):
        get_peft_model(model, MosConfig(target_modules=["0", "1"]))
    with pytest.raises(TypeError, match="not supported"):
        get_peft_model(nn.Sequential(nn.Linear(8, 12), nn.ReLU()), MosConfig(target_modules=["1"]))
    assert before == [(type(m), p.requires_grad) for m in model.modules() for p in m.parameters()]
    assert isinstance(model[0], nn.Linear)
