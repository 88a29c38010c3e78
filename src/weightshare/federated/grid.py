"""A Flower grid in this process: the same messages, as bytes, without Ray, sockets or daemons."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from weightshare.federated import flower, wire
from weightshare.federated.roster import Roster

Reply: TypeAlias = Message | bytes | None
Answer = Callable[[Sequence[tuple[str, Message]]], Iterable[tuple[str, Reply]]]
"""What participants do with the messages of a round: (name, message) in, (name, reply) out."""


class WithoutNetwork(Grid):
    """A grid whose nodes nobody else can reach: it names them itself, and they need no keys."""

    names: list[str]

    @property
    def roster(self) -> Roster:
        """A key for each name."""
        return Roster.of_keys({name: key_of(name) for name in self.names})


class InProcessGrid(WithoutNetwork):
    """Every message goes through its protobuf bytes both ways, as it would on a network.

    Like a SuperLink, the grid sets message ids itself and drops a reply whose source, addressee,
    round or message is not what it must be; unlike one, it is done when ``answer`` is.

    Args:
        names: the participants; each is a node whose key is derived from its name.
        answer: see ``Answer``; ``each_app`` makes one of ClientApps.
        as_bytes: without, messages are handed over as they are, and bytes are those of their
            arrays. For participants of our own only: a stranger's object may be anything.
    """

    def __init__(self, names: Iterable[str], answer: Answer, as_bytes: bool = True) -> None:
        flower.ensure_identity()
        self.names = sorted(names)
        self.answer, self.as_bytes = answer, as_bytes
        self.offline: set[str] = set()
        """Participants that cannot be reached at the moment."""
        self.sent_bytes = self.received_bytes = self.dropped = 0
        self._run = flower.empty_run()
        self._ids = {name: _node_id(name) for name in self.names}
        self._replies: dict[str, Message] = {}
        self._count = 0

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [self._ids[name] for name in self.names if name not in self.offline]

    def get_nodes(self) -> Iterable[Any]:
        return [
            flower.node_info(self._ids[name], key_of(name))
            for name in self.names
            if name not in self.offline
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver the messages and keep the replies until they are pulled."""
        names = {node: name for name, node in self._ids.items()}
        deliveries, open_ = [], {}
        for message in messages:
            self._count += 1
            identifier = hashlib.sha256(str(self._count).encode()).hexdigest()
            delivered = message
            if self.as_bytes:
                data = flower.to_bytes(message)
                self.sent_bytes += len(data)
                delivered = flower.from_bytes(data)
            else:
                self.sent_bytes += wire.payload(message.content)
            flower.set_message_id(delivered, identifier)
            name = names[message.metadata.dst_node_id]
            open_[name] = delivered.metadata
            if name not in self.offline:
                deliveries.append((name, delivered))
        for name, reply in self.answer(deliveries):
            if reply is None:
                continue
            received = self._received(reply, name, open_.get(name))
            if received is None:
                self.dropped += 1
            else:
                self._replies[received.metadata.reply_to_message_id] = received
        return [metadata.message_id for metadata in open_.values()]

    def _unpacked(self, reply: Message | bytes) -> Message | None:
        if isinstance(reply, Message) and not self.as_bytes:
            self.received_bytes += wire.payload(reply.content) if reply.has_content() else 0
            return reply
        data = reply if isinstance(reply, bytes) else flower.to_bytes(reply)
        self.received_bytes += len(data)
        try:
            return flower.from_bytes(data)
        except ValueError:
            return None

    def _received(self, packed: Message | bytes, name: str, order: Any) -> Message | None:
        """The reply, where it is what ``name`` was asked for, and the first."""
        reply = self._unpacked(packed)
        if reply is None:
            return None
        facts = reply.metadata
        if (
            order is None
            or facts.src_node_id != self._ids[name]
            or facts.dst_node_id != order.src_node_id
            or facts.reply_to_message_id != order.message_id
            or facts.group_id != order.group_id
            or facts.run_id != order.run_id
            or facts.message_type != order.message_type
            or order.message_id in self._replies
            or not (reply.has_content() or reply.has_error())
        ):
            return None
        self._count += 1
        flower.set_message_id(reply, hashlib.sha256(str(self._count).encode()).hexdigest())
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def each_app(apps: Mapping[str, ClientApp]) -> Answer:
    """Participants that are ClientApps, called one after another, each with a state of its own."""
    contexts = {
        name: Context(1, _node_id(name), {"partition-id": number}, RecordDict(), {})
        for number, name in enumerate(sorted(apps))
    }

    def answer(deliveries: Sequence[tuple[str, Message]]) -> Iterable[tuple[str, Reply]]:
        for name, message in deliveries:
            try:
                reply = apps[name](message, contexts[name])
            except Exception as error:
                # A SuperNode reports its app's failure just so, and the round goes on without it.
                reply = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)
            yield name, reply

    return answer


def key_of(name: str) -> bytes:
    """The key that stands for a name where there is no network."""
    return b"in process: " + name.encode()


def _node_id(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little") + 2
