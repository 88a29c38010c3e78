"""Batches and random streams are functions of the step."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightshare.errors import UserError
from weightshare.training import EpochBatches, Zipped, reseed, same_streams_after, streams


@given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_example_comes_once_per_epoch_whatever_the_batch_and_the_ranks(
    size, batch_size, world, seed
):
    batch_size = max(batch_size, world)
    ranks = [EpochBatches(torch.arange(size), batch_size, seed, r, world) for r in range(world)]
    steps = 3 * size // batch_size + 1
    row = torch.cat([rank[step] for step in range(steps) for rank in ranks])
    assert len(row) == steps * batch_size
    for epoch in range(len(row) // size):
        assert sorted(row[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    alone = EpochBatches(torch.arange(size), batch_size, seed)
    assert torch.equal(row, torch.cat([alone[step] for step in range(steps)]))


def test_epochs_have_different_orders_and_any_step_can_be_asked_for_again():
    batches = EpochBatches(torch.arange(50), 50, seed=3)
    first, second = batches[0], batches[1]
    assert not torch.equal(first, second)
    assert batches[700].sort().values.equal(torch.arange(50))
    assert torch.equal(batches[0], first) and torch.equal(batches[1], second)
    assert not torch.equal(EpochBatches(torch.arange(50), 50, seed=4)[0], first)


def test_columns_stay_together_and_examples_of_a_dataset_are_collated():
    x = np.arange(20, dtype=np.float32).reshape(10, 2)
    named = EpochBatches({"x": x, "pair": (x[:, 0], torch.arange(10))}, 4)[2]
    assert torch.equal(named["x"][:, 0], named["pair"][0])
    assert torch.equal(named["x"][:, 0], 2.0 * named["pair"][1])
    examples = [{"x": x[i], "label": i} for i in range(10)]
    collated = EpochBatches(examples, 4)[2]
    assert torch.equal(collated["x"], named["x"])
    assert torch.equal(collated["label"], named["pair"][1])


def test_zipped_sources_give_a_batch_each():
    left, right = EpochBatches(torch.arange(9), 2, seed=1), EpochBatches(torch.arange(9), 3, seed=2)
    assert all(
        torch.equal(a, b) for a, b in zip(Zipped(left, right)[5], (left[5], right[5]), strict=True)
    )


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (torch.zeros(0), {"batch_size": 2}, "empty"),
        (torch.zeros(9), {"batch_size": 2, "world": 3}, "at least one example"),
        ((torch.zeros(9), torch.zeros(8)), {"batch_size": 2}, "one length"),
        (torch.zeros(9), {"batch_size": 0}, "at least one example"),
    ],
)
def test_unusable_data_is_refused(data, options, message):
    with pytest.raises(UserError, match=message):
        EpochBatches(data, **options)


def test_the_shared_stream_is_the_same_on_all_ranks_and_the_local_one_is_not():
    def draw(generator):
        return torch.rand(8, generator=generator)

    zero, one, again = streams(7, 3, rank=0), streams(7, 3, rank=1), streams(7, 3, rank=1)
    assert torch.equal(draw(zero.shared), draw(one.shared))
    assert torch.equal(draw(one.local), draw(again.local))
    draws = [draw(streams(7, 3, r).local) for r in range(3)]
    draws += [draw(streams(7, 3).shared), draw(streams(7, 4).shared), draw(streams(8, 3).shared)]
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)


def test_reseeding_sets_all_global_states_and_they_can_be_put_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    with same_streams_after():
        reseed(1, 2)
        first = draw()
        reseed(1, 3)
        other = draw()
        reseed(1, 2)
        assert draw() == first and not set(first) & set(other)
    reseed(0, 0)
    expected = draw()
    reseed(0, 0)
    with same_streams_after():
        draw()
    assert draw() == expected
