"""The draw: ranges, repeats, privacy, independence, and the values it must give for ever."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightshare.errors import UserError
from weightshare.shards import MosConfig, SplitMix64, Target, draw, parameter_count, plan_pools
from weightshare.shards.indices import checksum, draw_balanced


def blocks(count=8, h=64, o=48):
    return [Target(f"layers.{k}.q_proj", h, o) for k in range(count)]


def test_golden_values():
    stream = SplitMix64("mos", 0, "q_proj_64x48_A", 0)
    assert [stream.next() for _ in range(2)] == GOLDEN_STREAM
    plan = plan_pools(blocks(2, 8, 8), MosConfig(rank=3, shards_per_vector=2, private_rank=1))
    assert plan.pools["q_proj_8x8_A"].indices == GOLDEN_A
    assert plan.pools["q_proj_8x8_B"].indices == GOLDEN_B


def test_the_generator_is_splitmix64():
    # First outputs of the reference implementation started at 1234567.
    stream = SplitMix64()
    stream._state = 1234567
    assert [stream.next() for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.data())
def test_a_draw_never_repeats_and_stays_in_range(size, data):
    count = data.draw(st.integers(0, size))
    chosen = draw(size, count, SplitMix64(size, count))
    assert len(set(chosen)) == count and all(0 <= n < size for n in chosen)


def test_all_orders_are_equally_likely():
    seen = Counter(tuple(draw(3, 3, SplitMix64(i))) for i in range(6000))
    assert len(seen) == 6
    chi_square = sum((count - 1000) ** 2 / 1000 for count in seen.values())
    assert chi_square < 20.5  # 0.1 % of the chi-square distribution with 5 degrees of freedom


def test_private_rows_belong_to_one_module_and_each_is_used_once():
    config = MosConfig(equivalent_rank=4, rank=8, private_rank=1, shards_per_vector=4)
    for pool in plan_pools(blocks(), config).pools.values():
        public = 3 * 8 * 4
        own = [n for index in pool.indices for n in index[-4:]]
        assert sorted(own) == list(range(public, pool.rows))
        assert all(n < public for index in pool.indices for n in index[:-4])
        assert all(len(set(index)) == len(index) == 8 * 4 for index in pool.indices)


def test_a_and_b_are_drawn_apart_unless_paired():
    apart = plan_pools(blocks(), MosConfig())
    paired = plan_pools(blocks(), MosConfig(pair_dissociation=False))
    assert apart.pools["q_proj_64x48_A"].indices != apart.pools["q_proj_64x48_B"].indices
    assert paired.pools["q_proj_64x48_A"].indices == paired.pools["q_proj_64x48_B"].indices


def test_the_draw_depends_on_the_seed_and_on_nothing_around_it():
    first = plan_pools(blocks(), MosConfig()).pools["q_proj_64x48_A"].indices
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    others = [Target("layers.0.up_proj", 64, 128), *blocks(), Target("layers.1.k_proj", 64, 16)]
    with pytest.warns(UserWarning, match="get rank 2"):
        again = plan_pools(others, MosConfig()).pools["q_proj_64x48_A"].indices
    assert first == again
    other = plan_pools(blocks(), MosConfig(index_seed=1)).pools["q_proj_64x48_A"].indices
    assert first != other


def test_full_privacy_is_the_identity():
    plan = plan_pools(blocks(3), MosConfig(equivalent_rank=2, rank=2, private_rank=2))
    indices = plan.pools["q_proj_64x48_A"].indices
    assert [n for index in indices for n in index] == list(range(3 * 2 * 4))


def test_a_random_draw_leaves_the_expected_share_unused_and_a_balanced_one_none():
    targets = blocks(32)
    random_plan = plan_pools(targets, MosConfig(rank=4))
    assert abs(random_plan.dead_shards - (1 - 4 / 64) ** 32) < 0.03
    balanced = plan_pools(targets, MosConfig(rank=4, index_strategy="balanced"))
    assert balanced.dead_shards == 0
    for pool in balanced.pools.values():
        uses = pool.uses()
        assert max(uses) - min(uses) <= 1
        assert all(len(set(index)) == len(index) for index in pool.indices)


def test_balanced_draws_are_not_sorted_by_use():
    used = [1] * 10 + [0] * 10
    assert draw_balanced(used, 15, SplitMix64(3))[:10] != list(range(10, 20))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["type", "shape", "all"]),
    st.data(),
)
def test_parameters_follow_the_budget_alone(count, budget, shards, scope, data):
    targets = [*blocks(count), *[Target(f"layers.{k}.up", 64, 128) for k in range(count)]]
    private = data.draw(st.integers(0, budget))
    config = MosConfig(
        equivalent_rank=budget,
        rank=(budget - private) * count + private,
        private_rank=private,
        shards_per_vector=shards,
        pool_scope=scope,
    )
    plan = plan_pools(targets, config)
    expected = sum(budget * (t.in_features + t.out_features) for t in targets)
    assert plan.parameters == parameter_count(targets, config) == expected


def test_budgets_of_a_and_b_may_differ():
    plan = plan_pools(blocks(4), MosConfig(equivalent_rank=1, output_rank=3, rank=4))
    assert plan.parameters == 4 * (1 * 64 + 3 * 48)


def test_wider_scopes_share_between_types():
    targets = [*blocks(2), Target("layers.0.up", 64, 128), Target("layers.1.down", 128, 64)]
    shape = plan_pools(targets, MosConfig(pool_scope="shape", rank=2))
    assert shape.pools["64_w16_A"].members == ["layers.0.q_proj", "layers.1.q_proj", "layers.0.up"]
    whole = plan_pools(targets, MosConfig(pool_scope="all", rank=2))
    assert {key: len(pool.members) for key, pool in whole.pools.items()} == {
        "all_w4_A": 4,
        "all_w4_B": 4,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 17}, "at most 16"),
        ({"rank": 4, "private_rank": 2}, "at most 2"),
        ({"shards_per_vector": 5}, r"give one of 1, 2, 4, 8, 16"),
        ({"pool_scope": "shape", "output_rank": 3, "pair_dissociation": False}, "differ in shards"),
    ],
)
def test_what_the_pools_cannot_give_is_refused_by_name(options, said):
    with pytest.raises(UserError, match=said):
        plan_pools(blocks(), MosConfig(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"equivalent_rank": 0}, "equivalent_rank is 0"),
        ({"equivalent_rank": 2, "private_rank": 3}, "from 0 to 2"),
        ({"rank": 0}, "rank is 0"),
        ({"private_rank": 2, "rank": 1}, "below the private rank"),
        ({"lora_alpha": 0}, "above 0"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"pool_scope": "none"}, "type, shape, all"),
        ({"index_strategy": "x"}, "random, balanced"),
        ({"bias": "lora_only"}, "none, all, mos_only"),
        ({"target_modules": "x", "layers_to_transform": [1]}, "list of names"),
        ({"layers_pattern": "x"}, "without layers_to_transform"),
        ({"equivalent_rank": 2, "rank": 1}, "below the equivalent rank 2"),
        ({"output_rank": 0}, "output_rank is 0"),
        ({"output_rank": 9, "rank": 8}, "below the equivalent rank 9"),
        ({"equivalent_rank": True}, "equivalent_rank is True"),
        ({"rank": "8"}, "rank is '8'"),
        ({"index_seed": None}, "index_seed is None"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\] is 'x'"),
        ({"shard_pattern": {"q_proj": -1}}, r"shard_pattern\['q_proj'\] is -1"),
        ({"rank_pattern": None}, "give a dictionary"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        MosConfig(**options)


def test_the_checksum_sees_every_entry_and_its_module():
    assert checksum([[1, 2], [3]]) != checksum([[1], [2, 3]]) != checksum([[1, 2], [4]])
    assert checksum([[1, 2], [3]]) == checksum([torch.tensor([1, 2]), torch.tensor([3])])


GOLDEN_STREAM = [1446337861423561152, 8394892812931990002]
GOLDEN_A = [[3, 0, 1, 2, 4, 5], [2, 0, 1, 3, 6, 7]]
GOLDEN_B = [[2, 3, 1, 0, 4, 5], [0, 3, 2, 1, 6, 7]]
