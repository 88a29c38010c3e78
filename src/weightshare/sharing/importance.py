"""Sample in proportion to gradient norms, keep the estimate unbiased, and know when it pays.

To estimate a mean ``Σ_i u_i g_i`` draw i with probability p_i and weigh the draw by u_i / p_i. Its
variance is ``Σ_i u_i² ‖g_i‖² / p_i - ‖Σ_i u_i g_i‖²``, smallest at ``p_i ∝ u_i ‖g_i‖``. The scores
here are those norms (or what stands in for them), u the *base* measure: uniform, or the
distribution the objective is defined by.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightshare.errors import UserError


@dataclass(frozen=True, eq=False)
class Importance:
    """Sampling distribution p over n things from their scores s.

        p = (1 - n f) · (δ q + (1 - δ) u) + f,      q_i = u_i s_i / Σ_j u_j s_j

    Clipping at f and renormalising would not keep the floor; this does.

    Args:
        scores: ``(n,)``, not negative. All zero, or any not finite: p falls back to the base.
        base: ``(n,)``, the measure u of the objective; uniform by default.
        floor: f, the least probability of anything, at most 1/n.
        mix: δ in [0, 1]. The second moment is at most ``uniform / (1 - δ)`` whatever the scores,
            so the default .9 bounds what bad scores can do to ten times.
    """

    scores: Tensor
    base: Tensor | None = None
    floor: float = 0.0
    mix: float = 0.9

    def __post_init__(self) -> None:
        if self.scores.ndim != 1 or self.scores.numel() == 0:
            raise UserError(f"scores have shape {tuple(self.scores.shape)}; give one per thing.")
        n = len(self.scores)
        if bool((self.scores < 0).any()):
            raise UserError("a score is negative; scores are norms, zero or more.")
        if not 0 <= self.mix <= 1:
            raise UserError(f"mix is {self.mix}; it is a share, between 0 and 1.")
        if not 0 <= self.floor * n <= 1:
            raise UserError(f"floor is {self.floor}; {n} things allow at most {1 / n:.3g} each.")
        if self.base is not None:
            u = self.base.double()
            if u.shape != self.scores.shape or bool((u < 0).any()) or not 0 < u.sum() < math.inf:
                raise UserError(
                    "base must hold one finite weight per score, none negative, not all zero."
                )

    @property
    def u(self) -> Tensor:
        """The base measure, normalised, float64."""
        if self.base is None:
            return torch.full_like(self.scores, 1 / len(self.scores), dtype=torch.float64)
        return self.base.double() / self.base.double().sum()

    @property
    def target(self) -> Tensor:
        """q: what the scores alone ask for."""
        s = self.scores.double()
        if not bool(torch.isfinite(s).all()):
            return self.u
        scaled = self.u * (s / s.max().clamp(min=1e-300))  # no overflow, no underflow
        return scaled / scaled.sum() if float(scaled.sum()) > 0 else self.u

    @property
    def probabilities(self) -> Tensor:
        """p, float64; sums to one and is at least the floor."""
        p = self.mix * self.target + (1 - self.mix) * self.u
        p = p / p.sum()
        return (1 - len(p) * self.floor) * p + self.floor

    @property
    def weights(self) -> Tensor:
        """u / p: the factor that makes a draw's gradient unbiased; mean one under p."""
        p = self.probabilities
        return torch.where(p > 0, self.u / p.clamp(min=1e-300), 0.0)

    @property
    def ess(self) -> float:
        """Effective sample size as a share of the draws, ``(E_p w)² / E_p w²``, in (0, 1]."""
        w, p = self.weights, self.probabilities
        return float((p * w).sum() ** 2 / (p * w.square()).sum())

    @property
    def gain(self) -> float:
        """Second moment of plain sampling over that of the best: ``Σ u s² / (Σ u s)²``, >= 1.

        What importance sampling can buy if the scores are the norms: the number of plain draws
        that one importance-weighted draw is worth, in the part of the variance it can reach.
        """
        s = self.scores.double()
        mean = float((self.u * s).sum())
        if not math.isfinite(mean) or mean == 0:
            return 1.0
        return float((self.u * (s / mean).square()).sum())

    def pays(self, threshold: float = 1.1) -> bool:
        """Whether to switch it on (Katharopoulos & Fleuret, 2018: their τ² is :attr:`gain`).

        Below 1.1 the gain does not show above the cost of the scores.
        """
        return self.gain >= threshold

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` independent draws, ``(count,)`` indices, by inverting the cumulative sum.

        With δ = 0 and a uniform base these are the draws of a plain uniform sampler.
        """
        points = torch.rand(count, generator=generator, dtype=torch.float64)
        edges = self.probabilities.cumsum(0)
        return torch.searchsorted(edges / edges[-1], points, right=True).clamp(max=len(edges) - 1)


def mix_for_ess(scores: Tensor, ess: float = 0.5, base: Tensor | None = None) -> float:
    """The largest δ whose weights keep an effective sample size of ``ess``, by bisection."""
    if not 0 < ess <= 1:
        raise UserError(f"ess is {ess}; it is a share of the draws, above 0 and at most 1.")
    low, high = 0.0, 1.0
    if Importance(scores, base, mix=1.0).ess >= ess and bool((scores > 0).all()):
        return 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if Importance(scores, base, mix=middle).ess >= ess:
            low = middle
        else:
            high = middle
    return low


def linear_mix(progress: float, end: float = 0.9) -> float:
    """The mixing schedule: δ rises linearly from 0 to ``end`` over ``progress`` in [0, 1]."""
    return end * min(1.0, max(0.0, progress))


def second_moment(norms: Tensor, p: Tensor, base: Tensor | None = None) -> float:
    """``Σ_i u_i² ‖g_i‖² / p_i`` of weighted single draws; the variance is this less ``‖ḡ‖²``."""
    u = Importance(norms, base).u
    s = norms.double()
    return float(torch.where(s > 0, (u * s).square() / p.double(), 0.0).sum())


@dataclass(frozen=True, eq=False)
class Joint:
    """Distributions p over paths and q over samples, and the second moment they give."""

    p: Tensor
    q: Tensor
    second_moment: float


def joint(norms: Tensor, rounds: int = 500, tolerance: float = 1e-13) -> Joint:
    """The best *independent* p and q for gradient norms ``(paths, samples)``, uniform base.

    Alternates the two exact minimisers of ``Σ_αi u² ‖g(α,i)‖² / (N² p_α q_i)``,

        p_α ∝ √(Σ_i ‖g(α,i)‖² / q_i),      q_i ∝ √(Σ_α ‖g(α,i)‖² / p_α)

    each of which can only lower it. The marginal norms are optimal only where the norms factorise.
    A path or sample whose norms are all zero is never drawn; where all are zero, draws are uniform.

    Raises:
        UserError: norms that are no matrix of finite numbers, zero or more.
    """
    if norms.ndim != 2 or not norms.numel() or not bool((norms.isfinite() & (norms >= 0)).all()):
        raise UserError("norms must be a matrix (paths, samples) of finite numbers, none negative.")
    square = norms.double().square()
    p, q = marginal(norms)
    value = _joint_moment(square, p, q)
    for _ in range(rounds):
        p = _shares(_over(square, q).sum(1).sqrt())
        q = _shares(_over(square, p[:, None]).sum(0).sqrt())
        new = _joint_moment(square, p, q)
        if value - new <= tolerance * value:
            break
        value = new
    return Joint(p, q, _joint_moment(square, p, q))


def marginal(norms: Tensor) -> tuple[Tensor, Tensor]:
    """p and q in proportion to the mean norms of each path and of each sample."""
    return _shares(norms.double().mean(1)), _shares(norms.double().mean(0))


def _shares(values: Tensor) -> Tensor:
    """``values`` over their sum; equal shares where all are zero."""
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / len(values))


def _over(square: Tensor, chance: Tensor) -> Tensor:
    """What is never drawn has no gradient: 0 / 0 counts nothing."""
    return torch.where(square > 0, square / chance, 0.0)


def _joint_moment(square: Tensor, p: Tensor, q: Tensor) -> float:
    paths, samples = square.shape
    return float(_over(square, p[:, None] * q).sum()) / (paths * samples) ** 2
