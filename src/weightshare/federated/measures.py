"""Is a federation fair, and what has anyone gained by it?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from weightshare.errors import UserError


@dataclass(frozen=True)
class Fairness:
    """``value`` is 100 ρ; NaN where it is not defined, and ``reason`` says why."""

    value: float
    reason: str = ""


def fairness(alone: Sequence[float], together: Sequence[float]) -> Fairness:
    r"""``100 ρ``: Pearson correlation of accuracies trained alone and after the federation.

    Training alone has ρ = 100 against itself, with no collaboration at all: read it only beside the
    gain over training alone. Where all accuracies are equal (everyone has the same model) it is not
    defined.

    Args:
        alone: test accuracy of each honest participant trained on its own samples only.
        together: its accuracy with what the federation has given it, in the same order.

    Raises:
        UserError: as many accuracies are not given of both.
    """
    if len(alone) != len(together):
        raise UserError(
            f"There are {len(alone)} accuracies trained alone and {len(together)} after the "
            "federation; give both of every participant."
        )
    if len(alone) < 3:
        return Fairness(nan, f"{len(alone)} participants are too few for a correlation")
    for values, who in ((alone, "trained alone"), (together, "after the federation")):
        if not np.isfinite(values).all():
            return Fairness(nan, f"an accuracy {who} is no number")
        if np.ptp(values) < 1e-12:
            return Fairness(nan, f"all participants are equally accurate {who}")
    return Fairness(float(100 * np.corrcoef(alone, together)[0, 1]))
