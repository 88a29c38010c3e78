"""The gradient of each use of a weight, against twins that share nothing."""

import copy
import random

import pytest
import torch
from models import SHARED, Looped, Recurrent, TiedHead, TwoModules, batch, loss_of, twins
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from weightshare.errors import UserError
from weightshare.sharing import CountSketch, Use, accumulate, displaced, per_use, preserved
from weightshare.sharing.ghost import Factors
from weightshare.sharing.products import inner_products

each_kind = pytest.mark.parametrize(("kind", "name", "places"), SHARED)
checkpointed = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpoint"])


@each_kind
@checkpointed
def test_each_use_gets_the_gradient_of_its_place_in_the_unshared_twin(
    kind, name, places, checkpointing
):
    shared, unshared = twins(kind, name, places, checkpointing)
    with per_use(shared) as uses:
        gradients = uses.gradients(loss_of(shared, batch()))[name]
    loss_of(unshared, batch()).backward()
    assert len(gradients) == len(places)
    for place, gradient in zip(places, gradients.values(), strict=True):
        assert torch.allclose(gradient, unshared.get_parameter(place).grad, atol=1e-12)


@each_kind
@checkpointed
def test_uses_sum_to_the_gradient_in_one_backward_pass(kind, name, places, checkpointing):
    shared, _ = twins(kind, name, places, checkpointing)
    passes = []
    with per_use(shared) as uses:
        loss = loss_of(shared, batch())
        loss.register_hook(lambda _: passes.append(1))
        gradients = uses.gradients(loss)
    assert len(passes) == 1
    assert all(p.grad is None for p in shared.parameters())
    loss_of(shared, batch()).backward()
    for full, parameter in shared.named_parameters():
        assert torch.allclose(sum(gradients[full].values()), parameter.grad, atol=1e-10)


def test_uses_are_named_by_who_reads_the_weight_and_when():
    with per_use(model := Looped()) as uses:
        found = uses.gradients(loss_of(model, batch(dtype=torch.float32)))
    assert list(found["blocks.0.1.weight"]) == [Use("blocks.0.1", "weight", i) for i in range(4)]
    assert list(found["inp.weight"]) == [Use("inp", "weight")]
    with per_use(model := Recurrent()) as uses:
        found = uses.gradients(loss_of(model, batch(dtype=torch.float32)))
    projection = "layer.self_attn.out_proj"
    assert list(found[f"{projection}.bias"]) == [Use(projection, "bias", i) for i in range(3)]
    with per_use(model := TiedHead()) as uses:
        found = uses.gradients(loss_of(model, batch(dtype=torch.float32)))
    assert [str(u) for u in found["embedding.weight"]] == ["embedding.weight", "embedding.weight"]
    assert [u.module for u in found["embedding.weight"]] == ["embedding", ""]


def test_an_ordinary_backward_inside_gives_both_the_gradient_and_its_parts():
    model = TwoModules().double()
    with per_use(model) as uses:
        loss_of(model, batch()).backward()
        parts = uses.take()
    reference = copy.deepcopy(model)
    reference.zero_grad()
    loss_of(reference, batch()).backward()
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad)
        assert torch.allclose(sum(parts[name].values()), parameter.grad, atol=1e-14)
    assert uses.take() == {}


def test_an_optimizer_inside_meets_plain_parameters_and_uses_are_seen_again_after_it():
    kinds = set()

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            kinds.update(type(p) for group in self.param_groups for p in group["params"])
            return super().step(closure)

    model = Looped().double()
    optimizer = Recorder(model.parameters(), 0.1)
    with per_use(model) as uses:
        for _ in range(2):
            loss_of(model, batch()).backward()
            parts = uses.take()
            assert len(parts["blocks.0.1.weight"]) == 4
            assert torch.allclose(
                sum(parts["blocks.0.1.weight"].values()), model.blocks[0][1].weight.grad
            )
            optimizer.step()
            optimizer.zero_grad()
    assert kinds == {nn.Parameter}
    assert not _global_optimizer_pre_hooks


@checkpointed
def test_under_bf16_autocast_the_sum_is_the_gradient_to_one_percent(checkpointing):
    torch.manual_seed(0)
    model = Looped(checkpointing=checkpointing)
    x = batch(dtype=torch.float32, rows=64)
    with torch.autocast("cpu", torch.bfloat16):
        with per_use(model) as uses:
            parts = uses.gradients(loss_of(model, x))
        loss_of(model, x).backward()
    for name, parameter in model.named_parameters():
        total = sum(parts[name].values())
        assert (total - parameter.grad).norm() <= 0.01 * parameter.grad.norm()


def test_micro_batches_accumulate_to_the_batch():
    model = Looped().double()
    total = None
    for part in batch(rows=8).chunk(4):
        with per_use(model) as uses:
            total = accumulate(total, uses.gradients(model(part).square().sum()))
    with per_use(model) as uses:
        whole = uses.gradients(model(batch(rows=8)).square().sum())
    for name, uses_of in whole.items():
        assert list(total[name]) == list(uses_of)
        for use, gradient in uses_of.items():
            assert torch.allclose(total[name][use], gradient, atol=1e-12)


def test_sketches_of_micro_batches_accumulate_to_the_sketch_of_the_batch():
    model, sketch = Looped().double(), CountSketch(16, seed=3)
    total = None
    for part in batch(rows=8).chunk(4):
        with per_use(model, keep=sketch) as uses:
            total = accumulate(total, uses.gradients(model(part).square().sum()))
    with per_use(model) as uses:
        whole = uses.gradients(model(batch(rows=8)).square().sum())
    for name, uses_of in whole.items():
        for use, gradient in uses_of.items():
            assert torch.allclose(total[name][use], sketch(name, gradient), atol=1e-10)
        every = sum(total[name].values())  # and of the sum over uses
        assert torch.allclose(every, sketch(name, sum(uses_of.values())), atol=1e-10)


def test_factors_are_the_gradient_and_their_inner_products_are_exact():
    model = Looped().double()
    with per_use(model) as uses:
        dense = uses.gradients(model(batch()).square().sum())
    with per_use(model, factors=True) as uses:
        ghost = uses.gradients(model(batch()).square().sum())
    weights = dense["blocks.0.1.weight"]
    for use, factors in ghost["blocks.0.1.weight"].items():
        assert isinstance(factors, Factors)
        assert torch.allclose(factors.dense(), weights[use], atol=1e-12)
    ours = inner_products({"w": list(ghost["blocks.0.1.weight"].values())}, 3)["w"]
    flat = torch.stack([gradient.flatten() for gradient in weights.values()])
    assert torch.allclose(ours, flat @ flat[-3:].T, rtol=1e-12, atol=1e-14)
    for use, gradient in ghost["blocks.0.1.bias"].items():
        assert torch.allclose(gradient, dense["blocks.0.1.bias"][use], atol=1e-12)


def test_what_is_kept_is_made_as_each_gradient_arrives():
    sketch = CountSketch(size=8)
    model = Looped()
    x = batch(dtype=torch.float32)
    with per_use(model) as uses:
        dense = uses.gradients(loss_of(model, x))
    with per_use(model, keep=sketch) as uses:
        kept = uses.gradients(loss_of(model, x))
    for name, found in dense.items():
        for use, gradient in found.items():
            assert torch.allclose(kept[name][use], sketch(name, gradient), atol=1e-6)


def test_measuring_leaves_no_trace_even_when_it_raises():
    model = nn.Sequential(Looped(), nn.BatchNorm1d(6), nn.Dropout(0.5))
    x = batch(dtype=torch.float32)
    model[0].inp.weight.grad = torch.ones_like(model[0].inp.weight)
    parameters = [p.clone() for p in model.parameters()]
    statistics, stream = model[1].running_mean.clone(), torch.random.get_rng_state()
    dicts = [list(m._parameters) for m in model.modules()]
    for fails in (False, True):
        try:
            with preserved(model), per_use(model) as uses:
                loss = model(x).square().mean()
                if fails:
                    raise RuntimeError("half-way")
                uses.gradients(loss)
        except RuntimeError:
            pass
        assert torch.equal(model[0].inp.weight.grad, torch.ones_like(model[0].inp.weight))
        assert sum(p.grad is not None for p in model.parameters()) == 1
        assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
        assert [list(m._parameters) for m in model.modules()] == dicts
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
        assert torch.equal(statistics, model[1].running_mean)
        assert torch.equal(stream, torch.random.get_rng_state())
    plain = model(x)
    assert type(plain.grad_fn).__name__ != "_AliasBackward"


def test_an_exception_inside_the_forward_does_not_shift_later_calls():
    model = Looped()
    with per_use(model) as uses:
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 7))
        found = uses.gradients(loss_of(model, batch(dtype=torch.float32)))
    assert [use.call for use in found["blocks.0.1.weight"]] == [0, 1, 2, 3]


def test_reentrant_checkpointing_is_refused_by_name():
    model = Looped(checkpointing=True)
    model.reentrant = True
    with per_use(model) as uses:
        loss = loss_of(model, batch(dtype=torch.float32))
        with pytest.raises(UserError, match="re-entrant"):
            uses.gradients(loss)


def test_factors_are_refused_under_checkpointing():
    model = Looped(checkpointing=True)
    with per_use(model, factors=True), pytest.raises(UserError, match="checkpointing"):
        model(batch(dtype=torch.float32))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.zeros(3, requires_grad=True), "one value"),
        (torch.tensor(float("nan"), requires_grad=True), "not a finite number"),
        (torch.tensor(1.0), "does not depend"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(loss, message):
    with per_use(TwoModules()) as uses, pytest.raises(UserError, match=message):
        uses.gradients(loss)


def test_a_compiled_model_is_refused():
    with pytest.raises(UserError, match=r"torch\.compile"), per_use(torch.compile(TwoModules())):
        pass


class Pool(nn.Module):
    """Two layers gather rows of a pool that a third module holds."""

    def __init__(self):
        super().__init__()
        self.pool = nn.ParameterList([nn.Parameter(torch.randn(4, 3))])
        self.layers = nn.ModuleList(Reader(self.pool, rows) for rows in ([0, 1], [1, 2]))

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


class Reader(nn.Module):
    def __init__(self, pool, rows):
        super().__init__()
        self.held, self.rows = [pool], torch.tensor(rows)  # not registered here

    def forward(self, x):
        return x @ self.held[0][0][self.rows].T


def test_readers_of_a_pool_are_users_in_the_pools_coordinates():
    with per_use(model := Pool()) as uses:
        found = uses.gradients(model(batch(dtype=torch.float32)).square().sum())["pool.0"]
    assert [use.module for use in found] == ["layers.0", "layers.1"]
    touched = [g.abs().sum(1) > 0 for g in found.values()]
    assert [t.tolist() for t in touched] == [[True, True, False, False], [False, True, True, False]]


def test_an_unknown_weight_is_refused_by_name():
    with pytest.raises(UserError, match=r"'b\.weight'"), per_use(TwoModules(), ["b.weight"]):
        pass  # b.weight is the second name of a.weight


def test_a_use_the_loss_does_not_need_is_missing_not_zero():
    model = TwoModules()
    with per_use(model) as uses:
        found = uses.gradients(model.a(batch(dtype=torch.float32)).sum())
    assert [str(u) for u in found["a.weight"]] == ["a.weight"]
    assert "b.bias" not in found


def test_displaced_uses_read_what_the_unshared_twin_would_hold():
    shared, unshared = twins(*SHARED[2])
    offset = {Use("b", "weight"): torch.randn(3, 3, dtype=torch.float64)}
    amount = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with displaced(shared, {"a.weight": offset}, amount):
        loss = loss_of(shared, batch())
        (slope,) = torch.autograd.grad(loss, amount)
    with torch.no_grad():
        unshared.b.weight += 0.3 * offset[Use("b", "weight")]
    twin = loss_of(unshared, batch())
    twin.backward()
    assert torch.allclose(loss, twin, atol=1e-14)
    assert torch.allclose(slope, (unshared.b.weight.grad * offset[Use("b", "weight")]).sum())


class Own(nn.Parameter):
    """A parameter class of somebody else's."""

    def double_sum(self):
        return 2 * self.sum()


def test_parameters_keep_their_class_and_what_it_can_do():
    model = nn.Linear(3, 2)
    model.weight = Own(model.weight.detach().clone())
    with per_use(model) as uses:
        assert isinstance(model.weight, Own) and isinstance(model.weight, nn.Parameter)
        assert model.weight.shape == (2, 3) and model.weight.requires_grad
        found = uses.gradients(model(torch.ones(1, 3)).sum() + model.weight.double_sum())
    assert type(model.weight) is Own
    assert torch.equal(sum(found["weight"].values()), torch.full((2, 3), 3.0))


def test_attention_and_lists_of_weights_are_read_through_their_aliases():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def loss():
        out, _ = attention(x, x, x)
        stacked = torch.cat([attention.in_proj_weight, attention.out_proj.weight])
        return out.square().sum() + stacked.square().sum()

    exact = torch.autograd.grad(loss(), list(attention.parameters()))
    with per_use(attention) as uses:
        found = uses.gradients(loss())
    for (name, _), gradient in zip(attention.named_parameters(), exact, strict=True):
        assert torch.allclose(sum(found[name].values()), gradient, atol=1e-12)


def test_random_streams_are_untouched_by_the_aliases():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    x = batch(dtype=torch.float32)
    torch.manual_seed(1)
    plain = model(x)
    state = torch.random.get_rng_state(), random.getstate()
    torch.manual_seed(1)
    with per_use(model):
        aliased = model(x)
    assert torch.equal(plain, aliased)
    assert torch.equal(state[0], torch.random.get_rng_state())
    assert state[1] == random.getstate()
