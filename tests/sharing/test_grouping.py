import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightshare.errors import UserError
from weightshare.sharing import Gram, Partition, partition
from weightshare.sharing.grouping import EXACT_UP_TO, OBJECTIVES, _assignments, _spectral


def set_partitions(users, groups):
    """All partitions into exactly ``groups`` groups, by the textbook recursion."""
    if not users:
        return [[]] if groups == 0 else []
    first, rest = users[0], users[1:]
    found = [[[first], *p] for p in set_partitions(rest, groups - 1)] if groups else []
    for p in set_partitions(rest, groups):
        for i in range(len(p)):
            found.append([*p[:i], [first, *p[i]], *p[i + 1 :]])  # noqa: PERF401
    return found


def cost(d, groups, objective):
    total = 0.0
    for group in groups:
        pairs = [float(d[i, j]) for i, j in itertools.combinations(sorted(group), 2)]
        total += {
            "within": sum(pairs),
            "neutral": sum(pairs) / len(group),
            "diameter": max(pairs, default=0.0),
        }[objective]
    return total


def symmetric(k, seed, low=0.0, high=2.0):
    g = torch.Generator().manual_seed(seed)
    d = low + (high - low) * torch.rand(k, k, generator=g, dtype=torch.float64)
    return (d + d.T) / 2


def test_stirling_numbers_of_seven():
    assert [len(_assignments(7, b)) for b in (2, 3, 4)] == [63, 301, 350]
    assert len(_assignments(EXACT_UP_TO, 5)) == 42_525


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_brute_force_on_a_thousand_matrices(objective):
    every = {(k, b): set_partitions(list(range(k)), b) for k in range(2, 7) for b in range(1, k)}
    for seed in range(1000 // len(every) + 1):
        for (k, b), candidates in every.items():
            d = symmetric(k, 1000 * seed + 10 * k + b)
            found = partition(d, b, objective)
            best = min(cost(d, groups, objective) for groups in candidates)
            assert found.cost == pytest.approx(best, abs=1e-10)
            assert cost(d, found.groups, objective) == pytest.approx(best, abs=1e-10)
            assert sorted(i for group in found.groups for i in group) == list(range(k))


def test_seven_users_equal_brute_force_in_both_the_papers_and_the_neutral_form():
    for b in (2, 3, 4):
        every = set_partitions(list(range(7)), b)
        even = [g for g in every if {len(u) for u in g} <= {7 // b, -(-7 // b)}]
        for seed in range(8):
            d = symmetric(7, seed)
            assert partition(d, b).cost == pytest.approx(min(cost(d, g, "neutral") for g in every))
            paper = partition(d, b, "within", balanced=True)
            assert paper.cost == pytest.approx(min(cost(d, g, "within") for g in even))


def test_twice_the_gain_is_the_between_group_sum_of_squares():
    u = torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    d = (u[:, None] - u).square().sum(-1) / 2
    found = partition(d, 3)
    between = sum(
        len(g) * (u[list(g)].mean(0) - u.mean(0)).square().sum().item() for g in found.groups
    )
    assert 2 * found.gain == pytest.approx(between, abs=1e-14)
    assert 0 <= found.explained <= 1
    assert found.gain_per_user == pytest.approx(found.gain / 7)


def test_orthogonal_users_cost_the_same_in_every_group_size():
    d = 1 - torch.eye(7, dtype=torch.float64)
    costs = {round(cost(d, groups, "neutral"), 12) for groups in set_partitions(list(range(7)), 2)}
    assert costs == {2.5}


def test_ties_keep_the_lowest_users_together():
    assert partition(torch.zeros(4, 4), 2).groups == ((0, 1, 2), (3,))


# What the published code got wrong, each as a fixture it fails.


def test_reference_defect_1_the_conflicting_block_gains_more_than_the_agreeing_one():
    agreeing = partition(0.05 * (1 - torch.eye(5)), 2)
    conflict = torch.full((5, 5), 0.05)
    conflict[:2, 2:] = conflict[2:, :2] = 1.9
    assert partition(conflict, 2).gain_per_user > 10 * agreeing.gain_per_user


def test_reference_defect_2_blocks_with_more_users_do_not_win_by_their_number():
    wins = 0
    for seed in range(50):
        six, seven = symmetric(6, seed, 0, 1), symmetric(7, 1000 + seed, 0, 1)
        wins += partition(six, 2).gain_per_user > partition(seven, 2).gain_per_user
    assert 10 <= wins <= 40


def test_reference_defect_3_planted_pairs_are_found_among_three_groups():
    d = torch.full((6, 6), 1.0)
    for a, b in ((0, 3), (1, 4), (2, 5)):
        d[a, b] = d[b, a] = 0.1
    for objective in ("neutral", "within"):
        assert partition(d, 3, objective).groups == ((0, 3), (1, 4), (2, 5))


def test_reference_defect_4_two_groups_of_three_depend_on_the_distances():
    found = {partition(symmetric(3, seed), 2, "within").groups for seed in range(200)}
    assert found == {((0, 1), (2,)), ((0, 2), (1,)), ((0,), (1, 2))}


def test_reference_defect_5_an_outlier_is_isolated():
    d = torch.full((5, 5), 0.4)
    d[4] = d[:, 4] = 1.5
    assert partition(d, 2).groups == ((0, 1, 2, 3), (4,))
    assert len(partition(d, 2, "within", balanced=True).groups[0]) in (2, 3)  # the paper cannot


def test_reference_defect_6_small_gradients_agree_with_themselves():
    g = torch.full((10,), 1e-3 / math.sqrt(10))
    gram = Gram("ab").update({"w": {"a": g, "b": g}})
    assert torch.allclose(gram.cosine(), torch.ones(2, 2).double())


@given(
    sizes=st.lists(st.integers(2, 6), min_size=2, max_size=5),
    seed=st.integers(0, 1000),
    more=st.floats(1.0, 5.0),
)
@settings(max_examples=60, deadline=None)
def test_more_conflict_on_one_block_moves_the_choice_towards_it_only(sizes, seed, more):
    g = torch.Generator().manual_seed(seed)
    blocks = []
    for k in sizes:
        d = torch.rand(k, k, generator=g, dtype=torch.float64)
        blocks.append(((d + d.T) / 2).fill_diagonal_(0))

    def chosen(distances):
        gains = [partition(d, 2).gain_per_user for d in distances]
        return gains.index(max(gains)), gains

    before, gains = chosen(blocks)
    raised = seed % len(sizes)
    after, new = chosen([d * more if i == raised else d for i, d in enumerate(blocks)])
    assert after in (before, raised)
    assert new[raised] >= gains[raised] - 1e-12
    agreeing = [torch.zeros(k, k, dtype=torch.float64) for k in sizes]
    assert max(chosen(agreeing)[1]) == 0  # nothing to gain anywhere: no split


def test_users_without_gradient_are_no_evidence():
    d = symmetric(5, 3)
    whole = partition(d[:4, :4], 2)
    d[4] = d[:, 4] = math.nan
    found = partition(d, 2)
    assert found.undefined == (4,)
    assert found.gain == whole.gain and found.cost == whole.cost and found.users == 4
    assert 4 in found.groups[0]


@given(seed=st.integers(0, 500), groups=st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_the_spectral_answer_is_close_to_the_exact_one(seed, groups):
    u = torch.nn.functional.normalize(
        torch.randn(9, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )
    d = 1 - u @ u.T
    found = _spectral(d, groups, "neutral", (1, 9))
    assert cost(d, found, "neutral") <= partition(d, groups).cost * 1.05 + 1e-9


def test_planted_groups_of_many_users_are_found():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (24,), generator=generator)
    u = torch.eye(3, 40)[truth] + 0.08 * torch.randn(24, 40, generator=generator)
    u = torch.nn.functional.normalize(u, dim=1)
    found = partition(1 - u @ u.T, 3)
    expected = sorted(tuple((truth == g).nonzero().flatten().tolist()) for g in range(3))
    assert list(found.groups) == expected
    balanced = partition(1 - u @ u.T, 3, "within", balanced=True)
    assert {len(g) for g in balanced.groups} == {8}


def test_contiguous_groups_are_runs():
    found = partition(symmetric(12, 0), 4, contiguous=True, max_size=4)
    assert [i for group in found.groups for i in group] == list(range(12))
    assert isinstance(found, Partition) and found.labels() == sorted(found.labels())


def test_a_run_goes_on_through_a_user_without_gradient():
    distance = symmetric(6, 0)
    distance[4], distance[:, 4] = torch.nan, torch.nan
    found = partition(distance, 3, contiguous=True)
    assert [i for group in found.groups for i in group] == list(range(6))
    assert found.undefined == (4,)


def test_impossible_requests_are_refused():
    for wrong in ({"max_size": 2}, {"contiguous": True}):
        with pytest.raises(UserError, match="balanced"):
            partition(symmetric(4, 0), 2, balanced=True, **wrong)
    with pytest.raises(UserError, match="at least one member"):
        partition(symmetric(4, 0), 2, max_size=0)
    for contiguous in (False, True):
        with pytest.raises(UserError, match="choose one of neutral"):
            partition(symmetric(4, 0), 2, "cut", contiguous=contiguous)
    with pytest.raises(UserError, match="into 5 groups"):
        partition(symmetric(4, 0), 5)
    with pytest.raises(UserError, match="at most 2"):
        partition(symmetric(6, 0), 2, max_size=2)
    with pytest.raises(UserError, match="at most 2"):
        partition(symmetric(12, 0), 2, max_size=2)
    with pytest.raises(UserError, match="square"):
        partition(torch.zeros(2, 3), 2)
