"""Files that are whole or absent, and JSON that every reader accepts."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from weightshare.errors import UserError

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_NEW, _OLD = ".new.", ".old."


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its place when the block succeeds.

    The block writes a file or a folder there. The sibling keeps the suffix, because some writers
    append one that is missing. When the block fails, ``path`` is as it was. A full disk raises
    :class:`UserError`.
    """
    path = Path(path)
    fresh, stale = path.with_name(_NEW + path.name), path.with_name(_OLD + path.name)
    _remove(fresh)
    try:
        with room(path):
            yield fresh
            if fresh.is_file():
                _sync(fresh)
    except BaseException:
        _remove(fresh)
        raise
    if path.is_dir() or (fresh.is_dir() and path.exists()):
        # No portable call swaps a folder for another: for an instant only the stale name exists,
        # and `recover` puts it back if the process dies there.
        _remove(stale)
        os.replace(path, stale)
        os.replace(fresh, path)
        _remove(stale)
    else:
        os.replace(fresh, path)


def recover(folder: Path) -> None:
    """Undo what a process killed inside :func:`replacing` left behind in ``folder``."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.name.startswith(_OLD):
            path = entry.with_name(entry.name.removeprefix(_OLD))
            if path.exists():
                _remove(entry)
            else:
                os.replace(entry, path)
        elif entry.name.startswith(_NEW):
            _remove(entry)


@contextmanager
def room(path: Path) -> Iterator[None]:
    """Turn a full disk (or a file size limit) met while writing ``path`` into a ``UserError``."""
    try:
        yield
    except Exception as error:
        if not _disk_full(error):
            raise
        raise UserError(
            f"{path} could not be written because the disk is full or a size limit was reached; "
            "free some space or choose another folder with --out, then go on with --resume."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as strict, indented JSON; see :func:`plain` for what is accepted."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_line(path: Path, value: Any) -> None:
    """Append ``value`` as one line of JSON; a line that could not be finished is taken back."""
    line = to_line(value)
    size = path.stat().st_size if path.exists() else 0
    try:
        with room(path), path.open("ab") as file:
            file.write(line.encode())
    except UserError:
        os.truncate(path, size)
        raise


def to_line(value: Any) -> str:
    """Return ``value`` as one line of strict JSON."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[Any]:
    """Read JSON lines; a last line without its newline was being written when the writer died."""
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def cut_half_line(path: Path) -> None:
    """Drop a half-written last line from the file itself, so that appending stays safe."""
    if path.exists():
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(path, whole)


def name_nonfinite(value: float) -> str:
    """Name a number JSON lacks, as ``float`` reads it: ``NaN``, ``Infinity``, ``-Infinity``."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def plain(value: Any, nonfinite: Callable[[float], Any] = name_nonfinite) -> Any:
    """Turn ``value`` into what strict JSON can hold.

    Dataclasses and mappings become objects (keys as strings), sequences, arrays and tensors become
    lists, sets sorted lists, paths and enumerations their text and value; NumPy and PyTorch scalars
    become numbers. Numbers that are not finite go through ``nonfinite``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain(value.value, nonfinite)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else nonfinite(value)
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name), nonfinite) for field in fields}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item, nonfinite) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((plain(item, nonfinite) for item in value), key=repr)
    if isinstance(value, list | tuple):
        return [plain(item, nonfinite) for item in value]
    if hasattr(value, "tolist"):
        # NumPy and PyTorch share this method; asking for it imports neither.
        return plain(value.tolist(), nonfinite)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def _disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # safetensors reports the code in its text only, NumPy's tofile a short count.
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code:
        return int(code[1]) in _FULL
    return re.search(r"\d+ requested and \d+ written", str(error)) is not None


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
