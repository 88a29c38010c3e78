"""The other strategies against their definitions."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message
from scipy.optimize import minimize

from weightshare.federated import wire
from weightshare.federated.federation import run_rounds
from weightshare.federated.grid import InProcessGrid
from weightshare.federated.participant import Cohort
from weightshare.federated.root import RootAlong
from weightshare.federated.rules import (
    FLTrust,
    FoolsGold,
    GeometricMedian,
    SingleQFedAvg,
    fltrust,
    foolsgold_weights,
    geometric_median,
)


def rows(count=7, size=5, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32))


def test_no_point_is_nearer_to_all_than_the_geometric_median():
    points = np.stack(rows()).astype(np.float64)
    found = geometric_median(rows())
    best = minimize(lambda z: np.linalg.norm(points - z, axis=1).sum(), points.mean(0), tol=1e-10)
    assert np.linalg.norm(points - found, axis=1).sum() == pytest.approx(best.fun, rel=1e-6)
    mostly = [rows()[0]] * 5 + rows(3, seed=1)
    np.testing.assert_allclose(geometric_median(mostly), rows()[0], atol=1e-3)


def test_trust_follows_its_equation():
    updates, root = rows(6, 40), rows(1, 40, seed=9)[0]
    cosines = [u @ root / np.linalg.norm(u) / np.linalg.norm(root) for u in updates]
    trust = np.maximum(cosines, 0)
    expected = sum(
        t * u * np.linalg.norm(root) / np.linalg.norm(u)
        for t, u in zip(trust, updates, strict=True)
    )
    np.testing.assert_allclose(fltrust(updates, root), expected / trust.sum(), atol=1e-5)
    assert not fltrust([-root, -2 * root], root).any()
    assert np.isfinite(fltrust([np.zeros(40, np.float32), root], root)).all()


def test_foolsgold_takes_the_weight_of_those_who_act_alike():
    cosines = np.array([[1, 0.1, 0, 0.2], [0.1, 1, 0.05, 0], [0, 0.05, 1, 0.99], [0.2, 0, 0.99, 1]])
    weights = foolsgold_weights(cosines)
    assert weights[0] > 0.9 and weights[1] > 0.9 and weights[2] == 0 and weights[3] == 0
    # By hand for two: v = c, nothing is pardoned, alpha = 1 - c, scaled to 1, logit clipped to 1.
    assert foolsgold_weights(np.array([[1, 0.3], [0.3, 1]])).tolist() == [1, 1]
    assert foolsgold_weights(np.ones((3, 3))).tolist() == [0, 0, 0]


class Constant:
    def __init__(self, updates):
        self.updates = updates

    def train(self, starts, number):
        return {name: start + self.updates[name] for name, start in starts.items()}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (lambda n: GeometricMedian(n), lambda u, root: geometric_median(list(u))),
        (
            lambda n: FLTrust(lambda weights, number: ROOT, n),
            lambda u, root: fltrust(list(u), ROOT),
        ),
    ],
)
def test_strategies_add_the_combined_update_round_after_round(strategy, expected):
    updates = dict(zip("abcdefg", rows(7, 30), strict=True))
    cohort = Cohort(Constant(updates), 30, dict.fromkeys(updates, 1))
    grid = InProcessGrid(updates, cohort.answer)
    start = np.ones(30, np.float32)
    arrays = ArrayRecord({"weights": wire.array(start)})
    found = run_rounds(strategy(7), grid, arrays, 3)["weights"].numpy()
    np.testing.assert_allclose(found, start + 3 * expected(updates.values(), ROOT), atol=1e-4)


ROOT = rows(1, 30, seed=9)[0]


def test_an_unreadable_reply_is_left_out_and_the_order_of_nodes_is_fixed():
    updates = dict(zip("abcd", rows(4, 30), strict=True))
    cohort = Cohort(Constant(updates), 30, dict.fromkeys(updates, 1))

    def spoilt(deliveries):
        messages = dict(deliveries)
        for name, reply in cohort.answer(deliveries):
            if name == "c":
                bad = ArrayRecord({"weights": wire.array(np.full(30, np.nan, np.float32))})
                reply = Message(type(reply.content)({"arrays": bad}), reply_to=messages["c"])
            yield name, reply

    start = ArrayRecord({"weights": wire.array(np.zeros(30, np.float32))})
    found = run_rounds(FoolsGold(4), InProcessGrid(updates, spoilt), start, 2)["weights"].numpy()
    again = run_rounds(FoolsGold(4), InProcessGrid(updates, spoilt), start, 2)["weights"].numpy()
    assert np.isfinite(found).all() and found.tobytes() == again.tobytes()


class Halving:
    """Training that halves the weights, and notes whom it was asked to train together."""

    def __init__(self):
        self.asked = []

    def train(self, starts, number):
        self.asked.append(sorted(starts))
        return {name: start / 2 for name, start in starts.items()}


def test_the_trusted_update_is_trained_along_and_is_what_it_would_be_alone():
    server, learner = np.float32([4, 2]), Halving()
    along = RootAlong(learner, lambda: server)
    assert list(along.train({"p1": np.float32([8, 8])}, 3)) == ["p1"]
    np.testing.assert_array_equal(along.update(server, 3), -server / 2)
    assert learner.asked == [["p1", "root"]]
    other = np.float32([1, 1])
    np.testing.assert_array_equal(along.update(other, 3), -other / 2)
    np.testing.assert_array_equal(along.update(server, 4), -server / 2)
    assert learner.asked[1:] == [["root"], ["root"]]


def test_q_is_nought_is_averaging_and_more_of_it_weighs_losses():
    names, losses = ["p1", "p2"], {"p1": 0.5, "p2": 4.0}
    steps = {"p1": np.float32([1, 0]), "p2": np.float32([0, 1])}

    class Fixed:
        def train(self, starts, number):
            return {name: start + steps[name] for name, start in starts.items()}

    def weights(q):
        cohort = Cohort(Fixed(), 2, dict.fromkeys(names, 1), loss=lambda name, _: losses[name])
        grid = InProcessGrid(names, cohort.answer)
        start = ArrayRecord({"weights": wire.array(np.zeros(2, np.float32))})
        strategy = SingleQFedAvg(1.0, q, fraction_evaluate=0.0)
        found = run_rounds(strategy, grid, start, 1)["weights"].numpy()
        assert found.dtype == np.float32
        return found

    np.testing.assert_allclose(weights(0.0), [0.5, 0.5], rtol=1e-6)
    less, more = weights(1.0)
    assert more > 2 * less  # the update of who is worse off counts for more
