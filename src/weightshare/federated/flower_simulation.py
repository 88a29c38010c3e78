"""The same federation under Flower's own simulation, whose nodes are Ray actors.

For checking an app on the machinery that others use. Needs ``pip install 'flwr[simulation]'``.
The keys of simulated nodes are made up anew each time, so the nodes are asked which partition they
have, and believed: nothing of it is meant for a network.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from weightshare.errors import UserError
from weightshare.federated import flower
from weightshare.federated.config import FederateConfig
from weightshare.federated.federation import run_rounds
from weightshare.federated.grid import WithoutNetwork, key_of
from weightshare.federated.participant import client_app, found_by
from weightshare.federated.simulation import simulate
from weightshare.federated.strategy import ReputationStrategy

PARTITION = "query.partition"


class SimulatedGrid(WithoutNetwork):
    """Flower's grid with a name for each node: that of its partition.

    Args:
        grid: of a simulation.
        names: by partition.
        wait: seconds to wait for the nodes.

    Raises:
        UserError: the grid is of no simulation, or not all of its nodes answer.
    """

    def __init__(self, grid: Grid, names: Sequence[str], wait: float = 60.0) -> None:
        self.grid, self.names = grid, list(names)
        if not flower.is_simulated(grid):
            raise UserError(
                "These are no simulated nodes; give ReputationStrategy a Roster of their keys."
            )
        deadline = time.monotonic() + wait
        while len(nodes := list(grid.get_nodes())) < len(names) and time.monotonic() < deadline:
            time.sleep(0.2)  # in its first moments a simulation has no nodes
        questions = [
            Message(RecordDict(), node.node_id, PARTITION, group_id="partition") for node in nodes
        ]
        self._names = {
            reply.metadata.src_node_id: self.names[int(reply.content["partition"]["id"])]
            for reply in grid.send_and_receive(questions, timeout=300)
            if not reply.has_error()
        }
        if sorted(self._names.values()) != sorted(self.names):
            raise UserError(
                f"{len(self._names)} of {len(self.names)} simulated nodes have answered; give "
                "num_supernodes as many as there are participants."
            )

    def get_nodes(self) -> Iterable[Any]:
        return [
            flower.node_info(node.node_id, key_of(self._names[node.node_id]))
            for node in self.grid.get_nodes()
        ]

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(self, *facts: Any, **more: Any) -> Message:
        return self.grid.create_message(*facts, **more)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.grid.send_and_receive(messages, timeout=timeout)


def run_under_flower(config: FederateConfig, cores: int = 1) -> ReputationStrategy:
    """Run the honest participants of ``config`` as Ray actors, ``cores`` of them at a time.

    The rules are those of the options; training is one participant after another in each actor.

    Returns:
        the strategy after the last round.

    Raises:
        UserError: Ray is not installed, or the options ask for adversaries or a rule without
            reputations.
    """
    from dataclasses import replace

    from flwr.simulation import run_simulation

    rules = config.rules()
    if rules is None or config.adversaries:
        raise UserError(
            "Under Flower's simulation only honest participants and rules of reputation run; "
            "leave the attack out, or simulate in process."
        )
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Flower's simulation needs Ray; pip install 'flwr[simulation]', or simulate in process."
        ) from error
    config = replace(config, training="loop")
    here = simulate(config)
    names, finished = sorted(here.examples), []

    def main(grid: Grid, context: Context) -> None:
        strategy = ReputationStrategy(
            here.initial, rules, sizes=here.examples, minimum=len(names), wait=300
        )
        named = SimulatedGrid(grid, names)
        run_rounds(strategy, named, here.arrays, config.rounds, timeout=600, seed=config.seed)
        strategy.deliver(named)
        finished.append(strategy)

    server = ServerApp()
    server.main()(main)
    run_simulation(
        server,
        participants_of(config),
        num_supernodes=len(names),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": cores, "include_dashboard": False},
        },
    )
    return finished[0]


def participants_of(config: FederateConfig) -> ClientApp:
    """All participants as one app; which of them a node is, its partition says."""

    def mine(context: Context) -> ClientApp:
        import torch

        torch.set_num_threads(1)
        here = simulate(config)
        name = sorted(here.examples)[int(context.node_config["partition-id"])]
        return client_app(name, here.training, len(here.initial), here.examples[name])

    app = found_by(mine)

    @app.query("partition")
    def partition(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        content = RecordDict({"partition": ConfigRecord({"id": number})})
        return Message(content, reply_to=message)

    return app
