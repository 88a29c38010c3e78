"""Users of one public pool, each with a part of its own; budgets below one rank."""

import copy

import pytest
import torch
from peft import PeftModel
from shards.shard_models import LINEARS, adapted, layers, pools
from small_models import make, tokens

from weightshare.errors import UserError
from weightshare.shards import MosConfig, Target, add_user, parameter_count, plan_pools, to_lora

SIZES = 64 + 48 + 48 + 64 + 80 + 80 + 80


def community(**options):
    model = adapted(rank=6, **options)
    add_user(model, "ann")
    add_user(model, "bob", equivalent_rank=0.5, index_seed=7)
    return model.eval()


@pytest.mark.parametrize("budget", [0.5, 1 / 3, 1.5])
@pytest.mark.parametrize("scope", ["type", "shape", "all"])
def test_a_budget_may_be_a_fraction(budget, scope):
    model = adapted(equivalent_rank=budget, pool_scope=scope)
    count = model.get_nb_trainable_parameters()[0]
    assert abs(count - budget * 6 * SIZES) <= sum(p.shape[1] for p in pools(model).values()) / 2
    targets = [
        Target(name, layer.in_features, layer.out_features)
        for name, layer in model.base_model.model.named_modules()
        if layer in layers(model)
    ]
    config = model.peft_config["default"]
    assert parameter_count(targets, config) == count == plan_pools(targets, config).parameters


def test_less_than_one_vector_is_refused():
    with pytest.raises(UserError, match="less than one whole vector in the pool of its 6"):
        adapted(equivalent_rank=0.05)


@torch.no_grad()
def test_a_user_starts_as_the_public_part_and_trains_only_its_own():
    x = tokens(3)
    model = adapted(rank=6)
    first = model(x).logits
    add_user(model, "ann", init_weights=True)
    model.set_adapter("ann")
    torch.testing.assert_close(model(x).logits, first, rtol=1e-5, atol=1e-5)
    assert model.get_nb_trainable_parameters()[0] == 6 * SIZES
    assert layers(model, "ann")[0].mos_places["ann"].rank == 7


def test_the_gradient_of_a_public_shard_is_the_sum_over_its_users():
    x, names = tokens(4), ["ann", "bob", "default", "ann"]
    model = community()
    model.base_model.set_adapter(["default", "ann", "bob"])
    model(x, labels=x, adapter_names=names).loss.backward()
    found = {
        (name, key): pool.grad for name in set(names) for key, pool in pools(model, name).items()
    }
    # By hand: every factor is a leaf, and its gradient is carried to the rows it was made of.
    again = community()
    want = {place: torch.zeros_like(grad) for place, grad in found.items()}
    leaves = {}
    for layer in layers(again):
        original = layer.factors

        def factors(name, dtype, layer=layer, original=original):
            if (layer, name) not in leaves:
                leaves[layer, name] = tuple(
                    part.detach().requires_grad_() for part in original(name, dtype)
                )
            return leaves[layer, name]

        layer.factors = factors
    again(x, labels=x, adapter_names=names).loss.backward()
    for (layer, name), factors in leaves.items():
        place = layer.mos_places[name]
        for side, (key, _), factor in zip("AB", (place.a, place.b), factors, strict=True):
            index = getattr(layer, f"mos_indices_{side}")[name]
            rows = factor.grad.reshape(len(index), -1)
            borrowed = again.base_model.mos_store.tables[name][key].borrowed
            for shard, row in zip(index.tolist(), rows, strict=True):
                owner = ("default", shard) if shard < borrowed else (name, shard - borrowed)
                want[owner[0], key][owner[1]] += row
    for place, grad in want.items():
        torch.testing.assert_close(found[place], grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_rows_of_a_mixed_batch_are_those_of_each_user_alone():
    x, names = tokens(5), ["bob", "ann", "__base__", "default", "bob"]
    model = community()
    mixed = model(x, adapter_names=names).logits
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
            alone = model(x).logits[row]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kept_stacks_of_users_follow_a_change_of_the_lender():
    model, x, names = community(), tokens(3), ["ann", "bob", "ann"]
    with model.base_model.assembled("ann", "bob"):
        first = model(x, adapter_names=names).logits
        for pool in pools(model).values():
            pool.mul_(0.5)
        second = model(x, adapter_names=names).logits
    assert not torch.equal(first, second)
    assert torch.equal(model(x, adapter_names=names).logits, second)


def test_a_user_s_file_holds_its_own_part_and_needs_the_lender(tmp_path):
    x = tokens(2)
    model = community()
    model.save_pretrained(tmp_path)
    want = {}
    for name in ("ann", "bob"):
        model.set_adapter(name)
        want[name] = model(x).logits
    sizes = {
        name: (tmp_path / name / "adapter_model.safetensors").stat().st_size
        for name in ("ann", "bob")
    }
    assert sizes["ann"] < 4 * 6 * SIZES + 32_000
    with pytest.raises(UserError, match="load that one first"):
        PeftModel.from_pretrained(make("llama"), tmp_path / "ann")
    back = PeftModel.from_pretrained(make("llama"), tmp_path)
    for name, logits in want.items():
        back.load_adapter(tmp_path / name, name)
        back.set_adapter(name)
        assert torch.equal(back(x).logits, logits)
    # Public pools of another size: its indices would point elsewhere.
    other = adapted(rank=6, equivalent_rank=1.5)
    with pytest.raises(UserError):
        other.load_adapter(tmp_path / "ann", "ann")
    assert list(other.peft_config) == ["default"]


def test_a_new_user_joins_public_pools_that_are_frozen(tmp_path):
    x = tokens(3)
    community().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make("llama"), tmp_path)
    model.load_adapter(tmp_path / "ann", "ann")
    before = copy.deepcopy(model.state_dict())
    add_user(model, "carl", init_weights=True)
    model.set_adapter("carl")
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"carl"}
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        losses.append(model(x, labels=x).loss)
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    after = model.eval().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    model.save_pretrained(tmp_path / "joined", selected_adapters=["carl"])
    back = PeftModel.from_pretrained(make("llama"), tmp_path)
    back.load_adapter(tmp_path / "joined" / "carl", "carl")
    back.set_adapter("carl")
    assert torch.equal(back(x).logits, model(x).logits)


@torch.no_grad()
def test_users_survive_copies_merging_and_export(tmp_path):
    x = tokens(2)
    model = community()
    model.set_adapter("bob")
    want = model(x).logits
    assert torch.equal(copy.deepcopy(model)(x).logits, want)
    to_lora(model, tmp_path / "lora", "bob")
    stock = PeftModel.from_pretrained(make("llama"), tmp_path / "lora")
    torch.testing.assert_close(stock(x).logits, want, rtol=1e-4, atol=1e-5)
    model.merge_adapter(["bob"])
    torch.testing.assert_close(model(x).logits, want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    # A change of the public pool reaches its users.
    for pool in pools(model).values():
        pool.mul_(2)
    assert not torch.allclose(model(x).logits, want)


def test_what_cannot_be_lent_is_refused():
    model = community()
    with pytest.raises(UserError, match="delete them first"):
        model.delete_adapter("default")
    with pytest.raises(UserError, match="no adapter 'nobody'"):
        add_user(model, "x", "nobody")
    for budget in (0, float("nan"), "1"):
        with pytest.raises(UserError, match="equivalent_rank is"):
            add_user(model, "x", equivalent_rank=budget)
    for options, said in (
        ({"public_from": "nobody"}, "load that one first"),
        ({"public_from": "ann"}, "itself borrows"),
        ({"public_from": "default", "shards_per_vector": 1}, "shards_per_vector that it has"),
        ({"public_from": "default", "public_rank": 99}, "at most 12"),
    ):
        config = {"target_modules": LINEARS, "shards_per_vector": 2, **options}
        with pytest.raises(UserError, match=said):
            model.add_adapter("x", MosConfig(**config))
        assert "x" not in model.peft_config
    for options in ({"public_rank": 2}, {"public_from": "a", "scale_by_use": True}):
        with pytest.raises(UserError):
            MosConfig(**options)
    model.delete_adapter("ann"), model.delete_adapter("bob"), model.delete_adapter("default")
