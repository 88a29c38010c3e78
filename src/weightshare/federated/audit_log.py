"""What the server has decided, line by line, for people: appended to and never rewritten."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightshare.federated.reputation import Assessment
from weightshare.federated.rewards import bytes_of
from weightshare.federated.standing import Standing


class AuditLog:
    """Events as JSON lines in ``path``, or in memory where it is None."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []

    def add(self, event: str, **facts: Any) -> None:
        """Append one event."""
        row = {"event": event, **facts}
        if self.path is None:
            self._rows.append(row)
            return
        from weightshare.report.store import append_line, cut_half_line

        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif event == "restored":
            cut_half_line(self.path)  # a killed server may have left one
        append_line(self.path, row)

    def judgement(self, judged: Assessment, standing: Standing, entries: Mapping[str, int]) -> None:
        """A line for everyone who was judged in a round, and for what else it has led to."""
        size = len(judged.aggregate)
        for name, quota in judged.quotas.items():
            count = entries[name]
            self.add(
                "judged",
                round=judged.round,
                name=name,
                cosine=judged.cosines[name],
                reputation=judged.reputation[name],
                quota=quota,
                entries=count,
                bytes=bytes_of(count, size),
            )
        for event in ("expelled", "would_expel"):
            for name in getattr(judged, event):
                record = standing.expelled.get(name, {})
                self.add(
                    event,
                    round=judged.round,
                    name=name,
                    reputation=record.get("reputation", judged.reputation.get(name)),
                    threshold=judged.threshold,
                )
        for name in judged.turned:
            self.add("turned", round=judged.round, name=name, fall=standing.falls.get(name))
        for group in judged.copies:
            self.add("copies", round=judged.round, names=list(group))

    def rows(self, event: str | None = None) -> list[dict[str, Any]]:
        """The events so far, or those of one kind."""
        if self.path is None:
            rows = self._rows
        else:
            from weightshare.report.store import read_lines

            rows = read_lines(self.path)
        return [row for row in rows if event is None or row["event"] == event]
