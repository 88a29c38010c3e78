r"""Losses of language models as (sum, weight), right under padding and bounded in memory.

Sums and not means: parts of a batch, micro-batches and ranks add up to the same quotient however
the batch was cut. All are computed in float32, whatever the type of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weightshare.language.text import IGNORED

CHUNK_ELEMENTS = 2**26
"""Logits turned to float32 at a time: 256 MB, 1365 tokens of a vocabulary of 49,152."""


def next_token_loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy of each target given what is before it, in nats.

    .. math:: \sum_{b,t:\,m_{bt}} -\log p(y_{bt} \mid \text{logits}_{b,t-1})

    ``logits`` (batch, length, vocabulary); ``labels`` (batch, length) aligned with the input ids
    (the shift happens here), -100 where there is no target; ``mask`` (batch, length) says which
    labels are targets (``Windows.mask``), all where it is None. The first column never is.
    ``chunk`` tokens are turned to float32 at a time (None: as many as ``CHUNK_ELEMENTS`` allows).

    Returns ``(sum, count)``, both float32 scalars.
    """
    targets, keep = _shifted(labels, mask)

    def part(scores: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        # A label that is not counted may be -100 or anything else.
        return (
            F.cross_entropy(_kept(scores, weight), wanted * weight, reduction="none")
            .mul(weight)
            .sum()
        )

    return _over_chunks(part, (_flat(logits), targets, keep), chunk), keep.sum().float()


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Divergence of the student's next-token distribution from the teacher's.

    .. math:: \sum_{b,t:\,m_{bt}} \tau^2\, \mathrm{KL}\left(
        \mathrm{softmax}(z^T_{b,t-1}/\tau) \,\|\, \mathrm{softmax}(z^S_{b,t-1}/\tau)\right)

    Both logits (batch, length, vocabulary); ``mask`` (batch, length) marks targets, as in
    ``next_token_loss``, so that both count the same predictions. The factor keeps the gradient's
    size independent of the temperature (Hinton et al. 2015). The teacher gets no gradient. Equal
    logits give exactly zero, and exactly zero gradient.

    Returns ``(sum, count)``, both float32 scalars.
    """
    _, keep = _shifted(mask, mask)

    def part(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = _kept(student, weight) / temperature, _kept(teacher, weight) / temperature
        s_norm, t_norm = s.logsumexp(-1), t.logsumexp(-1)
        # Written with logsumexp, the gradient is softmax(s) - softmax(t) with both computed alike:
        # zero to the last bit where s == t. Through log_softmax it would be rounding noise.
        p = (t - t_norm.unsqueeze(-1)).exp()
        divergence = (p * (t - s)).sum(-1) + s_norm - t_norm  # 0 where both rows are 0
        return temperature**2 * divergence.sum()

    inputs = (_flat(student_logits), _flat(teacher_logits.detach()), keep)
    return _over_chunks(part, inputs, chunk), keep.sum().float()


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    r"""Squared distance of hidden states, and the teacher's square that it is relative to.

    .. math:: \sum_{b,t:\,m_{bt}} \lVert h^S_{bt} - h^T_{bt}\rVert^2, \qquad
        \sum_{b,t:\,m_{bt}} \lVert h^T_{bt}\rVert^2

    The quotient of the two sums is MSE / mean square of the teacher. ``student``, ``teacher``
    (batch, length, width); ``mask`` (batch, length) marks the positions that count: here the
    positions themselves, not the predictions made there. The teacher gets no gradient.

    Returns ``(sum, sum of the teacher)``, both float32 scalars.
    """
    keep = mask.bool()
    h_student, h_teacher = _kept(student, keep), _kept(teacher.detach(), keep)
    return (h_student - h_teacher).square().sum(), h_teacher.square().sum()


def _kept(rows: Tensor, keep: Tensor) -> Tensor:
    """``rows`` in float32 (float64 stays), zero where not kept.

    Filled and not multiplied: a padded position may hold inf or nan, and nan * 0 is nan. Selecting
    rows would do too, but its shape depends on the data, which a CUDA graph cannot have.
    """
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return wide.masked_fill(~keep.unsqueeze(-1), 0)


def _flat(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


def _shifted(labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels and weights moved to the position that predicts them, flattened.

    The labels move and not the logits: ``logits[:, :-1]`` would have to be copied to be flat.
    """
    keep = labels != IGNORED if mask is None else mask.bool() & (labels != IGNORED)
    targets, weight = torch.zeros_like(labels), torch.zeros_like(keep)
    targets[:, :-1], weight[:, :-1] = labels[:, 1:], keep[:, 1:]
    return targets.flatten(), weight.flatten()


def _over_chunks(
    part: Callable[..., Tensor], inputs: tuple[Tensor, ...], chunk: int | None
) -> Tensor:
    """The sum of ``part`` over chunks of rows; the backward pass recomputes each chunk, so neither
    pass ever holds float32 copies of all the logits."""
    tokens, vocabulary = inputs[0].shape
    chunk = max(1, CHUNK_ELEMENTS // vocabulary) if chunk is None else chunk
    if tokens <= chunk:
        return part(*inputs)
    # split, not slices: the backward pass of n slices fills n gradients of full size.
    total = torch.zeros((), device=inputs[0].device)
    for rows in zip(*(tensor.split(chunk) for tensor in inputs), strict=True):
        total = total + checkpoint(part, *rows, use_reentrant=False, preserve_rng_state=False)
    return total
