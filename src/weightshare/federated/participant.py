"""A participant: it applies its reward, trains, answers, and remembers its model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from weightshare.federated import wire
from weightshare.federated.attacks import Attack, Crowd, Situation
from weightshare.federated.grid import Reply
from weightshare.federated.local import Training
from weightshare.federated.vectors import Vector


@dataclass
class Memory:
    """What a participant keeps between messages."""

    model: Vector | None = None
    """Where the last local training started."""
    sent: Vector | None = None
    """The update it sent then."""
    reward: Vector | None = None
    """The last reward."""


def start_of(content: RecordDict, memory: Memory, dimension: int) -> Vector | None:
    """The weights to train from, written into ``memory``; None where they are lost.

    Either the server sends them, or they follow from what was kept; the checksum tells whether both
    sides mean the same.
    """
    facts = content["round"]
    if "model" in content:
        model = wire.read_vector(content["model"]["weights"], dimension)
    elif memory.model is None:
        return None
    else:
        memory.reward = wire.reward_in(content, dimension)
        model = wire.advance(memory.model, memory.sent, facts["scale"], memory.reward)
    if wire.checksum(model) != facts["checksum"]:
        return None
    memory.model, memory.sent = model, None
    return model


def found_by(find: Callable[[Context], ClientApp]) -> ClientApp:
    """One app for many participants: ``find`` makes the app of the one that a context is of."""
    app = ClientApp()

    @app.train("personal")
    def personal(message: Message, context: Context) -> Message:
        return find(context)(message, context)

    @app.query("reward")
    def reward(message: Message, context: Context) -> Message:
        return find(context)(message, context)

    return app


def client_app(
    name: str, training: Training, dimension: int, examples: int, folder: Path | None = None
) -> ClientApp:
    """The Flower app of one participant.

    Its memory lives in the context's state and, with ``folder``, on disk too, because a restarted
    SuperNode has lost its state. A participant that has lost both says so and is sent its model.

    Args:
        name: decides the order of its samples.
        training: what it does with a model.
        dimension: weights of the model.
        examples: samples it claims to Flower's own strategies.
        folder: where to keep the memory.
    """
    app = ClientApp()

    @app.train("personal")
    def personal(message: Message, context: Context) -> Message:
        memory = _recall(context, folder)
        number = message.content["round"]["round"]
        start = start_of(message.content, memory, dimension)
        if start is None:
            return Message(wire.lost(number), reply_to=message)
        memory.sent = training.train({name: start}, number)[name] - start
        _keep(memory, context, folder)
        check = message.content["round"]["checksum"]
        return Message(wire.answer(memory.sent, number, check), reply_to=message)

    @app.query("reward")
    def reward(message: Message, context: Context) -> Message:
        memory = _recall(context, folder)
        start_of(message.content, memory, dimension)
        _keep(memory, context, folder)
        return Message(RecordDict(), reply_to=message)

    @app.train()
    def plain(message: Message, context: Context) -> Message:
        start = wire.read_vector(message.content["arrays"]["weights"], dimension)
        number = int(message.content["config"]["server-round"])
        trained = training.train({name: start}, number)[name]
        return Message(_plain_answer(trained, examples), reply_to=message)

    return app


def _plain_answer(weights: Vector, examples: float, loss: float | None = None) -> RecordDict:
    metrics = {"num-examples": float(examples)} | ({} if loss is None else {"train_loss": loss})
    return RecordDict(
        {
            "arrays": ArrayRecord({"weights": wire.array(weights)}),
            "metrics": MetricRecord(metrics),
        }
    )


def _recall(context: Context, folder: Path | None) -> Memory:
    if "memory" in context.state:
        arrays = context.state["memory"]
        return Memory(**{key: arrays[key].numpy() for key in arrays})
    path = folder / "participant.safetensors" if folder else None
    if path is not None and path.exists():
        from safetensors.numpy import load_file

        return Memory(**load_file(path))
    return Memory()


def _keep(memory: Memory, context: Context, folder: Path | None) -> None:
    kept = {
        key: np.ascontiguousarray(value) for key, value in vars(memory).items() if value is not None
    }
    context.state["memory"] = ArrayRecord({key: wire.array(value) for key, value in kept.items()})
    if folder is not None:
        from safetensors.numpy import save_file

        from weightshare.report.store import replacing

        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "participant.safetensors") as fresh:
            save_file(kept, fresh)


@dataclass
class Cohort:
    """All participants of a simulated federation, honest and not, answering in one process.

    ``answer`` is what an ``InProcessGrid`` asks for. All are trained in one go; then the
    adversaries, who see this round's honest updates, replace theirs.

    Args:
        training: trains any of them.
        dimension: weights of the model.
        examples: samples of each participant, by name.
        attacks: of the adversaries, by name.
        seed: of what adversaries draw.
        loss: of (name, weights) on the participant's own samples, where a strategy of Flower's asks
            for it.
    """

    training: Training
    dimension: int
    examples: Mapping[str, int]
    attacks: Mapping[str, Attack] = field(default_factory=dict)
    seed: int = 0
    loss: Callable[[str, Vector], float] | None = None
    memories: dict[str, Memory] = field(default_factory=dict)

    def answer(self, deliveries: Sequence[tuple[str, Message]]) -> Iterable[tuple[str, Reply]]:
        """The replies of everyone who was sent something."""
        starts: dict[str, Vector] = {}
        number = 0
        for name, message in deliveries:
            kind, content = message.metadata.message_type, message.content
            memory = self.memories.setdefault(name, Memory())
            if kind == wire.PLAIN:
                number = int(content["config"]["server-round"])
                starts[name] = wire.read_vector(content["arrays"]["weights"], self.dimension)
            else:
                number = int(content["round"]["round"])
                start = start_of(content, memory, self.dimension)
                if start is not None and kind == wire.TRAIN:
                    starts[name] = start
        trained = self.training.train(self._to_train(starts), number)
        updates = {
            name: trained[name] - start if name in trained else np.zeros_like(start)
            for name, start in starts.items()
        }
        honest = Crowd([updates[name] for name in sorted(updates) if name not in self.attacks])
        for name, message in deliveries:
            yield name, self._reply(name, message, number, starts, updates, honest)

    def _to_train(self, starts: Mapping[str, Vector]) -> dict[str, Vector]:
        """Without the adversaries whose own update has no part in what they send."""
        spared = {"never"} if starts.keys() <= self.attacks.keys() else {"never", "alone"}
        return {
            name: start
            for name, start in starts.items()
            if name not in self.attacks or self.attacks[name].needs not in spared
        }

    def _reply(
        self,
        name: str,
        message: Message,
        number: int,
        starts: Mapping[str, Vector],
        updates: Mapping[str, Vector],
        honest: Crowd,
    ) -> Message:
        if message.metadata.message_type == wire.REWARD:
            return Message(RecordDict(), reply_to=message)
        if name not in starts:
            return Message(wire.lost(number), reply_to=message)
        memory, update, examples = self.memories[name], updates[name], float(self.examples[name])
        if name in self.attacks:
            attack = self.attacks[name]
            with np.errstate(over="ignore", invalid="ignore"):
                update = attack.transform(update, self._situation(name, number, honest, memory))
            examples *= attack.claims
        if message.metadata.message_type == wire.PLAIN:
            loss = self.loss(name, starts[name]) if self.loss else None
            return Message(_plain_answer(starts[name] + update, examples, loss), reply_to=message)
        memory.sent = update
        check = message.content["round"]["checksum"]
        return Message(wire.answer(update, number, check), reply_to=message)

    def _situation(self, name: str, number: int, honest: Crowd, memory: Memory) -> Situation:
        own = int.from_bytes(name.encode(), "little") % 2**32
        return Situation(
            number,
            np.random.default_rng([self.seed, number, own]),
            np.random.default_rng([self.seed, 1]),
            honest,
            memory.reward,
        )
