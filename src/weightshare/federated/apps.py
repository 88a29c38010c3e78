"""The federation of ``weightshare federate`` as a Flower app, for a real deployment.

``server`` and ``client`` are what an app's ``pyproject.toml`` names. Both read the run's
configuration (``data``, ``participants``, ``rounds``, ``epochs``, ``samples``, ``seed``; the server
also ``roster``, a file, ``folder``, where checkpoints, models and audit log go, ``observe``, and
``readmit``, names of removed participants that may come back). A SuperNode
says with ``--node-config 'participant="p01"'`` which share of the data is its own; who it is, its
key says. For data and models of your own, make the client with ``client_app`` and the server with
``ReputationStrategy`` and ``run_rounds``, as here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from weightshare.errors import UserError
from weightshare.federated.config import FederateConfig, ReputationConfig
from weightshare.federated.federation import run_rounds
from weightshare.federated.participant import client_app, found_by
from weightshare.federated.roster import Roster
from weightshare.federated.simulation import simulate
from weightshare.federated.strategy import ReputationStrategy
from weightshare.report.store import write_json

server = ServerApp()


def options(run_config: Mapping[str, Any]) -> FederateConfig:
    """The options of a run as the command has them."""
    numbers = {
        name: int(run_config[name])
        for name in ("participants", "rounds", "epochs", "samples", "seed")
        if name in run_config
    }
    data = str(run_config.get("data", "digits"))
    observe = bool(run_config.get("observe", False))
    return FederateConfig(data, training="loop", observe=observe, **numbers)  # type: ignore[arg-type]


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Go on from the last checkpoint in ``folder``, save after every round, deliver, sum up."""
    config = options(context.run_config)
    roster = Roster.load(str(context.run_config["roster"]))
    folder = Path(str(context.run_config["folder"]))
    here = simulate(config)
    strategy = ReputationStrategy(
        here.initial,
        ReputationConfig(observe=config.observe),
        roster,
        folder=folder,
        minimum=len(roster.fingerprints),
        wait=120,
    )
    done = strategy.restore(folder / "checkpoints")
    for name in str(context.run_config.get("readmit", "")).split():
        strategy.readmit(name)

    def save(number: int, arrays: ArrayRecord, metrics: MetricRecord | None) -> None:
        strategy.save(folder / "checkpoints")

    run_rounds(
        strategy,
        grid,
        here.arrays,
        config.rounds,
        done=done,
        timeout=300,
        seed=config.seed,
        after=save,
    )
    confirmed = strategy.deliver(grid)
    write_json(
        folder / "result.json",
        {
            "rounds": strategy.standing.round,
            "reputation": dict(strategy.standing.reputation),
            "expelled": dict(strategy.standing.expelled),
            "confirmed": confirmed,
            "rejected": len(strategy.log.rows("rejected")),
        },
    )


def _participant(context: Context) -> ClientApp:
    here = simulate(options(context.run_config))
    name = str(context.node_config.get("participant", ""))
    if name not in here.examples:
        raise UserError(
            f"The node's participant is {name!r}; give one of {', '.join(here.examples)} with "
            "--node-config 'participant=\"p01\"'."
        )
    return client_app(name, here.training, len(here.initial), here.examples[name])


client = found_by(_participant)
