"""Who shares which weight, and do they agree? One backward pass per batch answers both."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch.distributed as dist
from torch import nn

from weightshare.audit.apart import Apart, suggest_apart
from weightshare.audit.findings import Finding, finding, opposed_first
from weightshare.audit.layers import Layer, Per, find_layers
from weightshare.audit.lookalikes import Similar, similar
from weightshare.audit.steps import Loss, Progress, alone, silent
from weightshare.audit.suggest import REACH, Metric, Suggestion, suggest
from weightshare.errors import UserError
from weightshare.sharing import (
    CountSketch,
    Gram,
    Size,
    Stable,
    all_reduce,
    displaced,
    partition,
    per_use,
    preserved,
    size,
)
from weightshare.sharing.gradients import Gradients


@dataclass(frozen=True)
class Audit:
    """The findings, most opposed layer first, and what to do about them, best first.

    ``similar`` is filled where nothing is shared: parameters that could be. ``apart`` is the trial
    that the suggestions come from, where there was one.
    """

    findings: list[Finding]
    suggestions: list[Suggestion]
    size: Size
    batches: int
    similar: list[Similar] = field(default_factory=list)
    apart: Apart | None = field(default=None, repr=False)

    @property
    def saved(self) -> int:
        """Parameters that the shared layers save, counted at every use that was seen."""
        return sum(finding.saved for finding in self.findings)

    def rows(self) -> list[dict[str, Any]]:
        """The table: one row per shared layer."""
        return [
            {
                "shared weight": f.layer.name,
                "uses": len(f.layer.users),
                "unique": f.unique,
                "saved": f.saved,
                "agreement": _rounded(f.agreement),
                "interval": f"{f.low:.2f} to {f.high:.2f}" if math.isfinite(f.low) else "-",
                "conflict rate": _rounded(f.conflict_rate),
                "most opposed": " / ".join(f.opposed) if f.opposed else "-",
            }
            for f in self.findings
        ]


def audit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    per: Per = "layer",
    sketch: int | None = 4096,
    groups: int = 2,
    rank: int = 4,
    metric: Metric = "adam",
    reach: float = REACH,
    patience: int | None = None,
    suggestions: bool = True,
    trial: Sequence[Any] = (),
    learning_rate: float = 1e-3,
    draws: int = 200,
    seed: int = 0,
    progress: Progress = silent,
) -> Audit:
    """Audit the shared weights of any PyTorch model.

    The model is left as it was: parameters, ``.grad``, buffers, modes and random streams, also
    when something raises. It is measured in the mode it comes in; dropout blurs agreement, so call
    ``eval()`` first unless the training-mode gradients are what you ask about.

    Args:
        batches: at least two. The debiased cosine compares distinct ones, so their gradients must
            be independent draws of the data.
        loss: ``loss(model, batch)``, the mean loss of the batch: a tensor with one value.
        per: ``"layer"`` looks at all tensors with the same users together, ``"tensor"`` at each.
        sketch: numbers kept of each gradient (:class:`~weightshare.sharing.CountSketch`); None
            keeps whole gradients of all batches.
        groups: into how many groups a layer's users may be split.
        rank: of suggested low-rank deltas.
        metric: in which gains are predicted; see :func:`~weightshare.audit.predict`.
        reach: how far predictions are believed, as a share of the weights' norm.
        patience: stop after the grouping of every layer has come out the same so often in a row
            (from the fourth batch on); None uses all batches.
        suggestions: whether to work out what unsharing would gain: one more pass over the batches,
            and eight forward and backward passes for each of the layers' three unsharings.
        trial: batches, not among ``batches``, of a trial that trains every use apart, one step
            each; suggestions then come from it (:class:`~weightshare.audit.Apart`) and ``metric``
            is not used. Costs the memory of training the model with nothing shared.
        learning_rate: of the trial.
        draws: permutations of the null that says whether users disagree beyond chance.
        progress: told what is being done.

    Under ``torch.distributed`` each rank brings its share of every batch to a model wrapped in
    DistributedDataParallel; gradients are averaged as DDP averages them, and all ranks return what
    one process would on the whole batches.

    Raises:
        UserError: fewer than two batches (four with a trial), a first batch that does not fit, a
            loss that is not finite, settings out of range, a trial on several ranks, re-entrant
            checkpointing, any checkpointing where ``suggestions`` are asked for.
    """
    _check(per, metric, groups=groups, rank=rank, draws=draws)
    batches = list(batches)
    if len(batches) < 2:
        raise UserError(
            f"audit got {len(batches)} batches; it needs at least two, better sixteen, "
            "because agreement is measured between distinct batches."
        )
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not any(parameter.requires_grad for parameter in inner.parameters()):
        raise UserError(
            "every parameter of the model is frozen, so none has a gradient to compare; "
            "call requires_grad_() on those to audit."
        )
    reduce = all_reduce if inner is not model and dist.is_initialized() else alone
    if trial and reduce is all_reduce:
        raise UserError("a trial runs in one process; leave it out, or audit on one rank.")
    with preserved(model):
        layers = first_look(model, inner, batches[0], loss, per, suggestions)
        if not layers:
            return Audit([], [], size(inner), len(batches), similar(inner))
        grams = {layer: Gram(layer.users) for layer in layers}
        keep = CountSketch(sketch, seed) if sketch else None
        names = sorted({name for layer in layers for name in layer.tensors})
        stable = {layer: Stable(patience or 1) for layer in layers}
        used = 0
        with per_use(model, names, keep=keep) as uses:
            for batch in batches:
                gradients = reduce(uses.gradients(loss(model, batch)))
                for layer, gram in grams.items():
                    gram.update(by_user(layer, gradients))
                used += 1
                progress(f"measured batch {used} of {len(batches)}")
                if patience and _settled(stable, grams, groups) and used >= 4:
                    break
        findings = [
            finding(inner, layer, gram.close(), groups=groups, draws=draws, seed=seed)
            for layer, gram in grams.items()
        ]
        findings = opposed_first(findings)
        advice, apart = [], None
        if suggestions and trial:
            progress(f"training every use apart for {len(trial)} steps")
            apart = Apart(
                inner, trial, batches[:used], loss, layers, learning_rate=learning_rate, seed=seed
            )
            advice = suggest_apart(apart, findings, groups=groups, rank=rank)
        elif suggestions:
            advice = suggest(
                inner,
                batches[:used],
                loss,
                findings,
                rank=rank,
                metric=metric,
                reach=reach,
                reduce=reduce,
                progress=progress,
            )
    return Audit(findings, advice, size(inner), used, apart=apart)


def _check(per: str, metric: str, **counts: int) -> None:
    for given, allowed in ((per, get_args(Per)), (metric, get_args(Metric))):
        if given not in allowed:
            raise UserError(f"{given!r} is not known; choose one of {', '.join(allowed)}.")
    for name, least in (("groups", 2), ("rank", 1), ("draws", 1)):
        if counts[name] < least:
            raise UserError(f"{name} is {counts[name]}; give at least {least}.")


def first_look(
    model: nn.Module, inner: nn.Module, batch: Any, loss: Loss, per: Per, suggestions: bool
) -> list[Layer]:
    """The shared layers, from one forward; what cannot be measured is refused here."""
    with per_use(model) as uses:
        try:
            value = loss(model, batch)
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AttributeError) as error:
            told = str(error).strip().splitlines()
            raise UserError(
                f"the first batch does not fit the model ({type(error).__name__}: "
                f"{told[0] if told else 'no message'}); "
                "check that loss(model, batch) works on it outside the audit."
            ) from error
        layers = find_layers(inner, uses.seen, uses.calls, per)
        if not layers:
            uses.gradients(value)  # re-entrant checkpointing hides the runs of a loop
        del value
    if layers and suggestions:
        with displaced(inner, {name: {} for layer in layers for name in layer.tensors}):
            loss(model, batch)
    return layers


def by_user(layer: Layer, gradients: Gradients[Any]) -> Gradients[str]:
    """Per-use gradients with the users' labels as keys."""
    return {
        name: {users[use]: g for use, g in gradients.get(name, {}).items() if use in users}
        for name, users in layer.tensors.items()
    }


def _settled(stable: dict[Layer, Stable], grams: dict[Layer, Gram], groups: int) -> bool:
    """Whether every layer's grouping has come out the same often enough."""

    def decision(gram: Gram) -> Any:
        try:
            return partition(gram.distance(), groups).groups
        except UserError:
            return None

    return all([stable[layer].update(decision(gram)) for layer, gram in grams.items()])  # noqa: C419


def _rounded(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
