"""Local training: the loop and the stack do the same, and forget nothing they need."""

import numpy as np
import pytest
import torch

from weightshare.errors import UserError
from weightshare.federated import FederateConfig, LocalConfig, simulate
from weightshare.federated.local import (
    Classifier,
    LoopTraining,
    accuracies,
    batches_of,
    confusion,
    set_weights,
    steps_of,
    weights_of,
)
from weightshare.federated.models import perceptron
from weightshare.federated.stacked import StackedTraining
from weightshare.training import device_of

CONFIG = LocalConfig(epochs=2, batch_size=8, learning_rate=0.1, seed=5)


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(size, 6, generator=draw),
            torch.randint(0, 3, (size,), generator=draw),
        )
        for name, size in (("a", 40), ("b", 5), ("c", 23))
    }


def test_the_stack_takes_the_loops_steps(data):
    task = Classifier(perceptron(6, 7, 3, seed=1))
    start = weights_of(task)
    starts = {name: start + np.float32(0.01 * i) for i, name in enumerate(data)}
    for number in (1, 4):
        one = LoopTraining(task, data, CONFIG).train(starts, number)
        two = StackedTraining(task, data, CONFIG).train(starts, number)
        for name in data:
            np.testing.assert_allclose(one[name], two[name], atol=2e-6)
            assert np.abs(one[name] - starts[name]).max() > 1e-3


def test_one_step_is_plain_gradient_descent_by_hand(data):
    task = Classifier(perceptron(6, 7, 3, seed=1))
    start = weights_of(task)
    config = LocalConfig(epochs=1, batch_size=5, learning_rate=0.1, decay=0.5)
    inputs, labels = data["b"]
    number = 3
    assert steps_of(5, config) == 1
    batch_inputs, batch_labels = batches_of(data["b"], "b", number, config)[0]
    set_weights(task, start)
    loss = torch.nn.functional.cross_entropy(task.model(batch_inputs), batch_labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, task.parameters())])
    expected = start - 0.1 * 0.5**2 * gradient.numpy()
    found = LoopTraining(task, data, config).train({"b": start}, number)["b"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert sorted(batch_labels.tolist()) == sorted(labels.tolist()) and len(inputs) == 5


def test_a_round_depends_on_nothing_but_its_number(data):
    task = Classifier(perceptron(6, 7, 3, seed=1))
    start = {"a": weights_of(task)}
    training = StackedTraining(task, data, CONFIG)
    later = training.train(start, 2)["a"]
    fresh = StackedTraining(task, data, CONFIG)
    assert fresh.train(start, 2)["a"].tobytes() == later.tobytes()
    assert fresh.train(start, 3)["a"].tobytes() != later.tobytes()


def test_random_states_stay_as_they_are(data):
    task = Classifier(perceptron(6, 7, 3, seed=1))
    torch.manual_seed(9)
    before = torch.get_rng_state()
    perceptron(6, 7, 3, seed=2)
    LoopTraining(task, data, CONFIG).train({"a": weights_of(task)}, 1)
    assert (torch.get_rng_state() == before).all()


def test_a_thousand_participants_fit_in_one_process():
    draw = torch.Generator().manual_seed(0)
    data = {
        f"{i:04d}": (torch.randn(4, 6, generator=draw), torch.randint(0, 3, (4,), generator=draw))
        for i in range(1000)
    }
    task = Classifier(perceptron(6, 7, 3, seed=1))
    start = weights_of(task)
    trained = StackedTraining(task, data, LocalConfig(1, 4)).train(dict.fromkeys(data, start), 1)
    assert len({weights.tobytes() for weights in trained.values()}) == 1000


def test_accuracy_and_confusion_agree():
    model = perceptron(6, 7, 10, seed=1)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 6, generator=draw)
    labels = torch.randint(0, 10, (300,), generator=draw)
    vector = weights_of(model)
    found = accuracies(model, {"a": vector}, (inputs, labels))["a"]
    table = confusion(model, vector, (inputs, labels), 10)
    counts = torch.bincount(labels, minlength=10).numpy()
    assert found["accuracy"] == pytest.approx((np.diag(table) * counts).sum() / 300, abs=1e-6)
    assert found["success"] == pytest.approx(table[1, 7]) and found["target"] == pytest.approx(
        table[1, 1]
    )


def test_models_without_float32_weights_are_refused():
    with pytest.raises(UserError, match="float32"):
        weights_of(torch.nn.Linear(2, 2).double())
    with pytest.raises(UserError, match="float32"):
        weights_of(torch.nn.ReLU())


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        simulate(FederateConfig("digits", device="cuda"))
    for name in ("gpu", "cpu:x"):
        with pytest.raises(UserError, match="use auto"):
            device_of(name)
    assert device_of("auto") == torch.device("cpu")
