"""The course of the learning rate."""

from collections.abc import Callable
from math import cos, pi

from weightshare.training.config import LoopConfig


def schedule(config: LoopConfig) -> Callable[[int], float]:
    r"""The factor by which the peak learning rate is multiplied at step ``t = 0, 1, ...``.

    With ``w = round(warmup_fraction * steps)`` steps of warm-up, final share ``f`` and progress
    ``x = (t - w) / (steps - w)``:

    .. math::
        \frac{t + 1}{w + 1} \;(t < w), \qquad
        f + (1 - f)\,\tfrac12 (1 + \cos \pi x) \;(\text{cosine}), \qquad
        1 - (1 - f)\,x \;(\text{linear}), \qquad 1 \;(\text{constant}).

    A pure function of the step, so a resumed run needs no scheduler state. Past the last step the
    factor stays at its final value.
    """
    steps, final, kind = config.steps, config.final_fraction, config.schedule
    warmup = round(config.warmup_fraction * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        if kind == "cosine":
            return final + (1 - final) * (1 + cos(pi * progress)) / 2
        if kind == "linear":
            return 1 - (1 - final) * progress
        return 1.0

    return factor
