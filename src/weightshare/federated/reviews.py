"""Movie reviews for a federation: sentences as word numbers, praise or not."""

import gzip
from collections import Counter
from pathlib import Path

import numpy as np

from weightshare.errors import UserError
from weightshare.federated.samples import Samples

FILE = "rt-polarity.all.gz"
"""Pang & Lee 2005: a line is a class (0 or 1), a space and the words; sorted by class."""
HELD_OUT = 1000
WORDS = 2000
"""The most frequent words have numbers 2, 3, ...; 1 is any other and 0 fills up."""
LENGTH = 32
"""Words of a sentence that are read (the longest has 59, nine in ten have at most 34)."""


def reviews(folder: Path) -> Samples:
    """9,662 sentences to train on and 1,000 to test on, shuffled once, as many of each class.

    Raises:
        UserError: the file is not what it should be.
    """
    path = folder / FILE
    try:
        with gzip.open(path, "rt", encoding="latin-1") as file:
            lines = [line.rstrip("\n").split(" ", 1) for line in file]
        labels = np.array([int(line[0]) for line in lines], np.int64)
        texts = [line[1].split() for line in lines]
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not the movie reviews ({error}); check it.") from error
    if set(labels.tolist()) != {0, 1}:
        raise UserError(f"{path} has the classes {sorted(set(labels.tolist()))}, not 0 and 1.")
    draw = np.random.default_rng(0)
    # The file is sorted by class: cut anywhere, a part of it would have one class only.
    held = [draw.permutation(np.flatnonzero(labels == c))[: HELD_OUT // 2] for c in (0, 1)]
    test = draw.permutation(np.concatenate(held))
    train = draw.permutation(np.setdiff1d(np.arange(len(labels)), test))
    counts = Counter(word for i in train for word in texts[i])
    # Ties by the alphabet, so that the numbers depend on nothing else.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 2]
    number = {word: i for i, word in enumerate(ranked, 2)}
    tokens = np.zeros((len(texts), LENGTH), np.int64)
    for row, words in enumerate(texts):
        known = [number.get(word, 1) for word in words[:LENGTH]]
        tokens[row, : len(known)] = known
    return Samples(tokens[train], labels[train], tokens[test], labels[test])
