import copy
import math
import random

import numpy as np
import pytest
import torch
from models import Cropped, Looped, Recurrent, Sliced, TiedHead, TwoModules, batch
from torch import nn

from weightshare.audit import audit, similar
from weightshare.audit.layers import label_uses, layer_name
from weightshare.errors import UserError
from weightshare.sharing import Use, tie


def loss(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def batches(n=6, rows=8):
    return [batch(seed, rows=rows, dtype=torch.float32) for seed in range(n)]


class Rivals(nn.Module):
    """Four places of one vector; two want it to go one way, two the other."""

    def __init__(self, wishes=(1.0, 1.0, -1.0, -1.0)):
        super().__init__()
        self.places = nn.ModuleList(nn.Linear(8, 1, bias=False) for _ in wishes)
        self.wishes = wishes
        for place in self.places:
            nn.init.zeros_(place.weight)
        tie(self, [[f"places.{i}.weight" for i in range(len(wishes))]])

    def forward(self, x):
        direction = torch.linspace(0.5, 1.5, 8)
        wanted = x @ direction[:, None]
        return sum(
            (place(x) - wish * wanted).square().mean()
            for place, wish in zip(self.places, self.wishes, strict=True)
        )


def rival_batches(n=8):
    return [torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(n)]


def test_rivals_are_found_with_their_camps():
    found = audit(Rivals(), rival_batches(), lambda m, x: m(x))
    (finding,) = found.findings
    assert finding.layer.name == "places.{0,1,2,3}"
    assert finding.split.advised
    assert finding.split.groups == (("places.0", "places.1"), ("places.2", "places.3"))
    assert finding.agreement == pytest.approx(-1 / 3, abs=0.1)  # 2 pairs at 1, 4 at -1
    assert finding.low < finding.agreement < finding.high
    assert set(finding.opposed) & {"places.0", "places.1"}
    assert finding.conflict_rate == pytest.approx(4 / 6, abs=0.05)
    assert (finding.unique, finding.saved) == (8, 24)
    best = found.suggestions[0]
    assert best.beyond_chance and best.predicted > 0
    assert best.unsharing.groups == (("places.0", "places.1"), ("places.2", "places.3"))


def test_agreeing_uses_are_left_shared():
    model = Rivals(wishes=(1.0, 1.0, 1.0))
    found = audit(model, rival_batches(), lambda m, x: m(x))
    assert not found.findings[0].split.advised
    assert found.suggestions[0].unsharing.kind == "nothing"
    assert found.suggestions[0].reason


def test_the_table_has_a_row_per_shared_layer():
    (row,) = audit(Looped(), batches(), loss, suggestions=False).rows()
    assert row["shared weight"] == "blocks.0 (4 calls)"
    assert row["uses"] == 4 and row["saved"] == 3 * row["unique"]
    assert "to" in row["interval"] and row["most opposed"].count("blocks.0#") == 2


def test_per_tensor_looks_at_each():
    found = audit(Looped(), batches(), loss, per="tensor", suggestions=False)
    assert sorted(f.layer.name for f in found.findings) == [
        "blocks.0.0.bias",
        "blocks.0.0.weight",
        "blocks.0.1.bias",
        "blocks.0.1.weight",
    ]


@pytest.mark.parametrize("kind", [Looped, Recurrent, TwoModules, TiedHead, Cropped, Sliced])
def test_every_kind_of_sharing_is_audited(kind):
    torch.manual_seed(0)
    found = audit(kind(), batches(), lambda m, x: m(x).square().mean(), suggestions=False)
    assert found.findings and all(len(f.layer.users) > 1 for f in found.findings)
    assert all(not f.never for f in found.findings)


def test_sketches_and_whole_gradients_agree():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 128), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128))
    tie(model, [["1.weight", "3.weight"]])

    def objective(m, x):
        return (m(x) - x.sum(1, keepdim=True)).square().mean()

    exact = audit(model, batches(), objective, sketch=None, suggestions=False).findings[0]
    sketched = audit(model, batches(), objective, sketch=2048, suggestions=False).findings[0]
    assert sketched.agreement == pytest.approx(exact.agreement, abs=4 / math.sqrt(2048))


@pytest.mark.parametrize("fails", [False, True])
def test_an_audit_leaves_no_trace(fails):
    model = nn.Sequential(Looped(), nn.BatchNorm1d(6), nn.Dropout(0.3))
    model[2].eval()
    optimizer = torch.optim.Adam(model.parameters())
    loss(model, batches()[0]).backward()
    optimizer.step()
    model[0].inp.weight.grad = None
    before = copy.deepcopy(model.state_dict())
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    streams = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    calls = []

    def counting(m, x):
        calls.append(1)
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        if fails and len(calls) == 9:
            raise KeyError("half-way")
        return loss(m, x)

    if fails:
        with pytest.raises(KeyError):
            audit(model, batches(), counting)
    else:
        audit(model, batches(), counting)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in model.named_parameters():
        old = grads[name]
        assert (parameter.grad is None) == (old is None)
        assert old is None or torch.equal(parameter.grad, old)
    assert str(optimizer.state_dict()) == str(state)
    assert torch.equal(streams[0], torch.random.get_rng_state())
    assert streams[1] == random.getstate()
    assert (streams[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert model.training and not model[2].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_backward_pass_per_batch():
    passes = []

    def counted(model, x):
        value = loss(model, x)
        value.register_hook(lambda _: passes.append(1))
        return value

    audit(Looped(), batches(5), counted, suggestions=False)
    assert len(passes) == 5


def test_nothing_shared_says_what_could_be():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight + 0.01 * torch.randn(3, 3))
    found = audit(model, batches(2), loss)
    assert found.findings == [] and found.suggestions == []
    assert (found.similar[0].first, found.similar[0].second) == ("0.weight", "1.weight")
    assert found.similar[0].cosine > 0.95 and found.similar[0].saved == 9


def test_similar_compares_equal_shapes_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    assert similar(model) == []


def test_a_user_that_never_gets_a_gradient_is_named():
    class HalfUsed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.idle = (nn.Linear(3, 3) for _ in range(3))
            tie(self, [["a.weight", "b.weight", "idle.weight"]])

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    found = audit(HalfUsed(), batches(), loss)
    assert found.findings[0].never == ("idle",)
    assert "idle" in found.findings[0].layer.users
    tried = [s for s in found.suggestions if s.unsharing.kind != "nothing"]
    assert tried
    for suggestion in tried:
        assert all("idle" not in g for g in suggestion.unsharing.groups)


def test_a_shared_weight_that_the_loss_never_touches_has_no_agreement():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = (nn.Linear(3, 3) for _ in range(3))
            tie(self, [["a.weight", "b.weight"]])

        def forward(self, x):
            return self.body(x)

    found = audit(Idle(), batches(), loss)
    (finding,) = found.findings
    assert finding.never == ("a", "b") and math.isnan(finding.agreement)
    assert finding.opposed is None and not finding.split.advised
    assert found.rows()[0]["agreement"] is None
    assert [s.unsharing.kind for s in found.suggestions] == ["nothing"]


@pytest.mark.parametrize(
    ("data", "objective", "message"),
    [
        ([], loss, "at least two"),
        ([torch.randn(4, 3)], loss, "at least two"),
        ([torch.randn(4, 7)] * 3, loss, "does not fit the model"),
        ([{"x": 1}] * 3, loss, "does not fit the model"),
        ([torch.randn(4, 3)] * 3, lambda m, x: m(x).sum() * math.nan, "not a finite number"),
        ([torch.randn(4, 3)] * 3, lambda m, x: m(x), "one value"),
    ],
)
def test_bad_input_is_one_sentence(data, objective, message):
    with pytest.raises(UserError, match=message):
        audit(Looped(), data, objective)


@pytest.mark.parametrize(
    "setting", [{"per": "block"}, {"metric": "sgd"}, {"groups": 1}, {"rank": 0}, {"draws": 0}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=r"choose one of|at least"):
        audit(Looped(), batches(), loss, **setting)


@pytest.mark.parametrize("kind", [Looped, TwoModules])
def test_agreement_is_measured_under_checkpointing_but_not_what_unsharing_gains(kind):
    torch.manual_seed(0)
    model = kind()
    plain = audit(model, batches(), loss, suggestions=False)
    model.checkpointing = True
    found = audit(model, batches(), loss, suggestions=False)
    assert found.rows() == plain.rows()
    for trial in ([], batches(2)):
        with pytest.raises(UserError, match="checkpointing"):
            audit(model, batches(), loss, trial=trial)


def test_a_loop_hidden_by_reentrant_checkpointing_is_refused():
    model = Looped(checkpointing=True)
    model.reentrant = True
    with pytest.raises(UserError, match="re-entrant"):
        audit(model, batches(), loss)


def test_a_stable_grouping_stops_early():
    found = audit(Rivals(), rival_batches(20), lambda m, x: m(x), patience=3, suggestions=False)
    assert 4 <= found.batches <= 6
    assert found.findings[0].split.groups[1] == ("places.2", "places.3")


def test_two_audits_with_one_seed_are_the_same():
    torch.manual_seed(0)
    a = Looped()
    first, second = (audit(a, batches(), loss, seed=1) for _ in range(2))
    assert first.rows() == second.rows()
    assert [s.row() for s in first.suggestions] == [s.row() for s in second.suggestions]


def test_users_are_named_by_what_differs():
    block = [Use(f"model.layers.{i}.mlp.up", "weight") for i in (5, 6)]
    assert list(label_uses(block, {}).values()) == ["model.layers.5", "model.layers.6"]
    tied = [Use("model.embed", "weight"), Use("lm_head", "weight")]
    assert list(label_uses(tied, {}).values()) == ["model.embed", "lm_head"]
    loop = [Use("net.block.lin", "weight", call) for call in range(2)]
    calls = {"net": 1, "net.block": 2, "net.block.lin": 2}
    assert list(label_uses(loop, calls).values()) == ["net.block#0", "net.block#1"]
    assert layer_name(("model.layers.5", "model.layers.6")) == "model.layers.{5,6}"
    assert layer_name(("embed", "head")) == "embed + head"
