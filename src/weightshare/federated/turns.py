r"""Who turns: the fall of a participant's cosine below what it used to be, added up (CUSUM).

Smoothed reputations remember: one that was earned for twelve rounds protects for twenty more, and
who stays just above the threshold is never removed. So falls are added up round by round (Page,
"Continuous inspection schemes", Biometrika 1954):

.. math:: d_i = m_i - \varphi_i, \qquad s_i \leftarrow \max(0,\; s_i + d_i - \text{med}_j\, d_j - k)

with :math:`m_i` the mean cosine of the first rounds. The median takes out what training does to
all: cosines fall as models converge.
"""

from collections.abc import Mapping
from statistics import median

from weightshare.federated.config import ReputationConfig
from weightshare.federated.standing import Standing

ALLOWANCE = 0.1
"""k: a fall beyond the others' that counts as nothing, round by round."""


def usual_after(
    standing: Standing, cosines: Mapping[str, float], config: ReputationConfig
) -> dict[str, float]:
    """m: the mean cosine of each participant's first rounds, as many as there is patience."""
    usual = dict(standing.usual)
    for name, cosine in cosines.items():
        count = standing.assessed.get(name, 0)
        if count < max(config.patience, 1):
            before = usual.get(name, 0.0)
            usual[name] = before + (cosine - before) / (count + 1)
    return usual


def falls_after(
    standing: Standing, cosines: Mapping[str, float], config: ReputationConfig
) -> dict[str, float]:
    """s, of those whose first rounds are over; whoever did not answer keeps it."""
    drops = {
        name: standing.usual[name] - cosine
        for name, cosine in cosines.items()
        if name in standing.usual and standing.assessed[name] >= max(config.patience, 1)
    }
    common = median(drops.values()) if drops else 0.0
    return {**standing.falls} | {
        name: max(0.0, standing.falls.get(name, 0.0) + drop - common - ALLOWANCE)
        for name, drop in drops.items()
    }
