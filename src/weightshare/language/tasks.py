"""Zero-shot tasks: accuracy with its error, and how much of it is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightshare.data.lookup import locate
from weightshare.errors import UserError
from weightshare.language.likelihood import Likelihood, Pair, log_likelihoods
from weightshare.language.text import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMALISED = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")
"""Tasks that are customarily reported by the likelihood per character of the choice."""

CLEARLY = 2.0
"""Standard errors above chance from which a task says anything about a model."""


@dataclass(frozen=True)
class Example:
    """Pairs of context and continuation, of which ``answer`` is right."""

    pairs: tuple[Pair, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """``kind``: "choice" (the likeliest continuation wins), "partial" (the same continuation after
    several contexts) or "last word" (the one continuation must be what greedy decoding writes)."""

    name: str
    kind: str
    examples: list[Example]


@dataclass(frozen=True)
class TaskScore:
    """- ``acc``: share of examples in which the right pair has the highest log-likelihood.
    - ``acc_norm``: the same, log-likelihoods divided by the characters of the continuation
      without its leading blank, as lm-evaluation-harness counts; None where no choice is made
      between continuations.
    - ``chance``: accuracy of guessing, mean of 1 / choices (0 for a last word).
    - ``metric``: "acc" or "acc_norm", whichever is customary; ``stderr`` is the standard error of
      it, sqrt(a (1 - a) / (n - 1)), and ``correct`` (n,) its 0s and 1s.
    - ``perplexity`` of the last word, None for other kinds.
    """

    name: str
    n: int
    acc: float
    acc_norm: float | None
    chance: float
    stderr: float
    metric: str
    perplexity: float | None = None
    correct: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    @property
    def value(self) -> float:
        """The customary accuracy."""
        return float(self.correct.mean())

    @property
    def clear(self) -> bool:
        """More than two standard errors above chance."""
        return self.value - self.chance > CLEARLY * self.stderr


def read_task(task: str | Path) -> Task:
    """A task file (``.jsonl``, ``.jsonl.gz``), by path or by its name in ``WEIGHTSHARE_DATA``.

    One JSON object a line, all of one form:

    - ``{"context", "choices": [...], "answer": int}``, each choice with its leading blank;
    - ``{"contexts": [...], "continuation", "answer": int}``;
    - ``{"context", "continuation"}``: the last word.
    """
    path = locate(task)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a task; give one of the .jsonl files in it.")
    wanted = (
        'an example: give "context", "choices" and "answer", or "contexts", "continuation" and '
        '"answer", or "context" and "continuation".'
    )
    read = read_rows(path, _example, wanted)
    kinds = sorted({kind for kind, _ in read})
    if len(kinds) != 1:
        raise UserError(
            f"{path} holds {' and '.join(kinds) or 'no'} examples; "
            "a task file has at least one example and all are of one form."
        )
    return Task(path.name.split(".")[0], kinds[0], [example for _, example in read])


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task | str | Path],
    limit: int | None = None,
    *,
    batch_tokens: int | None = None,
) -> dict[str, TaskScore]:
    """Score each task on its first ``limit`` examples, without a chat template; nothing of the
    model's state changes. Tasks are given as read, by path, or by name (see ``read_task``)."""
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1.")
    scores = {}
    for given in tasks:
        task = given if isinstance(given, Task) else read_task(given)
        examples = task.examples[:limit]
        found = log_likelihoods(
            model, tokenizer, [example.pairs for example in examples], batch_tokens=batch_tokens
        )
        scores[task.name] = _score(task, examples, found)
    return scores


def above_chance(scores: Mapping[str, TaskScore]) -> float:
    """Sum of accuracy minus chance over the tasks that are clearly above chance.

    Plain accuracies flatter compression, as chance is kept for free, and tasks at chance only add
    noise.
    """
    return sum(score.value - score.chance for score in scores.values() if score.clear)


@dataclass(frozen=True)
class Kept:
    """What ``other`` keeps of ``dense``.

    - ``above_chance``: sum of its accuracy minus chance over the same sum of the dense model, on
      ``tasks``, those where the dense model is clearly above chance; ``low``, ``high`` its 95 %
      interval. NaN where there is no such task.
    - ``percent``: 100 x mean accuracy / mean accuracy of the dense model, over all tasks: the
      customary figure.
    """

    above_chance: float
    low: float
    high: float
    percent: float
    tasks: tuple[str, ...]


def kept(
    dense: Mapping[str, TaskScore],
    other: Mapping[str, TaskScore],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Kept:
    """Compare two models on the same tasks; the interval resamples examples, paired."""
    for name in dense:
        if name not in other or other[name].n != dense[name].n:
            raise UserError(
                f"The task {name!r} was not scored alike; score both on the same tasks."
            )
    means = [np.mean([scores[name].value for name in dense]) for scores in (other, dense)]
    percent = float(100 * means[0] / means[1])
    tasks = tuple(name for name, score in dense.items() if score.clear)
    if not tasks:
        return Kept(math.nan, math.nan, math.nan, percent, tasks)
    rng = np.random.default_rng(seed)
    points, resampled = np.zeros(2), np.zeros((2, draws))
    for name in tasks:
        chance, n = dense[name].chance, dense[name].n
        both = np.stack([other[name].correct, dense[name].correct])
        points += both.mean(1) - chance
        # How often each of the four (other, dense) outcomes is drawn says all of a resample.
        outcomes, counts = np.unique(both, axis=1, return_counts=True)
        drawn = rng.multinomial(n, counts / n, size=draws)
        resampled += outcomes @ drawn.T / n - chance
    low, high = np.quantile(resampled[0] / resampled[1], [0.025, 0.975])
    return Kept(float(points[0] / points[1]), float(low), float(high), percent, tasks)


def _score(task: Task, examples: list[Example], found: list[list[Likelihood]]) -> TaskScore:
    n = len(examples)
    answers = np.array([example.answer for example in examples])
    perplexity = acc_norm = None
    metric = "acc"
    if task.kind == "last word":
        right = np.array([one.greedy for (one,) in found], float)
        perplexity = math.exp(-float(np.mean([one.total for (one,) in found])))
        chance = 0.0
    else:
        right = (np.array([_best(row) for row in found]) == answers).astype(float)
        chance = float(np.mean([1 / len(example.pairs) for example in examples]))
    acc = float(right.mean())
    if task.kind == "choice":
        lengths = [[len(more.strip()) or 1 for _, more in e.pairs] for e in examples]
        normed = np.array([_best(row, by) for row, by in zip(found, lengths, strict=True)])
        by_length = (normed == answers).astype(float)
        acc_norm = float(by_length.mean())
        if task.name in NORMALISED:
            metric, right = "acc_norm", by_length
    a = float(right.mean())
    stderr = math.sqrt(a * (1 - a) / (n - 1)) if n > 1 else math.nan
    return TaskScore(task.name, n, acc, acc_norm, chance, stderr, metric, perplexity, right)


def _best(row: Sequence[Likelihood], lengths: Sequence[int] | None = None) -> int:
    lengths = lengths or [1] * len(row)
    return int(np.argmax([one.total / by for one, by in zip(row, lengths, strict=True)]))


def _example(row: Any, where: str) -> tuple[str, Example]:
    if "choices" in row:
        kind, pairs = "choice", tuple((row["context"], choice) for choice in row["choices"])
    elif "contexts" in row:
        kind, pairs = "partial", tuple((one, row["continuation"]) for one in row["contexts"])
    else:
        kind, pairs = "last word", ((row["context"], row["continuation"]),)
    answer = 0 if kind == "last word" else row["answer"]
    fits = isinstance(answer, int) and 0 <= answer < len(pairs)
    fits = fits and all(isinstance(text, str) for pair in pairs for text in pair)
    if not fits or not all(more for _, more in pairs):
        raise ValueError(f"the example on {where} does not fit together")
    return kind, Example(pairs, answer)
