"""A run directory: configuration, metrics, results of long stages, artefacts, summary, report."""

import copy
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import yaml

import weightshare
from weightshare.errors import UserError
from weightshare.report import store
from weightshare.report.codecs import JSON, Codec
from weightshare.report.environment import best_device, environment
from weightshare.report.memo import Memo
from weightshare.report.page import write_report
from weightshare.report.redaction import redact, redact_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HARMLESS = frozenset(
    {"out", "resume", "overwrite", "dry_run", "log_with", "progress", "quiet", "verbose"}
)
"""Options that may change when a run is resumed, because no result depends on them."""

_FOLDERS = ("stages", "tables", "figures", "texts", "checkpoints")
_LOCK = ".lock"
_SAVE_SECONDS = 10.0  # how much of `seconds.total` a killed run may lose


class Run:
    """One run and the folder it leaves behind. Open it with :meth:`open`, in a ``with`` block.

    ``path`` is the folder, ``path / "checkpoints"`` is ``checkpoints``. Everything is written to a
    temporary name and renamed, but for ``metrics.jsonl`` and memos, which grow by a line. Leaving
    the block without an exception marks the run finished and writes ``report.html``; an exception
    passes through unchanged, and summary and report say ``unfinished`` and its name; but input
    that is refused (:class:`UserError`) before anything was kept leaves no folder behind.
    ``resumed`` tells whether an earlier session was found. One process opens a run: of several
    ranks, the first.
    """

    def __init__(self, path: Path, summary: dict[str, Any], lock: BinaryIO, resumed: bool):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.resumed = resumed
        self.listeners: list[Callable[[int, dict[str, Any]], object]] = []
        """Also told of everything that is logged, as (step, scalars)."""
        self._summary = summary
        self._lock = lock
        self._earlier = float(summary["seconds"]["total"])
        self._started = self._saved = time.monotonic()
        contents = path / "contents.json"
        self._contents: list[dict[str, Any]] = (
            store.read_json(contents) if contents.exists() else []
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Any,
        command: str = "run",
        resume: bool = False,
        harmless: Iterable[str] = (),
        overwrite: bool = False,
    ) -> Self:
        """Create the run directory ``path``, or with ``resume`` go on in the one that is there.

        ``config`` is a (nested) dataclass or mapping; it is kept in ``config.yaml`` without its
        secrets. Its ``seed`` and ``device`` are copied into the summary. A resumed run must have
        the configuration it started with, but for :data:`HARMLESS` and the names in ``harmless``.
        ``resume`` with nothing at ``path`` starts afresh, so that a job can be queued again
        unchanged. ``overwrite`` removes a run that is there; anything else at ``path`` stays and is
        refused as ever.

        Raises :class:`UserError` when ``path`` is a file, cannot be written, is used by another
        process, holds a run and ``resume`` is false, or holds another run than the one resumed.
        """
        path = Path(path)
        options = redact_options(store.plain(config))
        if overwrite and not resume and (path / "summary.json").is_file():
            _claim(path).close()
            shutil.rmtree(path)
        lock = _claim(path)
        try:
            file = path / "summary.json"
            old = store.read_json(file) if file.exists() else {}
            if old:
                _check_resumable(path, old, command, options, resume, HARMLESS | set(harmless))
            store.recover(path)
            for folder in _FOLDERS:
                (path / folder).mkdir(exist_ok=True)
                store.recover(path / folder)
            # A report of an earlier session must not outlive a failure of this one.
            (path / "report.html").unlink(missing_ok=True)
            store.cut_half_line(path / "metrics.jsonl")
            run = cls(path, {**_first_summary(options, command), **old}, lock, bool(old))
            run._summary.pop("stopped_by", None)
            run._summary |= {"finished": False, "version": weightshare.__version__}
            run._write_summary()
            store.write_text(path / "config.yaml", _yaml(options))
            store.write_json(path / "environment.json", redact_options(store.plain(environment())))
        except BaseException:
            lock.close()
            raise
        return run

    def log(self, step: int, **scalars: Any) -> None:
        """Append ``{"step": step, **scalars}`` to ``metrics.jsonl``; NaN and infinities as text."""
        store.append_line(self.path / "metrics.jsonl", {"step": int(step), **scalars})
        for listen in self.listeners:
            listen(int(step), scalars)
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self._write_summary()

    def truncate(self, step: int) -> None:
        """Drop the metrics logged after ``step``, as resuming from a checkpoint must."""
        path = self.path / "metrics.jsonl"
        rows = [row for row in store.read_lines(path) if row["step"] <= step]
        store.write_text(path, "".join(store.to_line(row) for row in rows))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows logged so far."""
        return store.read_lines(self.path / "metrics.jsonl")

    def rows(self, name: str, rows: Iterable[Mapping[str, Any]], caption: str = "") -> None:
        """Keep a table (one mapping a row, columns in order of appearance) for the report."""
        table = {"caption": caption, "rows": store.plain(list(rows))}
        store.write_json(self._file("tables", name, ".json"), redact(table))
        self._show("table", name)

    def stage(self, name: str, compute: Callable[[], Any], codec: Codec = JSON) -> Any:
        """Return the stored result of ``name``; if there is none, compute and store it first.

        For long work outside the training loop. What is returned has always been read from the
        file, so a resumed run goes on with exactly what the first one had. Use :meth:`memo` inside
        ``compute`` where losing the whole stage to a kill would hurt.
        """
        path = self._file("stages", name, getattr(codec, "suffix", ""))
        if not path.exists():
            value = compute()
            with store.replacing(path) as fresh:
                codec.write(fresh, value)
            self._write_summary()
        return codec.read(path)

    def memo(self, name: str) -> Memo:
        """Return a store of results by key, of which a kill loses at most the one in progress.

        ``memo(key, compute)`` inside a stage keeps the pieces of a long ranking.
        """
        return Memo(self._file("stages", name, ".memo.jsonl"))

    def save(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Let ``writer`` fill a temporary path (file or folder), then name it ``path / name``."""
        path = self._file("", name, "")
        with store.replacing(path) as fresh:
            writer(fresh)
        return path

    def figure(self, name: str, figure: "Figure", caption: str = "") -> None:
        """Keep a matplotlib figure as ``figures/NAME.svg`` and show it in the report."""
        from weightshare.report.svg import svg

        store.write_text(self._file("figures", name, ".svg"), redact(svg(figure)))
        width, _ = figure.get_size_inches()
        self._show("figure", name, caption=redact(caption), wide=bool(width > 7))

    def text(self, name: str, title: str, content: str | Sequence[Mapping[str, str]]) -> None:
        """Keep prose (Markdown) or samples for the report.

        Samples are mappings from a label to a text and stand side by side; the first entry of each,
        the prompt, spans the row: ``[{"prompt": ..., "before": ..., "after": ...}, ...]``.
        """
        document = {"title": title, "content": store.plain(content)}
        store.write_json(self._file("texts", name, ".json"), redact(document))
        self._show("text", name)

    def key(self, label: str, value: Any, note: str = "") -> None:
        """Put a key figure at the head of the report: ``run.key("saved", "36 %", "of 134 M")``."""
        self._show("key", redact(label), value=redact(store.plain(value)), note=redact(note))

    def summary(self, **values: Any) -> dict[str, Any]:
        """Merge nested ``values`` into ``summary.json`` and return a copy of the whole."""
        _merge(self._summary, redact(store.plain(values)))
        self._write_summary()
        return copy.deepcopy(self._summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                self._stop(kind)
        finally:
            self._lock.close()

    def _finish(self) -> None:
        try:
            self._summary["finished"] = True
            self._write_summary()
            write_report(self.path)
        except BaseException as error:
            self._stop(type(error))
            raise

    def _stop(self, kind: type[BaseException]) -> None:
        if issubclass(kind, UserError) and not self.resumed and self._is_bare():
            # The corrected command must not meet a half-made run.
            shutil.rmtree(self.path, ignore_errors=True)
            return
        self._summary |= {"finished": False, "stopped_by": kind.__name__}
        # The exception on its way out is the one to see.
        with suppress(Exception):
            self._write_summary()
            write_report(self.path)

    def _is_bare(self) -> bool:
        """Whether the folder holds nothing but what opening it has written."""
        first = {_LOCK, "summary.json", "config.yaml", "environment.json", *_FOLDERS}
        return self.path.is_dir() and all(
            entry.name in first and not (entry.is_dir() and any(entry.iterdir()))
            for entry in self.path.iterdir()
        )

    def _write_summary(self) -> None:
        self._saved = time.monotonic()
        total = self._earlier + self._saved - self._started
        self._summary["seconds"]["total"] = round(total, 3)
        store.write_json(self.path / "summary.json", self._summary)

    def _show(self, kind: str, name: str, **details: Any) -> None:
        entry = {"kind": kind, "name": name, **details}
        same = [i for i, e in enumerate(self._contents) if (e["kind"], e["name"]) == (kind, name)]
        if same:
            self._contents[same[0]] = entry
        else:
            self._contents.append(entry)
        store.write_json(self.path / "contents.json", self._contents)

    def _file(self, folder: str, name: str, suffix: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", name, re.ASCII):
            raise ValueError(f"{name!r} cannot name a file: use letters, digits and . _ + -")
        return self.path / folder / (name + suffix)


def _claim(path: Path) -> BinaryIO:
    """Create the folder and hold it for this process; the lock goes when the process does."""
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{path} is a file, but a run needs a folder; choose another one with --out."
        )
    try:
        with store.room(path):
            path.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(path)
            lock = (path / _LOCK).open("ab")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({(error.strerror or str(error)).lower()}); "
            "choose another folder with --out."
        ) from error
    try:
        import fcntl

        # A record lock: forked data workers do not inherit it, so it dies with this process alone.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except (BlockingIOError, PermissionError) as error:
        lock.close()
        raise UserError(
            f"{path} is in use by another process; wait for it or choose another folder with --out."
        ) from error
    except OSError:
        pass  # a file system without locks
    return lock


def _refuse_foreign(path: Path) -> None:
    """Accept an empty folder, a run, and what a process killed while opening one leaves behind."""
    if (path / "summary.json").exists():
        return
    for entry in path.iterdir():
        empty = entry.name in _FOLDERS and entry.is_dir() and not any(entry.iterdir())
        if not empty and entry.name not in {_LOCK, ".new.summary.json"}:
            raise UserError(
                f"{path} holds other files and no run; choose an empty or new folder with --out."
            )


def _check_resumable(
    path: Path,
    old: dict[str, Any],
    command: str,
    options: dict[str, Any],
    resume: bool,
    harmless: Iterable[str],
) -> None:
    state = "a finished" if old.get("finished") else "an unfinished"
    if not resume:
        ways = {"resume": "go on with it by --resume", "overwrite": "replace it by --overwrite"}
        offered = [way for option, way in ways.items() if option in options][:1]
        raise UserError(
            f"{path} already holds {state} {old['command']} run; "
            f"{' or '.join([*offered, 'choose another folder with --out'])}."
        )
    if old["command"] != command:
        raise UserError(
            f"{path} holds {state} {old['command']} run, which {command} cannot resume; "
            "choose another folder with --out."
        )
    if not (path / "config.yaml").exists():
        return
    before = _flat(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {})
    now = _flat(yaml.safe_load(_yaml(options)) or {})
    names = sorted(
        name
        for name in before.keys() | now.keys()
        if before.get(name) != now.get(name)
        and name not in harmless
        and name.rpartition(".")[2] not in harmless
    )
    if names:
        changes = ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in names)
        raise UserError(
            f"{path} was started with other options ({changes}); resume it with the options in "
            "its config.yaml or choose another folder with --out."
        )


def _first_summary(options: dict[str, Any], command: str) -> dict[str, Any]:
    device = options.get("device")
    return {
        "command": command,
        "version": weightshare.__version__,
        "seed": options.get("seed"),
        "device": device if isinstance(device, str) and device != "auto" else best_device(),
        "seconds": {"total": 0.0},
        "finished": False,
    }


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = [_flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()]
        return {key: item for part in parts for key, item in part.items()}
    return {name: value}


def _yaml(options: dict[str, Any]) -> str:
    return yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=100)
