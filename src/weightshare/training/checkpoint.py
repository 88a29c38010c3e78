"""Checkpoints on disk: a numbered folder of safetensors and one JSON, whole or not there at all."""

import errno
import json
import mmap
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightshare.errors import UserError

FORMAT = 1
TENSORS, VALUES = "tensors.safetensors", "state.json"
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write ``folder/step-00000120`` and drop all but the newest ``keep`` checkpoints.

    Everything goes into a temporary sibling that is renamed when it is whole and on disk: a reader,
    a kill or a full disk never meets half a checkpoint. Tensors that are one tensor (tied
    parameters) are stored once.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    half = folder / f".{final.name}.writing"
    with _room_for(final):
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        try:
            unique, same = _once(tensors)
            save_file(unique, half / TENSORS)
            content = {"format": FORMAT, "step": step, "same": same, "crc32": _crc(half / TENSORS)}
            text = json.dumps(content | {"values": values}, allow_nan=False)
            (half / VALUES).write_text(text, encoding="utf-8")
            for path in (half / TENSORS, half / VALUES, half):
                _flush(path)
            if final.exists():
                shutil.rmtree(final)
            half.rename(final)
            _flush(folder)
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and values of one checkpoint folder.

    Raises:
        UserError: a file is missing, cut short or altered.
    """
    try:
        content = json.loads((path / VALUES).read_text(encoding="utf-8"))
        known = content["format"] == FORMAT
        same, values, crc = content["same"], content["values"], content["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path / VALUES, error) from error
    if not known:
        raise UserError(
            f"{path / VALUES} has format {content['format']}, this version reads {FORMAT}; "
            "resume with the version that wrote it."
        )
    try:
        if _crc(path / TENSORS) != crc:
            raise ValueError("its checksum is another")
        tensors = load_file(path / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path / TENSORS, error) from error
    return tensors | {name: tensors[first] for name, first in same.items()}, values


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The number of updates after which a checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def sweep(folder: Path) -> None:
    """Remove what a killed process has left half written."""
    for half in folder.glob(".step-*.writing"):
        shutil.rmtree(half, ignore_errors=True)


def _once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and for each further name of the same tensor the name it is stored by."""
    unique: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in first:
            same[name] = first[key]
            continue
        first[key] = name
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that overlap in part, so a view is written as its own copy.
        unique[name] = tensor.clone() if storage in storages else tensor
        unique[name] = unique[name].to("cpu").contiguous()
        storages.add(storage)
    return unique, same


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else _os_error(str(error))
        if code not in FULL:
            raise
        raise UserError(
            f"No room to write the checkpoint {path} ({os.strerror(code)}); free some disk space "
            "and resume from the checkpoint before it."
        ) from error


def _os_error(message: str) -> int | None:
    found = re.search(r"os error (\d+)", message)
    return int(found[1]) if found else None


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} is damaged ({str(error).splitlines()[0]}); remove the folder {file.parent} and "
        "resume from the checkpoint before it."
    )


def _crc(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return zlib.crc32(content)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
