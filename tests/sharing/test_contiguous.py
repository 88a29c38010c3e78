import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightshare.errors import UserError
from weightshare.sharing import contiguous
from weightshare.sharing.grouping import OBJECTIVES


def cost(d, group, objective):
    pairs = [float(d[i, j]) for i, j in itertools.combinations(group, 2)]
    return {
        "within": sum(pairs),
        "neutral": sum(pairs) / len(group),
        "diameter": max(pairs, default=0.0),
    }[objective]


def every_contiguous(k, groups, max_size):
    for cuts in itertools.combinations(range(1, k), groups - 1):
        ends = [0, *cuts, k]
        parts = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
        if max(map(len, parts)) <= max_size:
            yield parts


def random_distance(k, seed):
    d = torch.rand(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (d + d.T) / 2


@given(
    k=st.integers(1, 8),
    groups=st.integers(1, 8),
    max_size=st.integers(1, 8),
    objective=st.sampled_from(OBJECTIVES),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=200, deadline=None)
def test_equals_brute_force(k, groups, max_size, objective, seed):
    d = random_distance(k, seed)
    candidates = list(every_contiguous(k, groups, max_size)) if groups <= k else []
    if not candidates:
        with pytest.raises(UserError, match="cannot be split"):
            contiguous(d, groups, max_size, objective)
        return
    found = contiguous(d, groups, max_size, objective)
    assert sorted(i for g in found for i in g) == list(range(k))
    best = min(sum(cost(d, g, objective) for g in parts) for parts in candidates)
    assert sum(cost(d, g, objective) for g in found) == pytest.approx(best, abs=1e-12)


def test_planted_runs_are_found_and_ties_give_the_longest_first_group():
    d = torch.ones(6, 6)
    d[:2, :2] = d[2:5, 2:5] = 0.1
    assert contiguous(d, groups=3) == [[0, 1], [2, 3, 4], [5]]
    assert contiguous(torch.zeros(5, 5), groups=2) == [[0, 1, 2, 3], [4]]
    assert contiguous(torch.zeros(5, 5), max_size=2) == [[0, 1], [2, 3], [4]]


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="at least one"):
        contiguous(torch.zeros(3, 3))
    with pytest.raises(UserError, match="square"):
        contiguous(torch.zeros(3, 2), 2)
    with pytest.raises(UserError, match="symmetric"):
        contiguous(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), 2)
    with pytest.raises(UserError, match="not finite"):
        contiguous(torch.tensor([[0.0, float("nan")], [float("nan"), 0.0]]), 2)
