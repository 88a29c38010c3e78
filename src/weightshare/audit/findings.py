"""What was found out about one shared layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightshare.audit.layers import Layer
from weightshare.sharing import Gram, Split, mean_agreement, opposed, split


@dataclass(frozen=True)
class Finding:
    """What was found out about one shared layer.

    ``agreement`` is the mean debiased cosine over pairs of users, ``low`` to ``high`` its 95 %
    jackknife interval; ``conflict_rate`` the share of batches on which a pair pulls apart, averaged
    over pairs; ``never`` the users that received no gradient in any batch.
    """

    layer: Layer
    gram: Gram
    unique: int
    saved: int
    agreement: float
    low: float
    high: float
    conflict_rate: float
    opposed: tuple[str, str] | None
    never: tuple[str, ...]
    split: Split

    @property
    def similarity(self) -> Tensor:
        """Debiased cosines of the users, ``(K, K)``."""
        return self.gram.similarity()


def finding(
    model: nn.Module,
    layer: Layer,
    gram: Gram,
    *,
    groups: int = 2,
    level: float = 0.95,
    draws: int = 200,
    seed: int = 0,
) -> Finding:
    """Read a finished measurement; users of any kind, if ``gram``'s labels are the layer's."""
    similarity = gram.similarity()
    agreement = mean_agreement(similarity)
    low = high = math.nan
    if gram.units > 2:
        from scipy.stats import t

        error = float(gram.jackknife(lambda g: torch.tensor(mean_agreement(g.similarity()))))
        reach = float(t.ppf(0.5 + level / 2, gram.units - 1)) * error
        low, high = agreement - reach, agreement + reach
    pair = opposed(similarity)
    elements = {name: model.get_parameter(name).numel() for name in layer.tensors}
    reached = gram.products("paper").diagonal() > 0
    return Finding(
        layer=layer,
        gram=gram,
        unique=sum(elements.values()),
        saved=sum(
            elements[name] * (len(set(users.values())) - 1) for name, users in layer.tensors.items()
        ),
        agreement=agreement,
        low=low,
        high=high,
        conflict_rate=mean_agreement(gram.conflict_rate()),
        opposed=None if pair is None else (layer.users[pair[0]], layer.users[pair[1]]),
        never=tuple(u for u, r in zip(layer.users, reached.tolist(), strict=True) if not r),
        split=split(gram, groups, draws=draws, seed=seed),
    )


def opposed_first(findings: Sequence[Finding]) -> list[Finding]:
    """Findings by agreement, the lowest first; undefined ones last."""
    return sorted(findings, key=lambda f: math.inf if math.isnan(f.agreement) else f.agreement)
