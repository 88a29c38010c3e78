"""Our attacks and our geometric median against ByzFL's, where that is installed.

    pip install --no-deps byzfl==0.0.11

Without ``--no-deps`` it replaces torch; and its benchmark package, which ``import byzfl`` loads,
needs torchvision and seaborn: an empty module takes its place here.
"""

import importlib.util
import sys
import types

import numpy as np
import pytest

from weightshare.federated import attacks
from weightshare.federated.rules import geometric_median

if importlib.util.find_spec("byzfl") is None:
    pytest.skip("ByzFL is not installed", allow_module_level=True)
sys.modules.setdefault("byzfl.benchmark", types.ModuleType("byzfl.benchmark"))
import byzfl  # noqa: E402

HONEST = np.random.default_rng(0).standard_normal((7, 300)).astype(np.float32)


def situation():
    draw = np.random.default_rng(1)
    return attacks.Situation(1, draw, draw, attacks.Crowd(HONEST))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (attacks.inner_product, lambda: byzfl.InnerProductManipulation(2.0)),
        # They add deviations of the sample (n - 1); we subtract those of the population (n).
        (attacks.alie, lambda: byzfl.ALittleIsEnough(-1.5 * (6 / 7) ** 0.5)),
        (attacks.mimic, lambda: byzfl.Mimic(0)),
    ],
)
def test_attacks_are_theirs(ours, theirs):
    found = ours(HONEST[3], situation())
    np.testing.assert_allclose(found, theirs()(HONEST), rtol=1e-5, atol=1e-6)


def test_flipping_the_mean_is_flipping_each():
    flipped = [attacks.sign_flip(row, situation()) for row in HONEST]
    np.testing.assert_allclose(np.mean(flipped, 0), byzfl.SignFlipping()(HONEST), atol=1e-6)


def test_the_geometric_median_is_theirs():
    found = geometric_median(list(HONEST))
    np.testing.assert_allclose(found, byzfl.GeometricMedian(1e-6, 200)(HONEST), atol=1e-4)
