"""A real text that every machine has: the sources of Python's standard library (PSF licence)."""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightshare.data.lookup import about, locate
from weightshare.errors import UserError

SEPARATOR = "\n\n\f\n\n"
"""Between two documents of a text file: a line with a form feed, blank lines around it."""

LEFT_OUT = {
    "__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
"""Folders of tables, tests, demonstrations and other people's code."""

TESTS = {"test", "tests"}

LEAST_CHARACTERS = 200


@dataclass(frozen=True)
class SourceFile:
    """A source file: its path below the standard library, with ``/``, and its text."""

    path: str
    text: str


def gather_sources(root: str | Path | None = None, *, tests: bool = False) -> list[SourceFile]:
    """The standard library's own modules, in an order that depends on nothing but their names.

    ``root`` defaults to the running Python's ``sysconfig.get_paths()["stdlib"]``. Left out are the
    folders ``LEFT_OUT``, what the installation generates (``_sysconfigdata``, ``config-...``,
    ``sitecustomize``) and files of under 200 characters; form feeds become blank lines, as they
    separate documents here. Files are sorted by the sha256 of their path: shuffled, yet a file
    added by the next Python moves no other. With ``tests`` the library's own tests (folders
    ``test`` and ``tests``) come in: three times the text.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    left_out = LEFT_OUT - TESTS if tests else LEFT_OUT
    files = []
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if left_out.intersection(inner.parts[:-1]) or _generated(inner):
            continue
        text = path.read_text(encoding="utf-8", errors="replace").replace("\f", "\n")
        if len(text) >= LEAST_CHARACTERS and "\ufffd" not in text:
            files.append(SourceFile(inner.as_posix(), text.strip() + "\n"))
    if not files:
        raise UserError(
            f"No Python sources under {root}; give the folder of a standard library that has its "
            ".py files."
        )
    return sorted(files, key=lambda file: hashlib.sha256(file.path.encode()).digest())


def split_sources(files: Iterable[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Training files and the rest: whatever has the name of a file in the held-out sample stays
    out of training, also where another version of Python has another text under that name."""
    held = set(about("pystdlib")["documents"])
    files = list(files)
    return [f for f in files if f.path not in held], [f for f in files if f.path in held]


def write_corpus(
    folder: str | Path, root: str | Path | None = None, *, tests: bool = False
) -> dict[str, Any]:
    """Write ``train.txt`` (this Python's sources without the held-out names) and ``heldout.txt``
    (the sample inside the package) to ``folder``, and ``corpus.json`` with what they are.

    Returns the content of ``corpus.json``: Python version, and documents, bytes and sha256 of each.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, _ = split_sources(gather_sources(root, tests=tests))
    texts = {
        "train": SEPARATOR.join(file.text for file in train),
        "heldout": gzip.decompress(locate("pystdlib").read_bytes()).decode("utf-8"),
    }
    facts: dict[str, Any] = {
        "python": platform.python_version() if root is None else Path(root).name,
        "tests": tests,
        "license": about("pystdlib")["license"],
    }
    for name, text in texts.items():
        raw = text.encode("utf-8")
        (folder / f"{name}.txt").write_bytes(raw)
        facts[name] = {
            "documents": text.count(SEPARATOR) + 1,
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _generated(inner: Path) -> bool:
    return inner.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize")) or any(
        part.startswith("config-") for part in inner.parts
    )
