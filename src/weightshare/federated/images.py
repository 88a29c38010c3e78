"""Labelled images for a federation: the digits inside the library, or MNIST's files."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightshare.errors import UserError
from weightshare.federated.samples import Samples

HELD_OUT = 500
"""Digits kept for testing."""


def digits() -> Samples:
    """1,297 digits of 8 x 8 pixels to train on and 500 to test on, in a fixed order."""
    from weightshare.data import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.labels))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Samples(found.images[train], found.labels[train], found.images[test], found.labels[test])


def mnist(folder: Path) -> Samples:
    """The images of a folder with MNIST's four files (MNIST, Fashion-MNIST and their kin).

    Raises:
        UserError: the files are not what they should be.
    """
    arrays = [
        _idx(folder / f"{part}-{kind}-idx{dimensions}-ubyte.gz", dimensions)
        for part in ("train", "t10k")
        for kind, dimensions in (("images", 3), ("labels", 1))
    ]
    images, classes, test, test_classes = arrays
    if len(images) != len(classes) or len(test) != len(test_classes):
        raise UserError(f"{folder} has {len(images)} images for {len(classes)} labels; check it.")
    return Samples(
        images.astype(np.float32) / np.float32(255),
        classes.astype(np.int64),
        test.astype(np.float32) / np.float32(255),
        test_classes.astype(np.int64),
    )


def _idx(path: Path, dimensions: int) -> NDArray[Any]:
    """An array in MNIST's own format: magic number, sizes, bytes."""
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except (OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give digits, or a folder with MNIST's four "
            ".gz files or with the movie reviews; text by domain needs --model."
        ) from error
    magic, *shape = np.frombuffer(raw, ">u4", 1 + dimensions).tolist() if len(raw) > 16 else [0]
    head = 4 * (1 + dimensions)
    if magic != 0x800 + dimensions or len(raw) != head + int(np.prod(shape)):
        raise UserError(f"{path} is not a file of {dimensions}-dimensional bytes; check it.")
    return np.frombuffer(raw, np.uint8, -1, head).reshape(shape)
