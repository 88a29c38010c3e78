"""Handwritten digits of 8 x 8 pixels (UCI): the smallest real images worth learning from."""

from dataclasses import dataclass

import numpy as np

from weightshare.data.lookup import locate


@dataclass(frozen=True)
class Digits:
    """``images`` (n, 8, 8) float32 in [0, 1]; ``labels`` (n,) int64 in 0..9."""

    images: np.ndarray
    labels: np.ndarray


def load_digits() -> Digits:
    """The 1,797 test images of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak
    1998), in their published order; a pixel counts the dark points (0 to 16) of a 4 x 4 square."""
    with np.load(locate("digits"), allow_pickle=False) as file:
        return Digits(file["images"].astype(np.float32) / 16, file["labels"].astype(np.int64))
