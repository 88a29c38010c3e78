"""Log-likelihood of continuations; those of one example share the work on their common prefix."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightshare.language.score import LOGIT_ELEMENTS, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[str, str]
"""A context and its continuation, joined without anything between them."""


@dataclass(frozen=True)
class Likelihood:
    """``total``: log p(continuation | context) in nats; ``greedy``: each of its tokens was the
    most likely one."""

    total: float
    greedy: bool


@dataclass(frozen=True)
class _Row:
    """Tokens of one pair, and how many of them are context."""

    ids: list[int]
    context: int


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Sequence[Pair]],
    *,
    batch_tokens: int | None = None,
    share_prefix: bool = True,
) -> list[list[Likelihood]]:
    r"""Score every pair of every example.

    .. math:: \log p(c \mid x) = \sum_{t=|x|}^{|xc|-1} \log p(w_t \mid w_{<t})

    Context and continuation are encoded together; the continuation begins where the tokens stop
    being those of the context alone. A beginning-of-text token goes before them if the tokenizer
    adds one by itself, or if the context is empty. Contexts longer than the model's positions lose
    their beginning.

    With ``share_prefix`` the tokens that all pairs of an example begin with run through the model
    once and their key/value cache serves every pair; without, each pair runs alone. Both give the
    same figures but for rounding. ``batch_tokens`` bounds the padded size of a batch: by default
    1,024 on a CPU, where padding costs more than small batches, and 8,192 elsewhere. Nothing of the
    model's state changes.
    """
    batch_tokens = batch_tokens or (1024 if model.device.type == "cpu" else 8192)
    groups = _encode(model, tokenizer, examples)
    share_prefix = share_prefix and {"position_ids", "past_key_values"} <= _parameters(model)
    prefixes = [_common(group) if share_prefix else 0 for group in groups]
    scored: list[list[Likelihood]] = [[] for _ in groups]
    logits = LOGIT_ELEMENTS // model.get_input_embeddings().weight.shape[0]
    with evaluating(model):
        shared = {
            i: (p, len(groups[i]), max(len(row.ids) for row in groups[i]) - p)
            for i, p in enumerate(prefixes)
            if p
        }
        for batch in _batches(shared, batch_tokens, logits):
            found = _shared(model, [groups[i] for i in batch], [prefixes[i] for i in batch])
            for i, one in zip(batch, found, strict=True):
                scored[i] = one
        alone = [(i, row) for i, p in enumerate(prefixes) if not p for row in groups[i]]
        shapes = {k: (len(row.ids), 1, len(row.ids)) for k, (_, row) in enumerate(alone)}
        results: dict[int, Likelihood] = {}
        for batch in _batches(shapes, batch_tokens, logits):
            found_alone = _alone(model, [alone[k][1] for k in batch])
            results |= zip(batch, found_alone, strict=True)
        for k, (i, _) in enumerate(alone):
            scored[i].append(results[k])
    return scored


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Sequence[Pair]]
) -> list[list[_Row]]:
    bos = tokenizer.bos_token_id
    start = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    instead = next((t for t in (bos, tokenizer.eos_token_id) if t is not None), 0)
    pairs = [pair for example in examples for pair in example]
    strings = [context for context, _ in pairs] + [context + more for context, more in pairs]
    encoded = (
        iter(tokenizer(strings, add_special_tokens=False)["input_ids"]) if strings else iter(())
    )
    contexts = [next(encoded) for _ in pairs]
    rows = []
    for context, whole in zip(contexts, encoded, strict=True):
        same = min(_agreeing([context, whole]), len(whole) - 1)
        before = start if start or same else [instead]
        rows.append(_Row([*before, *whole], len(before) + same))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    groups, done = [], 0
    for example in examples:
        group = rows[done : done + len(example)]
        done += len(example)
        # The last token is never read by the model, so limit + 1 tokens fit.
        cut = max(0, max(len(row.ids) for row in group) - limit - 1) if limit else 0
        groups.append([_Row(row.ids[cut:], max(1, row.context - cut)) for row in group])
    return groups


def _agreeing(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    shortest = min(map(len, sequences))
    for place in range(shortest):
        if len({sequence[place] for sequence in sequences}) > 1:
            return place
    return shortest


def _common(group: Sequence[_Row]) -> int:
    """Length of the prefix to share: context in every row."""
    return min(_agreeing([row.ids for row in group]), *(row.context for row in group))


def _batches(
    shapes: Mapping[int, tuple[int, int, int]], tokens: int, logits: int
) -> Iterator[list[int]]:
    """Keys of ``shapes`` in batches of similar size, the largest first.

    A shape is (tokens read, rows, tokens predicted per row); with padding, a batch has at most
    ``tokens`` of either kind and ``logits`` of the second, unless a single item is larger.
    """
    batch: list[int] = []
    longest, rows, widest = 0, 0, 0
    for key in sorted(shapes, key=lambda key: -shapes[key][0] - shapes[key][1] * shapes[key][2]):
        read, more, wide = shapes[key]
        reads = (len(batch) + 1) * max(longest, read)
        predicts = (rows + more) * max(widest, wide)
        if batch and (reads > tokens or predicts > min(tokens, logits)):
            yield batch
            batch, longest, rows, widest = [], 0, 0, 0
        longest, rows, widest = max(longest, read), rows + more, max(widest, wide)
        batch.append(key)
    if batch:
        yield batch


def _alone(model: PreTrainedModel, rows: Sequence[_Row]) -> list[Likelihood]:
    """Every row through the model from its first token."""
    ids, mask = _padded([row.ids[:-1] for row in rows], model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [
        _score(scores[row.context - 1 : len(row.ids) - 1], row)
        for row, scores in zip(rows, logits, strict=True)
    ]


def _shared(
    model: PreTrainedModel, groups: Sequence[Sequence[_Row]], prefixes: Sequence[int]
) -> list[list[Likelihood]]:
    """Each group's prefix once, then all suffixes against copies of its cache."""
    # Left padding keeps the cache's free end where the suffixes go on, for every row.
    prefix, seen = _padded(
        [group[0].ids[:p] for group, p in zip(groups, prefixes, strict=True)], model.device, True
    )
    places = (seen.cumsum(-1) - 1).clamp(min=0)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
    output = model(
        input_ids=prefix, attention_mask=seen, position_ids=places, use_cache=True, **keep
    )
    last = output.logits[:, -1]
    rows = [row for group in groups for row in group]
    owner = torch.tensor([g for g, group in enumerate(groups) for _ in group], device=model.device)
    starts = [prefixes[g] for g in owner.tolist()]
    suffixes = [row.ids[p:-1] for row, p in zip(rows, starts, strict=True)]
    cache, mask_before = output.past_key_values, seen
    results: list[Likelihood] = []
    if any(suffixes):
        ids, mask = _padded(suffixes, model.device)
        first = torch.tensor(starts, device=model.device)[:, None]
        cache.batch_select_indices(owner)
        after = model(
            input_ids=ids,
            attention_mask=torch.cat([mask_before[owner], mask], 1),
            position_ids=first + torch.arange(ids.shape[1], device=model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
    for k, (row, p) in enumerate(zip(rows, starts, strict=True)):
        scores = last[owner[k], None]
        if suffixes[k]:
            scores = torch.cat([scores, after[k, : len(suffixes[k])]])
        results.append(_score(scores[row.context - p :], row))
    found = iter(results)
    return [[next(found) for _ in group] for group in groups]


def _score(scores: Tensor, row: _Row) -> Likelihood:
    """``scores`` (continuation, vocabulary): the logits that predict the continuation's tokens."""
    targets = torch.tensor(row.ids[row.context :], device=scores.device)
    scores = scores.float()
    log_p = scores.gather(-1, targets[:, None]).squeeze(-1) - scores.logsumexp(-1)
    return Likelihood(log_p.double().sum().item(), bool((scores.argmax(-1) == targets).all()))


def _padded(
    sequences: Sequence[Sequence[int]], device: torch.device, left: bool = False
) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
