"""Batches whose rows have different adapters."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shards.shard_models import LINEARS, adapted, pools
from small_models import make, tokens

from weightshare.shards import MosConfig
from weightshare.shards.batched import UserFactors, _batched, _looped, add_updates


def three():
    model = adapted(row_scale="learned")
    for name, options in (("b", {"rank": 3}), ("c", {"target_modules": ["q_proj", "up_proj"]})):
        config = {"target_modules": LINEARS, "shards_per_vector": 2, "init_weights": False}
        model.add_adapter(name, MosConfig(**{**config, **options}))
    return model.eval()


@pytest.mark.parametrize(
    "names",
    [
        ["default", "b", "__base__", "c", "default"],
        ["c", "b", "default", "__base__"],
        ["default", "default", "default"],
        ["__base__", "__base__"],
    ],
)
@torch.no_grad()
def test_rows_equal_those_of_each_adapter_alone(names):
    x = tokens(len(names))
    model = three()
    mixed = model(x, adapter_names=names).logits
    base = make("llama")(x).logits
    for row, name in enumerate(names):
        if name == "__base__":
            assert torch.equal(mixed[row], base[row])
        else:
            model.set_adapter(name)
            alone = model(x).logits[row]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_is_mixed_too(beams):
    names = ["default", "__base__", "b", "c"]
    x = tokens(4, 5)
    model = three()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=x, adapter_names=names, **options)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=x[row : row + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=x[row : row + 1], **options)
        length = alone.shape[1]
        assert torch.equal(mixed[row, :length], alone[0])


@pytest.mark.parametrize("where", ["generation_config", "own"])
@torch.no_grad()
def test_beams_may_come_from_a_generation_configuration(where):
    names, x, model = ["default", "__base__", "b"], tokens(3, 5), three()
    given = {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(input_ids=x, adapter_names=names, num_beams=3, **given)
    own = model.base_model.model.generation_config
    if where == "own":
        own.num_beams = 3
    else:
        changed = copy.deepcopy(own)
        changed.num_beams = 3
        given["generation_config"] = changed
    assert torch.equal(model.generate(input_ids=x, adapter_names=names, **given), want)


@torch.no_grad()
def test_several_sequences_of_a_row_have_its_adapter():
    names, x, model = ["b", "__base__"], tokens(2, 5), three()
    given = {"max_new_tokens": 4, "num_beams": 4, "do_sample": False, "num_return_sequences": 3}
    mixed = model.generate(input_ids=x, adapter_names=names, **given)
    model.set_adapter("b")
    alone = model.generate(input_ids=x[:1], **given)
    assert torch.equal(mixed[:3, : alone.shape[1]], alone)
    sampled = model.generate(
        input_ids=x, adapter_names=names, do_sample=True, num_return_sequences=3, max_new_tokens=2
    )
    assert len(sampled) == 6


def test_unknown_adapters_and_wrong_lengths_are_refused():
    model, x = three(), tokens(2)
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(x, adapter_names=["nobody", "b"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=["b"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(x, adapter_names=["b", "b"])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.lists(st.integers(-1, 4), min_size=1, max_size=9),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_the_batched_path_is_the_loop_over_users(ranks, users, dtype, seed):
    torch.manual_seed(seed)
    users = [user if user < len(ranks) else -1 for user in users]
    each = [
        (torch.randn(r, 12, dtype=dtype), torch.randn(r, 7, dtype=dtype), 0.5 + i)
        for i, r in enumerate(ranks)
    ]
    factors = UserFactors(each)
    x = torch.randn(len(users), 3, 12, dtype=dtype)
    y = torch.randn(len(users), 3, 7, dtype=dtype)
    looped = _looped(y, x, users, factors)
    rows = [row for row, user in enumerate(users) if user >= 0]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if rows:
        batched = _batched(y, x, [users[r] for r in rows], rows, factors)
        torch.testing.assert_close(batched, looped, rtol=tolerance, atol=20 * tolerance)
    chosen = add_updates(y, x, users, factors)
    for row, user in enumerate(users):
        want = y[row]
        if user >= 0:
            a, b, scale = (m.double() if torch.is_tensor(m) else m for m in each[user])
            want = y[row] + scale * (x[row].double() @ a.t() @ b)
            error = (chosen[row].double() - want).abs().max()
            assert error <= 20 * tolerance * max(1.0, float(want.abs().max()) / 8)
        else:
            assert torch.equal(chosen[row], want)


@torch.no_grad()
def test_kept_stacks_of_users_follow_a_change_of_any_pool():
    names, x, model = ["default", "b", "c", "b"], tokens(4), three()
    with model.base_model.assembled():
        first = model(x, adapter_names=names).logits
        assert torch.equal(model(x, adapter_names=names).logits, first)
        for pool in pools(model, "b").values():
            pool.mul_(0.5)
        second = model(x, adapter_names=names).logits
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    assert torch.equal(model(x, adapter_names=names).logits, second)
