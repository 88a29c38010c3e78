"""Predicted gains against gains that are known in closed form."""

import copy
import itertools
import math

import pytest
import torch
from models import Recurrent
from quadratics import Quadratic, data, loss, targets
from torch import nn

from weightshare.audit import (
    Layer,
    ProbeConfig,
    Suggestion,
    Unsharing,
    apply,
    audit,
    predict,
    probe,
    spend,
)
from weightshare.audit.figures import (
    agreement_bars,
    agreement_data,
    agreement_map,
    agreements_data,
    promise_scatter,
    trials_data,
)
from weightshare.audit.honesty import random_unsharings, summarise
from weightshare.audit.unsharing import KINDS
from weightshare.errors import UserError


def converged(model, batches, steps=300, rate=0.1):
    """Loss after plain gradient descent on everything."""
    for _ in range(steps):
        value = sum(model(b) for b in batches) / len(batches)
        gradients = torch.autograd.grad(value, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    with torch.no_grad():
        return float(sum(model(b) for b in batches) / len(batches))


@pytest.mark.parametrize("curvature", [0.5, 4.0])
def test_on_a_quadratic_predicted_and_realised_gain_agree_to_one_percent(curvature):
    model = Quadratic(targets(0, 1, 0, 1), curvature)
    found = audit(model, data(), loss, metric="plain", reach=math.inf)
    rate = 0.2 / curvature
    shared = converged(copy.deepcopy(model), data(), rate=rate)
    (best,) = [s for s in found.suggestions if s.unsharing.kind == "unshare"]
    assert best.unsharing.groups == (("places.0", "places.2"), ("places.1", "places.3"))
    realised = shared - converged(apply(copy.deepcopy(model), best), data(), rate=rate)
    assert best.predicted == pytest.approx(realised, rel=0.01)


def test_away_from_the_shared_optimum_the_common_part_is_not_counted():
    model = Quadratic(targets(0, 1), 1.0, start=torch.zeros(5, 6, dtype=torch.float64))
    (best,) = [
        s
        for s in audit(model, data(), loss, metric="plain", reach=math.inf).suggestions
        if s.unsharing.kind == "unshare"
    ]
    shared = converged(copy.deepcopy(model), data())
    realised = shared - converged(apply(copy.deepcopy(model), best), data())
    assert best.predicted == pytest.approx(realised, rel=0.01)


def test_a_prediction_is_believed_only_near_the_weights():
    offer = Unsharing("unshare", Layer("l", ("a", "b"), {}), (("a",), ("b",)))
    straight = Suggestion(offer, 1, slope=-1.0, curvature=1e-6, longest=0.1, endless=0.1)
    bent = Suggestion(offer, 1, slope=-1.0, curvature=100.0, longest=0.1, endless=0.1)
    downwards = Suggestion(offer, 1, slope=-1.0, curvature=-1.0, longest=0.1, endless=0.1)
    assert straight.predicted == pytest.approx(0.1)
    assert bent.predicted == pytest.approx(1 / 200)
    assert downwards.predicted == pytest.approx(0.105)
    model = Quadratic(targets(0, 1, size=3.0), 1.0)
    near, far = (
        next(
            s.predicted
            for s in audit(model, data(), loss, metric="plain", reach=reach).suggestions
            if s.unsharing.kind == "unshare"
        )
        for reach in (0.01, math.inf)
    )
    assert 0 < near < far


def test_a_low_rank_disagreement_is_settled_by_a_low_rank_delta():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(5, 6, generator=g, dtype=torch.float64)
    move = torch.outer(torch.randn(5, generator=g).double(), torch.randn(6, generator=g).double())
    model = Quadratic([base, base + 0.1 * move], 1.0)
    found = {
        s.unsharing.kind: s
        for s in audit(model, data(noise=1e-5), loss, rank=1, metric="plain").suggestions
    }
    assert found["low_rank"].predicted == pytest.approx(found["unshare"].predicted, rel=1e-3)
    assert found["low_rank"].added == 11 < found["unshare"].added == 30
    assert found["low_rank"].gain_per_parameter > found["unshare"].gain_per_parameter
    assert found["scale"].predicted < 0.9 * found["unshare"].predicted


def test_a_disagreement_about_scale_is_settled_by_scales():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(5, 6, generator=g, dtype=torch.float64)
    rows = torch.tensor([0.9, 1.1, 1.0, 1.2, 0.8], dtype=torch.float64)[:, None]
    model = Quadratic([base, base * rows], 1.0)
    found = {
        s.unsharing.kind: s
        for s in audit(model, data(noise=1e-5), loss, metric="plain").suggestions
    }
    assert found["scale"].predicted > 0.98 * found["unshare"].predicted
    assert found["scale"].added == 5
    ranked = audit(model, data(noise=1e-5), loss, metric="plain").suggestions
    assert ranked[0].unsharing.kind == "scale"


def test_noise_promises_nothing():
    """Where users differ by noise only, the held-out half of the batches sees no gain."""
    model = Quadratic(targets(0, 0), 1.0)
    layer = audit(model, data(), loss, metric="plain").findings[0].layer

    def noisy(m, batch):
        return sum(
            0.5 * (p(torch.eye(6).to(n)).T - t - n).square().sum()
            for p, t, n in zip(m.places, m.targets, batch, strict=True)
        )

    gains = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        batches = [torch.randn(2, 5, 6, generator=g, dtype=torch.float64) for _ in range(8)]
        (s,) = predict(
            model, batches, noisy, [Unsharing("unshare", layer, (("places.0",), ("places.1",)))]
        )
        gains.append(s.slope)
    assert 4 <= sum(slope < 0 for slope in gains) <= 16
    assert abs(sum(gains) / 20) < 3 * torch.tensor(gains).std() / 20**0.5


def test_the_probe_keeps_what_was_promised_on_a_quadratic():
    class Two(nn.Module):
        """Two shared layers, one in conflict and one not."""

        def __init__(self):
            super().__init__()
            self.fight = Quadratic([t.float() for t in targets(0, 1, size=0.5)], 1.0)
            self.agree = Quadratic([t.float() for t in targets(0, 0)], 1.0)

        def forward(self, batch):
            return self.fight(batch) + self.agree(batch)

    model = Two()
    batches = [b.float() for b in data()]
    found = audit(model, batches, loss)
    assert found.findings[0].layer.name.startswith("fight")
    result = probe(
        model, batches, batches, loss, found, ProbeConfig(2, 4, steps=20, learning_rate=0.05)
    )
    assert [t.origin for t in result.trials].count("suggested") == 2
    assert result.correlation > 0.6
    assert result.low <= result.correlation <= result.high
    assert result.mean_gain("suggested") > 0
    for row in (t.row() for t in result.trials):
        assert {"predicted gain", "realised gain", "origin"} <= row.keys()
    assert promise_scatter(**trials_data(result)).axes


@pytest.mark.parametrize(
    ("train", "heldout", "config", "message"),
    [
        ([], [0], ProbeConfig(), "0 batches to train on"),
        ([0], [], ProbeConfig(), "0 held out"),
        ([0], [0], ProbeConfig(suggested=-1), "-1 suggested"),
        ([0], [0], ProbeConfig(steps=0), "0 steps"),
    ],
)
def test_a_probe_that_cannot_be_carried_out_is_refused(train, heldout, config, message):
    with pytest.raises(UserError, match=message):
        probe(nn.Linear(1, 1), train, heldout, loss, None, config)


def test_predicting_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(Recurrent(), nn.BatchNorm1d(4), nn.Dropout(0.3))
    batches = [torch.randn(5, 3) for _ in range(4)]

    def objective(model, x):
        return model(x).square().mean()

    (found,) = audit(model, batches, objective, suggestions=False).findings
    before, stream = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    groups = (found.layer.users[:1], found.layer.users[1:])
    (promise,) = predict(model, batches, objective, [Unsharing("unshare", found.layer, groups)])
    assert promise.added == promise.unsharing.added(model) > 0
    assert torch.equal(stream, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_budget_is_spent_like_the_best_of_all_combinations():
    """Against all choices of at most one suggestion per layer."""
    layers = [Layer(f"l{i}", ("a", "b"), {}) for i in range(3)]
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        offers = [
            Suggestion(
                Unsharing(kind, layer, (("a",), ("b",))),
                added=int(torch.randint(1, 60, (1,), generator=g)),
                slope=-float(torch.rand(1, generator=g)),
                curvature=1.0,
            )
            for layer in layers
            for kind in KINDS
        ]
        chosen = spend(offers, 70)
        assert sum(s.added for s in chosen) <= 70
        assert len({s.unsharing.layer for s in chosen}) == len(chosen)
        options = [[None, *(s for s in offers if s.unsharing.layer == x)] for x in layers]
        best = max(
            sum(s.predicted for s in pick if s)
            for pick in itertools.product(*options)
            if sum(s.added for s in pick if s) <= 70
        )
        assert sum(s.predicted for s in chosen) == pytest.approx(best)
    with pytest.raises(UserError, match="at least 1"):
        spend([], 0)


def test_random_unsharings_are_distinct_and_new():
    model = Quadratic(targets(0, 1, 2))
    layer = audit(model, data(), loss, suggestions=False).findings[0].layer
    drawn = random_unsharings([layer], 50, 2, seed=0)
    assert len(drawn) == len(set(drawn)) == 9  # three splits of three users, three kinds
    assert random_unsharings([layer], 50, 2, seed=1, taken=drawn) == []


def test_too_few_trials_have_no_interval():
    assert summarise([]).correlation != summarise([]).correlation  # NaN


def test_figures_take_plain_data():
    found = audit(Quadratic(targets(0, 1, 0)), data(), loss)
    data_of = agreement_data(found.findings[0])
    assert data_of["users"] == ["0", "1", "2"]
    assert agreement_map(**data_of).axes
    assert agreement_bars(**agreements_data(found)).axes
