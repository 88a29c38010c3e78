"""Labelled samples for a federation, by the name of their data set."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Samples(NamedTuple):
    """Training and test samples with their classes, ``(n,)`` int64.

    Images are ``(n, height, width)`` float32 in [0, 1], texts ``(n, length)`` int64 word numbers.
    """

    train: NDArray[Any]
    train_labels: NDArray[np.int64]
    test: NDArray[Any]
    test_labels: NDArray[np.int64]

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.train_labels.max()) + 1
