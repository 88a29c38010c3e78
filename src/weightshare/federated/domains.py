"""Text by domain, dealt to the participants of a federation of adapters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from weightshare.data import locate
from weightshare.errors import UserError
from weightshare.federated.local import Examples
from weightshare.federated.material import ROOT
from weightshare.language import Windows, read_documents, windows
from weightshare.language.text import TEXT_SUFFIXES, read_rows

HELD_OUT = 0.1
"""Share of each domain's windows that everybody is tested on: its last ones."""


def read_domains(source: str) -> dict[str, list[str]]:
    """Documents by domain.

    A folder: each text file or folder of text files in it is a domain, by its name. JSON lines: the
    domain stands under ``"domain"``, the document under ``"text"``.

    Raises:
        UserError: there are fewer than two domains, two of one name or one that cannot have its
            own, or the files are not what they should be.
    """
    path = locate(source)
    domains: dict[str, list[str]] = {}
    if path.is_dir():
        for part in sorted(path.iterdir()):
            if part.is_dir() or part.name.endswith(TEXT_SUFFIXES):
                name = part.name if part.is_dir() else Path(part.name.removesuffix(".gz")).stem
                if name in domains:
                    raise UserError(f"{source} has two domains {name!r}; rename one of them.")
                domains[name] = read_documents(part)
    else:
        wanted = 'a JSON object with "domain" and "text"; correct it.'
        for domain, text in read_rows(path, _domain_and_text, wanted):
            domains.setdefault(domain, []).append(text)
    if len(domains) < 2:
        raise UserError(
            f"{source} holds {len(domains)} domain(s) of text; give a folder with a text file for "
            'each participant, or JSON lines with "domain" and "text".'
        )
    for name in domains:
        # Each has a folder of this name for its adapter.
        if name in ("", "..", ROOT) or Path(name).name != name or re.fullmatch(r"x\d+", name):
            raise UserError(
                f"A domain of {source} is called {name!r}; give it a name that a folder can have "
                "and that is not root, or x and a number."
            )
    return domains


def _domain_and_text(row: Any, where: str) -> tuple[str, str]:
    domain, text = row["domain"], row["text"]
    if not isinstance(domain, str) or not isinstance(text, str):
        raise TypeError(f"a field on {where} is not a string")
    return domain, text


@dataclass(frozen=True)
class Dealt:
    """Windows of tokens with their labels, -100 where there is no target."""

    honest: dict[str, Examples]
    adversaries: dict[str, Examples]
    root: Examples
    """The server's own."""
    test: Examples


def deal_domains(
    domains: Mapping[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    adversaries: int = 0,
    root: int = 0,
    samples: int = 0,
    seed: int = 0,
) -> Dealt:
    """One honest participant for each domain.

    Every domain gives up the same share of its windows to a pool, from which the server gets
    ``root`` and each adversary half of what an honest participant holds on average: windows of all
    domains that nobody else has.

    Args:
        domains: documents by name.
        tokenizer: of the model.
        length: tokens of a window.
        adversaries: how many.
        root: windows of the server.
        samples: windows of all honest participants and adversaries; 0 takes all there are.
        seed: of the deal.

    Raises:
        UserError: a domain has too few windows.
    """
    cut: dict[str, Windows] = {}
    for name, texts in domains.items():
        try:
            cut[name] = windows(tokenizer, texts, length)
        except UserError as error:
            raise UserError(f"In the domain {name!r}: {error}") from error
    kept: dict[str, Windows] = {}
    tests: list[Windows] = []
    for name, found in cut.items():
        edge = len(found) - max(1, round(HELD_OUT * len(found)))
        most = edge if not samples else min(edge, -(-(samples + root) // len(domains)))
        kept[name] = found[:most]
        tests.append(found[edge : edge + max(1, round(HELD_OUT * most))])
    total = sum(map(len, kept.values()))
    wanted = root + round((total - root) * adversaries / (2 * len(domains) + adversaries))
    sizes = np.cumsum([0, *map(len, kept.values())])
    shares = np.diff(np.round(sizes * wanted / total).astype(int))
    draw = np.random.default_rng(seed)
    honest: dict[str, Examples] = {}
    pool: list[Windows] = []
    for (name, found), given in zip(kept.items(), shares.tolist(), strict=True):
        order = draw.permutation(len(found))
        if given >= len(found):
            raise UserError(
                f"The domain {name!r} has {len(found)} windows of {length} tokens to train on, too "
                "few beside what adversaries and the server get; give more text or a shorter "
                "--length."
            )
        pool.append(found[_rows(order[:given])])
        honest[name] = _examples(found[_rows(order[given:])])
    together = tuple(torch.cat(part) for part in zip(*map(_examples, pool), strict=True))
    order = draw.permutation(len(together[0]))
    parts = np.array_split(order[root:], adversaries) if adversaries else []
    if adversaries > len(order) - root:
        raise UserError(
            f"{total} windows of {length} tokens are too few for {adversaries} adversaries and "
            f"{root} windows at the server; give more text or a shorter --length."
        )
    return Dealt(
        honest,
        {
            f"x{i:02d}": (together[0][_rows(part)], together[1][_rows(part)])
            for i, part in enumerate(parts, 1)
        },
        (together[0][_rows(order[:root])], together[1][_rows(order[:root])]),
        (
            torch.cat([one.input_ids for one in tests]),
            torch.cat([one.labels for one in tests]),
        ),
    )


def _rows(order: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.sort(order))


def _examples(found: Windows) -> Examples:
    return found.input_ids, found.labels
