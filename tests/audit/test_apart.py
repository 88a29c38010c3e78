"""A trial that trains every use apart, against twins that share nothing and against quadratics."""

import copy

import pytest
import torch
from models import Looped, TwoModules
from quadratics import Quadratic, data, loss, targets

from weightshare.audit import Apart, Unsharing, apply, audit, suggest_apart
from weightshare.errors import UserError
from weightshare.training import GradientUpdate, Loop, LoopConfig, Task, Term


def layers_of(model, batches, loss=loss, **options):
    found = audit(model, batches, loss, suggestions=False, draws=5, **options)
    return found.findings, [f.layer for f in found.findings]


def test_on_a_quadratic_the_credits_add_up_to_what_training_apart_saved():
    model = Quadratic(targets(0, 1, 2), 2.0)
    _, layers = layers_of(model, data())
    apart = Apart(model, data(20), data()[:1] * 4, loss, layers, learning_rate=0.05)
    (layer,) = layers
    users = layer.users
    whole = Unsharing("unshare", layer, tuple((user,) for user in users))
    (suggestion,) = apart.predict([whole])
    saved = apart.loss_at(0.0) - apart.loss_at(1.0)
    assert saved > 0
    assert suggestion.predicted == pytest.approx(saved, rel=1e-9)
    two = Unsharing("unshare", layer, (users[:1], users[1:]))
    (part,) = apart.predict([two])
    assert 0 < part.predicted < suggestion.predicted


def test_the_groups_are_those_that_want_the_same():
    model = Quadratic(targets(0, 1, 0, 1), 2.0)
    findings, layers = layers_of(model, data())
    apart = Apart(model, data(20), data(), loss, layers, learning_rate=0.05)
    assert apart.groups(layers)[layers[0]] == (("places.0", "places.2"), ("places.1", "places.3"))
    best = suggest_apart(apart, findings, rank=2)[0]
    assert best.beyond_chance
    assert best.predicted > 0
    before = model(data()[0])
    assert torch.equal(apply(model, best)(data()[0]), before)


def test_agreeing_uses_have_no_credit():
    model = Quadratic(targets(0, 0), 2.0)
    findings, layers = layers_of(model, data())
    apart = Apart(model, data(20), data(), loss, layers, learning_rate=0.05)
    assert not any(s.beyond_chance and s.predicted > 1e-9 for s in suggest_apart(apart, findings))


class _Mean(Task):
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch):
        return {"loss": Term(self.loss(self.model, batch), 1.0)}


@pytest.mark.parametrize("kind", [Looped, TwoModules])
def test_training_apart_is_training_a_twin_that_shares_nothing(kind):
    torch.manual_seed(0)
    model, twin = kind().double(), kind(unshared=True).double()
    own, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    for name, parameter in theirs.items():
        source = name if name in own else _shared_name(name)
        parameter.data.copy_(own[source])
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 3, generator=generator).double() for _ in range(8)]

    def square(model, x):
        return model(x).square().mean()

    before = copy.deepcopy(model.state_dict())
    findings, layers = layers_of(model, batches, square)
    apart = Apart(model, batches, batches, square, layers, learning_rate=0.01)
    settings = LoopConfig(steps=8, learning_rate=0.01, weight_decay=0.0, warmup_fraction=0.1)
    update = GradientUpdate.from_config(_Mean(twin, square), settings)
    Loop(update, batches, settings, progress=False).fit()
    with torch.no_grad():
        expected = float(sum(square(twin, b) for b in batches[1::2]) / len(batches[1::2]))
    assert apart.loss_at(1.0) == pytest.approx(expected, rel=1e-9)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert suggest_apart(apart, findings)


def _shared_name(name):
    if name.startswith("blocks."):
        return ".".join(["blocks", "0", *name.split(".")[2:]])
    return name.replace("b.", "a.")


def test_a_trial_needs_steps_and_judges():
    model = Quadratic(targets(0, 1), 2.0)
    _, layers = layers_of(model, data())
    with pytest.raises(UserError, match="four judges"):
        Apart(model, data(), data(3), loss, layers)
    with pytest.raises(UserError, match="at least one step"):
        Apart(model, [], data(), loss, layers)
