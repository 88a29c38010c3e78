"""RFFL as a strategy of Flower's message API: one personal message per participant."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from weightshare.errors import UserError
from weightshare.federated import flower, survival, wire
from weightshare.federated.audit_log import AuditLog
from weightshare.federated.conduct import Conduct
from weightshare.federated.config import ReputationConfig
from weightshare.federated.examination import examine
from weightshare.federated.grid import WithoutNetwork
from weightshare.federated.payout import Payout, payout_of
from weightshare.federated.repeats import Repeats
from weightshare.federated.reputation import Assessment, assess
from weightshare.federated.roster import Roster, online
from weightshare.federated.standing import Standing, admit, missed, without
from weightshare.federated.vectors import Vector

Root = Callable[[Vector, int], Vector]
"""An update computed by the server from trusted data: (weights, round) -> (D,)."""


class ReputationStrategy(Strategy):
    """Reputation, rewards and removal of RFFL over any Flower grid.

    Round t: each live participant is sent its own reward of round t - 1 (or its model, where it has
    none) and answers with an update. Replies are checked before anything is computed with them; one
    that fails is dropped, the sender gets a strike, and the round is what it would have been
    without. The server keeps every participant's exact model, ``w_0 + Σ (g_i + v_i)``, and sends
    that, never the server's own, to whoever has lost it.

    Participants are the names of the roster; a node is who its key says. Only the in-process grid
    does without a roster.

    Args:
        initial: ``w_0``, ``(D,)`` float32.
        config: the rules.
        roster: names and key fingerprints.
        sizes: samples of each participant, as the server has verified them.
        layers: sizes of the model's tensors, for quotas by layer.
        root: trusted updates, to compare with instead of the aggregate.
        passes: whether a model, ``(D,)``, passes the examination at the end of the probation.
        folder: where the models and the audit log are kept; None keeps them in memory.
        minimum: nodes to wait for before a round.
        wait: seconds to wait for them.
        strikes: invalid replies after which a participant is suspended.
        resyncs: times a participant may ask for its model.
        sleep: how waiting is done.
    """

    def __init__(
        self,
        initial: Vector,
        config: ReputationConfig | None = None,
        roster: Roster | None = None,
        *,
        sizes: Mapping[str, float] | None = None,
        layers: Sequence[int] | None = None,
        root: Root | None = None,
        passes: Callable[[Vector], bool] | None = None,
        folder: Path | None = None,
        minimum: int = 1,
        wait: float = 60.0,
        strikes: int = 3,
        resyncs: int = 3,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        flower.ensure_identity()
        initial = np.asarray(initial)
        if initial.dtype != np.float32 or initial.ndim != 1 or not len(initial):
            raise UserError(
                f"The initial weights are {initial.dtype} of shape {initial.shape}; give one flat "
                "float32 vector."
            )
        if not np.isfinite(initial).all():
            raise UserError("The initial weights are not finite; give a model that computes.")
        self.config = config or ReputationConfig()
        if self.config.quota == "layer" and sum(layers or ()) != len(initial):
            raise UserError(
                f"Quotas by layer need the sizes of the tensors, which sum to {sum(layers or ())} "
                f"and not to the {len(initial)} weights; give layers."
            )
        if self.config.probation and passes is None:
            raise UserError(
                "A probation ends with an examination on trusted samples; give passes, or a "
                "probation of 0."
            )
        self.passes = passes
        self.layers = layers if self.config.quota == "layer" else None
        self.roster, self.sizes, self.root, self.folder = roster, sizes, root, folder
        self.minimum, self.wait, self.sleep = minimum, wait, sleep
        self.conduct = Conduct(strikes, resyncs)
        self.initial = initial
        self.server = initial.copy()
        """``w_0 + Σ a``: for evaluation and late joiners' comparison, never sent to anyone."""
        self.standing = Standing()
        self.log = AuditLog(folder / "audit.jsonl" if folder else None)
        self.last: Assessment | None = None
        """How the last round was judged."""
        self.names: list[str] = []
        self.models: NDArray[np.float32] = np.zeros((0, len(initial)), np.float32)
        """Exact model of each participant, ``(N, D)``, in the order of ``names``."""
        self._payout = Payout()
        self._stale: set[str] = set()  # who must be sent the whole model
        self._tickets: dict[int, wire.Ticket] = {}
        self.repeats = Repeats(len(initial))
        self.extra: dict[str, NDArray[Any]] = {}
        self._bytes = 0
        if roster is not None:
            self._begin(roster)

    # Flower's hooks -----------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per live participant that is online."""
        nodes = self._online(grid)
        number = self.standing.round + 1
        self._tickets, self._bytes, messages = {}, 0, []
        for node, name in nodes:
            if name in self.removed:
                continue
            ticket = self._ticket(name, number)
            # Whoever is inactive is only asked whether it is there: an answer brings it back.
            asked = name in self.standing.inactive
            content = wire.order(ticket) if asked else self._order(ticket)
            self._tickets[node] = ticket
            self._bytes += wire.payload(content)
            messages.append(Message(content, node, wire.TRAIN, group_id=str(number)))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judge the round; ``self.last`` says how. Arrays are never returned: there is no one
        model."""
        number = self.standing.round + 1
        updates = self._updates(replies)
        # Whoever has not answered may or may not have had its reward: the model settles it.
        self._stale = set(self.names) - updates.keys()
        self._payout = Payout()
        present = {n: u for n, (u, _) in updates.items() if n in self.standing.reputation}
        if present:
            reference = self.root(self.server, number) if self.root else None
            self.standing, self.last = assess(
                self.standing,
                present,
                self.config,
                sizes=self.sizes,
                reference=reference,
                squares={name: square for name, (_, square) in updates.items()},
            )
            self._settle(present, self.last)
        else:
            self.standing, self.last = missed(self.standing, self.config), None
            self.log.add("void", round=number)
        for name in updates.keys() & self.standing.inactive.keys():
            self._return(name)
        return None, MetricRecord(
            {
                "round": number,
                "asked": len(self._tickets),
                "answered": len(present),
                "live": len(self.standing.reputation),
                "expelled": len(self.standing.expelled),
                "below-threshold": len(self.last.below) if self.last else 0,
                "bytes-sent": self._bytes,
                "bytes-received": 4 * len(self.initial) * len(present),
            }
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: participants evaluate their own models."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        """Nothing: the audit log says more than Flower's."""

    def deliver(self, grid: Grid, timeout: float = 600.0) -> int:
        """Send everyone the reward of the last round, which no further training message carries.

        Returns:
            how many confirmed it.
        """
        live, number = self.standing.reputation, self.standing.round
        asked = {node: name for node, name in self._online(grid) if name in live}
        messages = [
            Message(self._order(self._ticket(name, number)), node, wire.REWARD, group_id="reward")
            for node, name in asked.items()
        ]
        replies = grid.send_and_receive(messages, timeout=timeout)
        heard = {asked[r.metadata.src_node_id] for r in replies if not r.has_error()}
        # Nothing is owed any more; whoever has not confirmed is sent its model if it goes on.
        self._payout = Payout()
        self._stale = set(self.names) - heard
        return len(heard)

    # What an operator asks ----------------------------------------------------------------------

    @property
    def removed(self) -> set[str]:
        """Who takes no part any more: expelled, or suspended for its conduct."""
        return {*self.standing.expelled, *self.conduct.suspended}

    def model_of(self, name: str) -> Vector:
        """A participant's exact model, ``(D,)``; UserError where the roster does not have it."""
        return self._model(name).copy()

    def reward_of(self, name: str) -> Vector | None:
        """The reward that the next message brings, ``(D,)``; None where there is none."""
        self._row(name)
        return self._payout.reward_of(name)

    def statement(self, name: str) -> list[dict[str, Any]]:
        """What a participant was sent and how it was judged, round by round."""
        self._row(name)
        return [
            {
                key: row[key]
                for key in ("round", "cosine", "reputation", "quota", "entries", "bytes")
            }
            for row in self.log.rows("judged")
            if row["name"] == name
        ]

    def readmit(self, name: str) -> None:
        """Let a wrongly removed or suspended participant in again, at the threshold.

        Raises:
            UserError: it is not in the roster, or was never out.
        """
        self._row(name)
        if name in self.standing.reputation:
            raise UserError(f"{name!r} takes part already; there is nothing to readmit.")
        self.conduct.pardon(name)
        self._return(name, "readmitted")

    # Survival -----------------------------------------------------------------------------------

    def save(
        self, folder: Path, keep: int = 2, extra: Mapping[str, NDArray[Any]] | None = None
    ) -> Path:
        """Write a checkpoint, whole or not at all, after a round and before the next message.

        ``extra`` are arrays of the caller's that ``restore`` leaves in ``self.extra``.
        """
        return survival.save(self, folder, keep, extra or {})

    def restore(self, folder: Path) -> int:
        """Go on from the newest checkpoint; returns its round, 0 where there is none.

        Everyone is sent its exact model next, because a restarted run has new client states.

        Raises:
            UserError: the checkpoint is damaged, of other rules, participants or another model.
        """
        return survival.restore(self, folder)

    # Inside -------------------------------------------------------------------------------------

    def _begin(self, roster: Roster) -> None:
        self.roster = roster
        names = sorted(roster.fingerprints)
        if self.names:
            if self.names != names:
                raise UserError(
                    f"The checkpoint has the participants {', '.join(self.names)}, the grid has "
                    f"{', '.join(names)}; resume with the participants it was started with."
                )
            return
        self.names, self._stale = names, set(names)
        self.standing = Standing.begin(names, self.config, self.sizes)
        everyone = np.broadcast_to(self.initial, (len(names), len(self.initial)))
        self.models = survival.kept(self.folder, everyone)

    def _row(self, name: str) -> int:
        if name not in self.names:
            raise UserError(
                f"{name!r} is not in the roster ({', '.join(self.names)}); give one of these."
            )
        return self.names.index(name)

    def _model(self, name: str) -> Vector:
        return self.models[self._row(name)]

    def _ticket(self, name: str, number: int) -> wire.Ticket:
        return wire.Ticket(name, number, wire.checksum(self._model(name)))

    def _order(self, ticket: wire.Ticket) -> RecordDict:
        if ticket.name in self._stale:
            return wire.order(ticket, model=self._model(ticket.name))
        return self._payout.order(ticket)

    def _online(self, grid: Grid) -> list[tuple[int, str]]:
        if self.roster is None:
            if not isinstance(grid, WithoutNetwork):
                raise UserError(
                    "Outside the in-process grid a federation needs a roster, or anyone could take "
                    "part; give ReputationStrategy a Roster of the participants' keys."
                )
            self._begin(grid.roster)
        assert self.roster is not None
        return online(grid, self.roster, self.minimum, self.wait, self.sleep)

    def _updates(self, replies: Iterable[Message]) -> dict[str, tuple[Vector, float]]:
        """The valid updates and their squared norms by participant; the rest is noted."""
        updates: dict[str, tuple[Vector, float]] = {}
        heard: set[str] = set()
        for reply in replies:
            ticket = self._tickets.get(reply.metadata.src_node_id)
            if ticket is None or ticket.name in heard:
                self.log.add("stray", round=self.standing.round + 1)
                continue
            heard.add(ticket.name)
            try:
                longest = self.config.longest * self.config.norm
                update = wire.read_update(reply, ticket, len(self.initial), longest)
            except wire.Rejected as reason:
                self._strike(ticket, str(reason))
                continue
            if update is None:
                self._lost(ticket)
                continue
            updates[ticket.name] = update
            for what in self.repeats.found(ticket.name, update[0]):
                self.log.add("repeats", round=ticket.round, name=ticket.name, what=what)
        return updates

    def _strike(self, ticket: wire.Ticket, reason: str) -> None:
        count, enough = self.conduct.strike(ticket.name)
        self.log.add("rejected", round=ticket.round, name=ticket.name, reason=reason, strike=count)
        if enough:
            self._suspend(ticket, "too many invalid replies")

    def _lost(self, ticket: wire.Ticket) -> None:
        if ticket.name in self.standing.inactive:
            self._return(ticket.name)
            return
        count, enough = self.conduct.resync(ticket.name)
        self.log.add("resync", round=ticket.round, name=ticket.name, count=count)
        if enough:
            self._suspend(ticket, "its model was asked for too often")

    def _suspend(self, ticket: wire.Ticket, reason: str) -> None:
        if len(self.standing.reputation) <= 1 or ticket.name not in self.standing.reputation:
            return
        self.standing = without(self.standing, ticket.name)
        self.conduct.suspended.add(ticket.name)
        self.log.add("suspended", round=ticket.round, name=ticket.name, reason=reason)

    def _return(self, name: str, event: str = "returned") -> None:
        self.standing = admit(self.standing, name, self.config)
        self._stale.add(name)
        share = self.standing.reputation[name]
        self.log.add(event, round=self.standing.round, name=name, reputation=share)

    def _settle(self, updates: Mapping[str, Vector], judged: Assessment) -> None:
        """Rewards, and with them every participant's next model."""
        self.server = self.server + judged.aggregate
        self._payout = payout_of(updates, judged, self.config, self.layers)
        for name in judged.quotas:
            row, scale = self._row(name), self._payout.scales[name]
            reward = self._payout.reward_of(name)
            self.repeats.pay(name, reward)
            self.models[row] = wire.advance(self.models[row], updates[name], scale, reward)
        entries = {name: self._payout.count(name) for name in judged.quotas}
        self.log.judgement(judged, self.standing, entries)
        if judged.round == self.config.probation:
            self._end_probation()

    def _end_probation(self) -> None:
        assert self.passes is not None
        live = self.standing.reputation
        models = {name: self._model(name) for name in live}
        found = examine(models, live, self.config.threshold / len(live), self.passes)
        self.standing = replace(self.standing, reputation=found.reputation)
        self.log.add("examined", round=self.standing.round, failed=list(found.failed))
        if found.model is not None:
            self.server = found.model
            for name in found.entitled:
                self.models[self._row(name)] = found.model
                self._stale.add(name)
