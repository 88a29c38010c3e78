"""Who was honest for long and turns, and who stays just above the threshold."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightshare.errors import UserError
from weightshare.federated import FederateConfig, ReputationConfig, Standing, simulate
from weightshare.federated.reputation import smooth
from weightshare.federated.turns import ALLOWANCE

NAMES = [f"p{i}" for i in range(10)]
ROBUST = ReputationConfig.robust()
WATCHFUL = replace(ROBUST, turn=1.0)


def standings(config, cosines, rounds):
    """The standing after each round; ``cosines(number, standing)`` are what a round brings."""
    standing = Standing(reputation=dict.fromkeys(NAMES, 0.0))
    for number in range(1, rounds + 1):
        found = {n: c for n, c in cosines(number, standing).items() if n in standing.reputation}
        standing, judged = smooth(standing, found, config)
        yield standing, judged


def removed_at(config, cosines, rounds=60):
    return {
        name: number
        for number, (_, judged) in enumerate(standings(config, cosines, rounds), start=1)
        for name in judged.expelled
    }


def late(number, _):
    return dict.fromkeys(NAMES, 0.7) | {"p0": 0.7 if number <= 12 else -0.7}


def stalling(number, standing):
    """From round 13 on p0 gives just what keeps its reputation above the threshold."""
    enough = 0.7 * (1.05 * ROBUST.threshold)
    return dict.fromkeys(NAMES, 0.7) | {"p0": 0.7 if number <= 12 else enough}


def test_one_that_turns_is_removed_within_two_rounds_instead_of_twenty():
    assert removed_at(ROBUST, late)["p0"] > 30
    assert removed_at(WATCHFUL, late) == {"p0": 13}
    assert removed_at(replace(ROBUST, turn=2.0), late) == {"p0": 14}


def test_one_that_stays_just_above_the_threshold_is_removed():
    assert removed_at(ROBUST, stalling) == {}
    assert removed_at(WATCHFUL, stalling) == {"p0": 15}


def test_reputation_falls_faster_than_it_rises():
    quick = replace(ROBUST, falling=0.5)
    assert removed_at(quick, late)["p0"] <= 15
    (last, _) = list(standings(quick, lambda *_: dict.fromkeys(NAMES, 0.7), 30))[-1]
    (plain, _) = list(standings(ROBUST, lambda *_: dict.fromkeys(NAMES, 0.7), 30))[-1]
    assert last.reputation == pytest.approx(plain.reputation)


def test_what_training_does_to_all_is_no_turn():
    """Cosines fall as models converge, unevenly, and dip for a round."""
    draw = np.random.default_rng(0)

    def fading(number, _):
        fall = 0.8 * 0.97**number
        found = {name: fall * (0.9 + 0.02 * i) for i, name in enumerate(NAMES)}
        return {n: c + 0.05 * draw.standard_normal() for n, c in found.items()}

    def one_dip(number, standing):
        return fading(number, standing) | ({"p3": 0.0} if number == 20 else {})

    for cosines in (fading, one_dip):
        assert removed_at(WATCHFUL, cosines) == {}


@given(
    st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=3, max_size=12),
    st.integers(0, 3),
)
def test_the_sum_is_the_definition(table, patience):
    names = NAMES[:4]
    config = ReputationConfig(patience=patience, threshold=0, turn=0)
    standing = Standing(reputation=dict.fromkeys(names, 0.25))
    for row in table:
        standing, _ = smooth(standing, dict(zip(names, row, strict=True)), config)
    first = max(patience, 1)
    rows = np.array(table)
    falls = np.zeros(4)
    if len(rows) > first:
        drops = rows[:first].mean(0) - rows[first:]
        for drop in drops:
            falls = np.maximum(0, falls + drop - np.median(drop) - ALLOWANCE)
    assert [standing.falls.get(n, 0.0) for n in names] == pytest.approx(falls, abs=1e-9)


def test_a_turn_obeys_the_rails_and_a_readmitted_one_begins_anew(federation):
    """Through the strategy and real messages: observed, then removed, then let in again."""

    def update(name, number):
        common = np.random.default_rng([7, number]).standard_normal(400)
        own = np.random.default_rng([number, *name.encode()]).standard_normal(400)
        sign = -1 if name == "p0" and number > 11 else 1
        return sign * 0.1 * (common + 0.5 * own)

    watching = replace(WATCHFUL, observe=True)
    quiet = federation(6, watching, update, sizes=dict.fromkeys([f"p{i}" for i in range(6)], 1.0))
    quiet.run(14)
    assert quiet.strategy.last.would_expel == ("p0",) and "p0" in quiet.strategy.last.turned
    assert not quiet.strategy.standing.expelled
    assert quiet.strategy.log.rows("turned")[0]["name"] == "p0"

    strict = federation(6, WATCHFUL, update, sizes=dict.fromkeys([f"p{i}" for i in range(6)], 1.0))
    strict.run(14)
    assert set(strict.strategy.standing.expelled) == {"p0"}
    strict.strategy.readmit("p0")
    standing = strict.strategy.standing
    assert "p0" not in standing.falls and "p0" not in standing.usual
    assert Standing.load(standing.state()) == standing


def test_limits_out_of_range_are_refused():
    for options in ({"turn": -1}, {"falling": 0.99}, {"falling": -0.1}, {"turn": float("nan")}):
        with pytest.raises(UserError, match="give a number"):
            ReputationConfig(**options)


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["uniform", "power", "dirichlet"])
def test_on_digits_only_those_who_turn_are_removed(partition):
    """Where everyone has few classes, falls differ by what is rare, and this would not hold."""
    config = FederateConfig(
        "digits", partition=partition, attack="late", adversaries=2, strategy="robust", rounds=20
    )
    removed = {}
    for turn in (0.0, 1.0):
        federation = simulate(replace(config, turn=turn))
        federation.run()
        removed[turn] = set(federation.reputation.removed)
    assert removed == {0.0: set(), 1.0: {"x01", "x02"}}
