"""Labelled images for a federation: the digits inside the library, or MNIST's files."""

import gzip
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightshare.errors import UserError

HELD_OUT = 500
"""Digits kept for testing."""


class Images(NamedTuple):
    """Pixels in [0, 1], ``(n, height, width)`` float32, and classes, ``(n,)`` int64."""

    train: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def load_images(name: str) -> Images:
    """``digits``, or a folder (or a name in ``WEIGHTSHARE_DATA``) with MNIST's four files.

    Raises:
        UserError: there is no such data, or the files are not what they should be.
    """
    from weightshare.data import load_digits, locate

    if name == "digits":
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.labels))
        test, train = order[:HELD_OUT], order[HELD_OUT:]
        return Images(
            digits.images[train], digits.labels[train], digits.images[test], digits.labels[test]
        )
    folder = locate(name)
    arrays = [
        _idx(folder / f"{part}-{kind}-idx{dimensions}-ubyte.gz", dimensions)
        for part in ("train", "t10k")
        for kind, dimensions in (("images", 3), ("labels", 1))
    ]
    images, classes, test, test_classes = arrays
    if len(images) != len(classes) or len(test) != len(test_classes):
        raise UserError(f"{folder} has {len(images)} images for {len(classes)} labels; check it.")
    return Images(
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
            ".gz files."
        ) from error
    magic, *shape = np.frombuffer(raw, ">u4", 1 + dimensions).tolist() if len(raw) > 16 else [0]
    head = 4 * (1 + dimensions)
    if magic != 0x800 + dimensions or len(raw) != head + int(np.prod(shape)):
        raise UserError(f"{path} is not a file of {dimensions}-dimensional bytes; check it.")
    return np.frombuffer(raw, np.uint8, -1, head).reshape(shape)
