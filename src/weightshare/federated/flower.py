"""The one file that touches what Flower does not promise: task identity, serialisation, node info.

Written for Flower 1.41. Everything else here uses its public message API only.
"""

from typing import Any

from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Packed
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER = 1
"""Flower's own node id of the server side."""


def ensure_identity(run_id: int = 1) -> None:
    """Let messages be built outside a run that Flower has started; inside one, change nothing."""
    try:
        _ = TaskIdentity.run_id
    except RuntimeError:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER, 0


def to_bytes(message: Message) -> bytes:
    """As it goes over the wire."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def from_bytes(data: bytes) -> Message:
    """The message in ``data``.

    Raises:
        ValueError: the bytes are no message.
    """
    try:
        return message_from_proto(Packed.FromString(data))
    except Exception as error:
        # Malformed input raises whatever it meets first inside Flower and protobuf.
        raise ValueError(f"not a message: {type(error).__name__}") from error


def set_message_id(message: Message, identifier: str) -> None:
    """What the SuperLink does on the way."""
    message.metadata.__dict__["_message_id"] = identifier


def node_info(node_id: int, public_key: bytes) -> Any:
    """A node as ``grid.get_nodes()`` describes it."""
    return NodeInfo(node_id=node_id, public_key=public_key)


def empty_run(run_id: int = 1) -> Any:
    """What a grid must be able to show as its run."""
    return Run.create_empty(run_id)


def is_simulated(grid: Any) -> bool:
    """Whether the grid is that of Flower's simulation, in this process."""
    from flwr.superlink.grid import InMemoryGrid

    return isinstance(grid, InMemoryGrid)
