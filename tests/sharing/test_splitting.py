import pytest
import torch

from weightshare.errors import UserError
from weightshare.sharing import Gram, split


def measured(directions, noise, batches=8, seed=0, contexts=1):
    g = torch.Generator().manual_seed(seed)
    gram = Gram(range(len(directions)))
    for _ in range(contexts):
        for _ in range(batches):
            rows = directions + noise * torch.randn(
                directions.shape, generator=g, dtype=torch.float64
            )
            gram.update({"w": dict(enumerate(rows))})
        gram.close()
    return gram


def axes(*which):
    return torch.eye(60, dtype=torch.float64)[list(which)]


def test_two_camps_are_split_where_they_differ():
    found = split(measured(axes(0, 1, 0, 1, 0), 0.1))
    assert found.advised
    assert found.groups == ((0, 2, 4), (1, 3))
    assert found.low <= found.gain <= found.high
    assert found.null < found.gain


def test_two_opposed_users_are_split():
    directions = axes(0, 0)
    directions[1] *= -1
    assert split(measured(directions, 0.1)).advised


def test_agreeing_users_are_rarely_split():
    advised = sum(
        split(measured(axes(0, 0, 0, 0), 0.15, seed=s), draws=60).advised for s in range(20)
    )
    assert advised <= 2


def test_a_gradient_lost_in_noise_is_no_evidence():
    found = split(measured(axes(0, 1, 0) * 1e-3, 1.0))
    assert not found.advised and found.reason


def test_without_any_noise_the_camps_are_split_too():
    directions = axes(0, 0, 0, 0)
    directions[2:] *= -1
    found = split(measured(directions, 0.0))
    assert found.advised and found.gain == pytest.approx(2.0)


def test_chance_has_no_more_choice_than_the_split():
    gram = measured(axes(0, 0, 0, 1, 1, 1), 0.5)
    free, runs = split(gram), split(gram, contiguous=True)
    assert free.groups == runs.groups and runs.null < free.null


def test_every_answer_has_a_reason():
    one = measured(axes(0, 1), 0.1, batches=2)
    assert "three batches" in split(one).reason
    dead = axes(0, 1)
    dead[1] = 0
    assert "1 of 2 users" in split(measured(dead, 0.0)).reason


def test_contexts_are_the_units_where_there_are_several():
    found = split(measured(axes(0, 1, 0, 1), 0.1, batches=2, contexts=6))
    assert found.advised and found.groups == ((0, 2), (1, 3))


def test_the_same_seed_gives_the_same_answer():
    gram = measured(axes(0, 1, 1, 2), 0.3)
    assert split(gram, seed=3) == split(gram, seed=3)


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"level": 1.0}, {"level": 0.0}])
def test_an_impossible_null_is_refused(wrong):
    with pytest.raises(UserError, match="level"):
        split(measured(axes(0, 1), 0.1), **wrong)


@pytest.mark.parametrize("groups", [2, 3])
def test_the_number_of_groups_is_kept(groups):
    found = split(measured(axes(0, 1, 2, 0, 1, 2), 0.1), groups)
    assert len(found.groups) == groups
