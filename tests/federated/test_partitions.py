"""Who holds what, what adversaries send, and when fairness is defined."""

import numpy as np
import pytest

from weightshare.errors import UserError
from weightshare.federated import ATTACKS, FederateConfig, deal, fairness
from weightshare.federated.attacks import Crowd, Situation
from weightshare.federated.partitions import class_counts, power_sizes

LABELS = np.arange(3000) % 10


def test_sizes_on_a_line_are_the_published_ones():
    assert power_sizes(5, 3000) == [71, 336, 600, 865, 1128]
    assert power_sizes(10, 6000) == [71, 189, 306, 424, 542, 659, 777, 895, 1012, 1125]


def test_classes_are_the_published_ones():
    assert class_counts(5, 10) == [1, 3, 5, 7, 10]
    assert class_counts(10, 10) == list(range(1, 11))
    assert class_counts(20, 10)[:7] == [1, 1, 1, 2, 2, 3, 3]
    shards = deal(LABELS, "classes", 5).honest
    assert [len(np.unique(LABELS[rows])) for rows in shards] == [1, 3, 5, 7, 10]
    assert len({len(rows) for rows in shards}) == 1


@pytest.mark.parametrize("partition", ["uniform", "power", "classes", "dirichlet"])
def test_adversaries_hold_rows_of_their_own(partition):
    shards = deal(LABELS, partition, 10, 11, seed=3)
    honest = set(np.concatenate(shards.honest).tolist())
    evil = np.concatenate(shards.adversaries).tolist()
    assert not honest & set(evil) and len(evil) == len(set(evil))
    mean = np.mean([len(rows) for rows in shards.honest])
    assert all(0.4 * mean <= len(rows) <= 0.6 * mean for rows in shards.adversaries)
    again = deal(LABELS, partition, 10, 11, seed=3)
    assert all((a == b).all() for a, b in zip(shards.honest, again.honest, strict=True))


@pytest.mark.parametrize("partition", ["uniform", "power", "dirichlet"])
def test_nothing_is_dealt_twice_and_nothing_is_left(partition):
    rows = np.concatenate(deal(LABELS, partition, 7, seed=1).honest)
    assert sorted(rows.tolist()) == list(range(3000))
    assert sum(map(len, deal(LABELS, partition, 7, samples=700).honest)) == 700


@pytest.mark.parametrize(
    ("short", "long"), [("uni", "uniform"), ("pow", "power"), ("cla", "classes")]
)
def test_the_papers_names_are_the_same_partitions(short, long):
    one, other = (deal(LABELS, name, 6, 2, seed=4).honest for name in (short, long))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))
    assert FederateConfig("digits", partition=short) == FederateConfig("digits", partition=long)


@pytest.mark.parametrize(
    ("labels", "partition", "options"),
    [
        (LABELS[:15], "uniform", {"participants": 10}),
        (LABELS[:40], "power", {"participants": 20}),
        ([], "uniform", {"participants": 1}),
        (LABELS, "even", {"participants": 3}),
        (LABELS, "uniform", {"participants": 0}),
        (LABELS, "uniform", {"participants": 3, "adversaries": -1}),
        (LABELS, "dirichlet", {"participants": 3, "concentration": 0.0}),
        (LABELS, "uniform", {"participants": 3, "samples": 3001}),
        (LABELS, "uniform", {"participants": 3, "samples": -5}),
    ],
)
def test_what_cannot_be_dealt_is_refused(labels, partition, options):
    with pytest.raises(UserError):
        deal(labels, partition, **options)


@pytest.mark.parametrize("partition", ["uniform", "power", "classes", "dirichlet"])
@pytest.mark.parametrize("rows", [13, 41, 200])
def test_nobody_is_dealt_nothing(partition, rows):
    labels = np.repeat([0, 1, 2], [rows - 2, 1, 1])
    for participants in (1, 2, 5):
        shards = deal(labels, partition, participants, 1)
        assert all(map(len, shards.honest)) and all(map(len, shards.adversaries))


def test_fairness_of_training_alone_is_a_hundred_and_of_equals_undefined():
    alone = [0.7, 0.8, 0.85, 0.9]
    assert fairness(alone, alone).value == pytest.approx(100)
    assert fairness(alone, [1 - a for a in alone]).value == pytest.approx(-100)
    unknown = [0.1, 0.2, 0.3, np.nan]
    for pair in ((alone, [0.9] * 4), ([0.9] * 4, alone), ([0.1], [0.2]), (alone, unknown)):
        undefined = fairness(*pair)
        assert np.isnan(undefined.value) and undefined.reason
    with pytest.raises(UserError, match="both"):
        fairness(alone, alone[:3])


def situation(round_number=1, honest=(), seed=0):
    draws = [np.random.default_rng([seed, round_number, k]) for k in range(2)]
    return Situation(round_number, *draws, honest=Crowd(honest))


def test_attacks_send_what_they_are_named_after():
    draw = np.random.default_rng(5)
    update = draw.standard_normal(5000).astype(np.float32)
    honest = [draw.standard_normal(5000).astype(np.float32) for _ in range(4)]

    def send(name, number=1):
        return ATTACKS[name].transform(update.copy(), situation(number, honest))

    for name in ATTACKS:
        sent = send(name)
        assert sent.shape == update.shape and sent.dtype == np.float32, name
        assert np.isfinite(sent).all(), name
    np.testing.assert_array_equal(np.abs(send("sign_randomise")), np.abs(update))
    assert abs(np.mean(np.sign(send("sign_randomise")) == np.sign(update)) - 0.5) < 0.05
    np.testing.assert_array_equal(send("sign_flip"), -update)
    ratio = send("rescale") / update
    assert ratio.min() < -90 and ratio.max() > 90 and abs(ratio.mean()) < 5
    changed = send("value_invert") != update
    assert abs(changed.mean() - 0.5) < 0.05
    np.testing.assert_allclose(send("value_invert")[changed], 1 / update[changed], rtol=1e-4)
    rider = send("free_rider")
    assert rider.min() > -1 and rider.max() < 1 and abs(rider.mean()) < 0.05
    mean = np.mean(honest, axis=0)
    np.testing.assert_allclose(send("inner_product"), -2 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(send("alie"), mean - 1.5 * np.std(honest, axis=0), atol=1e-5)
    np.testing.assert_array_equal(send("identical"), send("identical"))
    np.testing.assert_array_equal(send("mimic"), honest[0])
    np.testing.assert_array_equal(send("late", 12), update)
    np.testing.assert_array_equal(send("late", 13), -update)
    assert ATTACKS["label_flip"].flips and ATTACKS["count_lie"].claims > 1e3
