"""Results kept one by one, so that a killed loop over many repeats at most the last."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightshare.report.codecs import dumps, loads
from weightshare.report.store import append_line, cut_half_line, plain, read_lines


class Memo:
    """Call ``memo(key, compute)``: the stored result of ``key``, or ``compute()``, stored.

    ``key`` is anything JSON can hold (a name, a list of removed blocks); results likewise. What is
    returned has always been through JSON, so that a resumed run sees what the first one saw: tuples
    are lists, keys are strings, floats are exact. ``path`` is an append-only file of one result a
    line.
    """

    def __init__(self, path: Path):
        self.path = path
        cut_half_line(path)
        self._known = {line["key"]: line["value"] for line in read_lines(path)}

    def __call__(self, key: Any, compute: Callable[[], Any]) -> Any:
        name = json.dumps(plain(key), sort_keys=True, ensure_ascii=False)
        if name not in self._known:
            value = dumps(compute())
            append_line(self.path, {"key": name, "value": value})
            self._known[name] = value
        return loads(self._known[name])

    def __len__(self) -> int:
        return len(self._known)
