"""Where a named data set is: a path, ``WEIGHTSHARE_DATA``, the package's samples, or the hub."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from weightshare.errors import UserError

SAMPLES = Path(__file__).parent / "samples"

SUFFIXES = ("", ".txt", ".jsonl", ".npz", ".txt.gz", ".jsonl.gz", ".json", ".json.gz", ".extxyz.gz")
"""What may follow the name of a data set in ``WEIGHTSHARE_DATA``."""

DEPTH = 3
"""How many folders below ``WEIGHTSHARE_DATA`` are searched."""

PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")


def locate(name: str | Path, *, allow_hub: bool = False) -> Path:
    """The file or folder that ``name`` stands for, looked for in this order.

    1. a path that exists;
    2. the folder in the environment variable ``WEIGHTSHARE_DATA``: ``name`` in it or up to three
       folders below, with or without a usual suffix (``piqa`` finds ``evalkit/piqa.jsonl.gz``);
    3. the samples inside the package (``known_samples``), whose sha256 is checked;
    4. with ``allow_hub``, ``OWNER/REPO:FILE`` or ``OWNER/REPO@REVISION:FILE`` of the public Hugging
       Face hub's data sets.

    Raises ``UserError`` where nothing is found, where a sample is damaged, where two files in
    ``WEIGHTSHARE_DATA`` answer to the name, and for pickled files, which can run code when read.
    """
    if str(name).endswith(PICKLED):
        raise UserError(
            f"{name} is a pickled file, which can run code when it is read; "
            "convert it to npz, safetensors or JSON lines first."
        )
    path = Path(name).expanduser()
    if path.exists():
        return path
    if (home := os.environ.get("WEIGHTSHARE_DATA")) and (found := _below(Path(home), str(name))):
        return found
    if str(name) in _manifest():
        return _sample(str(name))
    if ":" in str(name) and "/" in str(name):
        return _from_hub(str(name), allow_hub)
    raise UserError(
        f"No data set {str(name)!r}: it is no path, no sample of the library "
        f"({', '.join(known_samples())}) and not in WEIGHTSHARE_DATA "
        f"({home or 'not set'}); give one of these."
    )


def known_samples() -> list[str]:
    """Names of the data sets that ship inside the package."""
    return sorted(_manifest())


def about(name: str) -> dict[str, Any]:
    """What the manifest says of a sample: file, sha256, license, source and more."""
    return dict(_manifest()[name])


@cache
def _manifest() -> dict[str, Any]:
    return json.loads((SAMPLES / "manifest.json").read_text(encoding="utf-8"))


@cache
def _sample(name: str) -> Path:
    entry = _manifest()[name]
    path = SAMPLES / entry["file"]
    if not path.exists():
        raise UserError(f"The sample {name!r} is missing from this installation; reinstall it.")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise UserError(
            f"The sample {name!r} ({path}) is not the file that was shipped: its sha256 differs; "
            "reinstall weightshare."
        )
    return path


def _below(home: Path, name: str) -> Path | None:
    for depth in range(DEPTH + 1):
        levels = "*/" * depth
        found = sorted({p for suffix in SUFFIXES for p in home.glob(f"{levels}{name}{suffix}")})
        if len(found) > 1:
            raise UserError(
                f"{name!r} is not clear: WEIGHTSHARE_DATA has {' and '.join(map(str, found[:3]))}; "
                "give the path."
            )
        if found:
            return found[0]
    return None


def _from_hub(name: str, allowed: bool) -> Path:
    if not allowed:
        raise UserError(
            f"{name!r} is on the public hub, and reading from there was not allowed; "
            "allow it, or give a file on this machine."
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            "Reading from the hub needs huggingface_hub; pip install 'weightshare[folding]'."
        ) from error
    where, file = name.split(":", 1)
    repository, _, revision = where.partition("@")
    try:
        return Path(
            hf_hub_download(repository, file, repo_type="dataset", revision=revision or None)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{file} of {repository} could not be had from the hub ({reason}); "
            "check the name and the connection, or give a file on this machine."
        ) from error
