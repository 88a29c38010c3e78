"""Rewards against sorting everything."""

from fractions import Fraction
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weightshare.federated.rewards import Order, Rewards, entries_for, layer_entries_for


def sorted_support(vector, count):
    order = np.lexsort((np.arange(len(vector)), -np.abs(vector)))
    mask = np.zeros(len(vector), bool)
    mask[order[:count]] = True
    return mask


VECTORS = st.one_of(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=120),
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 1.0000001, 2.0]), min_size=1, max_size=120),
)


@settings(max_examples=150, deadline=None)
@given(VECTORS, st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_supports_are_those_of_a_full_stable_sort(values, quotas):
    vector = np.float32(values)
    rewards = Rewards(vector, {str(i): q for i, q in enumerate(quotas)})
    for i, quota in enumerate(quotas):
        count = entries_for(quota, len(vector))
        support = rewards.support(str(i))
        assert rewards.count(str(i)) == count == support.sum()
        np.testing.assert_array_equal(support, sorted_support(vector, count))
        for values in (vector, 2 * vector):
            whole = np.where(support, values, np.float32(0))
            assert rewards.dense(str(i), values).tobytes() == whole.tobytes()
            places, sent = rewards.cut(str(i), values)
            if 2 * count > len(vector):
                assert places is None and sent.tobytes() == whole.tobytes()
            else:
                np.testing.assert_array_equal(places, support)
                np.testing.assert_array_equal(sent, values[support])


@pytest.mark.parametrize("size", [1000, 70_001])
def test_many_quotas_of_a_long_vector(size):
    draw = np.random.default_rng(size)
    vector = (draw.standard_normal(size) * 1e-3).astype(np.float32)
    vector[draw.random(size) < 0.3] = 0.0007
    counts = sorted({int(k) for k in draw.integers(0, size, 300)})
    order = Order(vector, counts)
    for count in counts[::17]:
        expected = sorted_support(vector, count)
        np.testing.assert_array_equal(order.support(count), expected)


def test_a_whole_quota_returns_the_aggregate_bit_for_bit():
    vector = np.random.default_rng(0).standard_normal(999).astype(np.float32)
    rewards = Rewards(vector, {"all": 1.0, "half": 0.5, "none": 0.0})
    assert rewards.dense("all").tobytes() == vector.tobytes()
    assert not rewards.dense("none").any() and rewards.count("none") == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0.01, 1), min_size=2, max_size=6))
def test_more_reputation_means_a_better_reward(seed, quotas):
    vector = np.random.default_rng(seed).standard_normal(200).astype(np.float32)
    quotas = sorted(quotas)
    rewards = Rewards(vector, {str(i): q for i, q in enumerate(quotas)})
    dense = [rewards.dense(str(i)).astype(np.float64) for i in range(len(quotas))]
    for less, more in pairwise(dense):
        assert set(np.flatnonzero(less)) <= set(np.flatnonzero(more))
        assert np.linalg.norm(more - vector) <= np.linalg.norm(less - vector) + 1e-9
        if less.any():
            cosines = [d @ vector / np.linalg.norm(d) for d in (less, more)]
            assert cosines[1] >= cosines[0] - 1e-6


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 135_000_000))
@example(1, 3, 135_000_000)
@example(29, 100, 100)
@example(2, 999, 134_999_865)
def test_rational_quotas_are_worth_exactly_their_entries(a, b, dimension):
    share = Fraction(min(a, b), max(a, b))
    exact = share * dimension
    if exact.denominator == 1:
        assert entries_for(float(share), dimension) == exact
        assert layer_entries_for(float(share), dimension) == exact
    else:
        assert abs(entries_for(float(share), dimension) - exact) <= 1
    assert entries_for(1.0, dimension) == dimension and entries_for(0.0, dimension) == 0


def test_quotas_by_layer_round_up_in_each_tensor():
    vector = np.random.default_rng(3).standard_normal(63).astype(np.float32)
    layers = [50, 10, 3]
    rewards = Rewards(vector, {"a": 0.31, "b": 1.0}, layers)
    assert rewards.count("a") == sum(ceil(0.31 * size) for size in layers)
    parts = np.split(rewards.support("a"), [50, 60])
    for part, whole, size in zip(parts, np.split(vector, [50, 60]), layers, strict=True):
        np.testing.assert_array_equal(part, sorted_support(whole, ceil(0.31 * size)))
    assert rewards.dense("b").tobytes() == vector.tobytes()


@pytest.mark.parametrize(
    "shares", [[0.99, 0.995, 0.999], [0.3, 0.301, 0.99], np.linspace(0, 1, 40)]
)
@pytest.mark.parametrize("kind", ["noise", "ties", "peaks"])
def test_few_and_many_quotas_of_magnitudes_of_any_law(shares, kind):
    size = 150_000
    vector = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    if kind == "ties":
        vector = np.round(vector, 1)
    if kind == "peaks":
        vector[::9] = 50
    counts = [int(share * size) for share in shares]
    order = Order(vector, counts)
    for count in counts:
        np.testing.assert_array_equal(order.support(count), sorted_support(vector, count))
