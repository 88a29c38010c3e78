"""Nobody is paid before the examination, and only who passes afterwards."""

from math import log

import numpy as np
import pytest
import torch
from torch import nn

from weightshare.errors import UserError
from weightshare.federated import ReputationConfig
from weightshare.federated.config import FederateConfig
from weightshare.federated.examination import examine, worst_class
from weightshare.federated.simulation import simulate


def test_the_common_model_is_the_weighted_mean_of_those_that_passed():
    models = {n: np.float32([i, 2 * i]) for i, n in enumerate("abcd", 1)}
    reputation = {"a": 0.4, "b": 0.2, "c": 0.3, "d": 0.1}
    found = examine(models, reputation, 0.2, lambda model: model[0] != 3)
    assert found.failed == ("c",) and found.entitled == ("a", "b")
    assert found.reputation == pytest.approx({"a": 4 / 7, "b": 2 / 7, "c": 0, "d": 1 / 7})
    np.testing.assert_allclose(found.model, [4 / 3, 8 / 3], rtol=1e-6)
    nobody = examine(models, reputation, 0.2, lambda model: False)
    assert nobody.model is None and nobody.reputation == reputation and not nobody.entitled


def test_the_worst_class_is_measured_in_losses_of_a_guess():
    model = nn.Linear(1, 3)
    zero = np.zeros(6, np.float32)
    inputs, labels = torch.tensor([[0.0], [0], [0], [1], [0]]), torch.tensor([0, 0, 1, 1, 2])
    assert worst_class(model, zero, (inputs, labels)) == pytest.approx(1)
    sure = np.float32([0, 0, 0, 4, 0, -9])  # of class 0; class 2 has one sample only
    expected = log(np.exp(4) + 1 + np.exp(-9)) / log(3)
    assert worst_class(model, sure, (inputs, labels)) == pytest.approx(expected, rel=1e-5)
    half = np.float32([0, 9, 0, 4, 0, -9])  # the second sample of class 1 is recognised
    expected = log(np.exp(4) + 1 + np.exp(-9)) - 4  # so class 0 is the worst
    assert worst_class(model, half, (inputs, labels)) == pytest.approx(expected / log(3), rel=1e-4)


RULES = ReputationConfig(keep_own=False, probation=2, norm=9.0)


def bad(model):
    return bool(model.sum() < -5)


def updates(name, number):
    draw = np.random.default_rng([number, *name.encode()])
    step = 0.1 * (1 + draw.standard_normal(400))
    return (-step if name == "p3" else step).astype(np.float32)


def test_nobody_is_paid_before_and_who_fails_is_not_paid_after(federation):
    here = federation(4, RULES, updates, passes=lambda model: not bad(model - here.initial))
    here.run(2)
    strategy = here.strategy
    judged = strategy.log.rows("judged")
    assert len(judged) == 8 and not any(row["entries"] for row in judged)
    assert [row["failed"] for row in strategy.log.rows("examined")] == [["p3"]]
    own = {n: here.initial + updates(n, 1) + updates(n, 2) for n in here.names}
    np.testing.assert_allclose(strategy.model_of("p3"), own["p3"], atol=1e-6)
    common = strategy.model_of("p0")
    shares = strategy.standing.reputation
    assert shares["p3"] == 0
    mean = sum(shares[n] * own[n] for n in ("p0", "p1", "p2"))
    np.testing.assert_allclose(common, mean, atol=1e-5)
    for name in ("p1", "p2"):
        assert strategy.model_of(name).tobytes() == common.tobytes()
    here.run(2)
    after = [row for row in strategy.log.rows("judged") if row["round"] == 3]
    assert {row["name"]: bool(row["entries"]) for row in after} == {
        "p0": True, "p1": True, "p2": True, "p3": False
    }  # fmt: skip
    for name in here.names:  # both sides mean the same model
        assert here.cohort.memories[name].model is not None
    assert not strategy.conduct.resyncs


def test_a_checkpoint_within_the_probation_goes_on_to_the_same_bytes(federation, tmp_path):
    def made():
        first = federation(4, RULES, updates, passes=lambda model: not bad(model))
        return first

    whole, broken, again = made(), made(), made()
    whole.run(4)
    broken.run(1)
    broken.strategy.save(tmp_path)
    assert again.strategy.restore(tmp_path) == 1
    again.run(3)
    assert again.outcome() == whole.outcome()


def test_a_probation_without_an_examiner_is_refused():
    from weightshare.federated.strategy import ReputationStrategy

    with pytest.raises(UserError, match="examination"):
        ReputationStrategy(np.zeros(3, np.float32), RULES)


@pytest.mark.parametrize("adversaries", [2, 7])
def test_label_flippers_of_a_majority_too_end_below_training_alone(adversaries):
    config = FederateConfig(
        "digits", participants=6, adversaries=adversaries, attack="label_flip", rounds=13,
        samples=800, root_samples=50, strategy="examined", hidden=32,
    )  # fmt: skip
    here = simulate(config, as_bytes=False)
    alone = here.alone()
    here.run()
    found = {name: row["accuracy"] for name, row in here.accuracies().items()}
    mean = np.mean([alone[name] for name in here.honest])
    assert sorted(here.reputation.standing.expelled) == here.adversaries
    assert max(found[name] for name in here.adversaries) <= mean
    assert np.mean([found[name] for name in here.honest]) >= mean + 0.03
