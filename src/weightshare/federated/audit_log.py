"""What the server has decided, line by line, for people: appended to and never rewritten."""

from pathlib import Path
from typing import Any


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

    def rows(self, event: str | None = None) -> list[dict[str, Any]]:
        """The events so far, or those of one kind."""
        if self.path is None:
            rows = self._rows
        else:
            from weightshare.report.store import read_lines

            rows = read_lines(self.path)
        return [row for row in rows if event is None or row["event"] == event]
