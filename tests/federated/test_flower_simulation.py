"""In process and under Ray the same configuration is the same federation."""

import numpy as np
import pytest

from weightshare.errors import UserError
from weightshare.federated.config import FederateConfig
from weightshare.federated.flower_simulation import SimulatedGrid, run_under_flower
from weightshare.federated.grid import InProcessGrid
from weightshare.federated.simulation import simulate

OPTIONS = FederateConfig(
    "digits", participants=4, rounds=3, epochs=1, samples=200, hidden=8, training="loop"
)


@pytest.mark.slow
def test_ray_gives_the_reputations_of_one_process():
    pytest.importorskip("ray", reason="Flower's simulation needs Ray")
    here = simulate(OPTIONS)
    here.run()
    there = run_under_flower(OPTIONS)
    assert there.standing.round == 3
    assert there.standing.reputation == pytest.approx(here.reputation.standing.reputation, abs=1e-6)
    for name in here.examples:
        np.testing.assert_allclose(there.model_of(name), here.vectors()[name], atol=1e-5)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match="flwr\\[simulation\\]"):
        run_under_flower(OPTIONS)
    with pytest.raises(UserError, match="only honest"):
        run_under_flower(FederateConfig("digits", attack="zero", adversaries=1))


def test_real_nodes_are_not_taken_for_simulated_ones():
    with pytest.raises(UserError, match="Roster"):
        SimulatedGrid(InProcessGrid(["a"], lambda deliveries: []), ["a"])
