"""Rounds of any Flower strategy over any grid, with a start that need not be the first."""

from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from weightshare.training.randomness import reseed, same_streams_after

AfterRound = Callable[[int, ArrayRecord, MetricRecord | None], None]


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    arrays: ArrayRecord,
    rounds: int,
    *,
    done: int = 0,
    timeout: float = 3600.0,
    seed: int = 0,
    after: AfterRound | None = None,
) -> ArrayRecord:
    """Rounds ``done + 1`` to ``rounds``; returns the last arrays.

    Like ``Strategy.start``, which always counts from 1, draws from unseeded global randomness and
    calls nobody between rounds. Each round begins with global random states that are a function of
    seed and round.

    Args:
        strategy: any strategy of Flower's message API.
        grid: where the participants are.
        arrays: what a strategy with one model starts from.
        rounds: number of the last round.
        done: rounds that are behind.
        timeout: seconds to wait for the replies of a round.
        seed: of what strategies draw (Flower samples nodes).
        after: called with (round, arrays, metrics) when a round is aggregated.
    """
    with same_streams_after():
        for number in range(done + 1, rounds + 1):
            reseed(seed, number)
            messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
            replies = grid.send_and_receive(messages, timeout=timeout)
            new, metrics = strategy.aggregate_train(number, replies)
            arrays = arrays if new is None else new
            if after is not None:
                after(number, arrays, metrics)
    return arrays
