"""A folded language model keeps its plan in its configuration; unsharing it is a new plan."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weightshare.audit.suggest import Suggestion
from weightshare.audit.unsharing import Unsharing
from weightshare.errors import UserError
from weightshare.folding import Delta, FoldPlan
from weightshare.folding.deltas import HEAD, without_empty_groups
from weightshare.sharing import Use


def is_folded(model: nn.Module) -> bool:
    """Whether ``model`` was made by ``weightshare.folding``."""
    return isinstance(getattr(getattr(model, "config", None), "fold_plan", None), dict)


def unshare_folded(model: Any, suggestion: Suggestion | Unsharing, seed: int = 0) -> FoldPlan:
    """Carry a suggestion out on a folded model, in place, and return its new plan."""
    from weightshare.folding.share import replan

    plan, rows = _planned(model, plan_of(model), suggestion, seed)
    replan(model, plan, rows)
    return plan


def plan_of(model: Any) -> FoldPlan:
    """The plan that a folded model was made by."""
    if not is_folded(model):
        raise UserError("the model was not folded by weightshare; apply() unshares it in place.")
    return FoldPlan.from_dict(model.config.fold_plan)


def unshared_plan(model: Any, *suggestions: Suggestion | Unsharing) -> FoldPlan:
    """The plan of the folded model with the suggestions carried out; the model stays as it is.

    A group of blocks is split into groups; copies of single tensors, scales and low-rank deltas
    become the plan's ``deltas``.

    Raises:
        UserError: the model is not folded, or a use would get a second delta of one weight.
    """
    plan = plan_of(model)
    for suggestion in suggestions:
        plan, _ = _planned(model, plan, suggestion)
    return plan


def _planned(
    model: Any, plan: FoldPlan, suggestion: Suggestion | Unsharing, seed: int = 0
) -> tuple[FoldPlan, dict[Delta, Tensor]]:
    """The next plan, and the row spaces that its new low-rank deltas start with."""
    unsharing = suggestion.unsharing if isinstance(suggestion, Suggestion) else suggestion
    bases = suggestion.directions if isinstance(suggestion, Suggestion) else {}
    if unsharing.kind == "nothing":
        return plan, {}
    if unsharing.kind == "unshare" and (split := _parts_of_a_group(model, plan, unsharing)):
        return _split(plan, split), {}
    generator = torch.Generator().manual_seed(seed)
    deltas = list(plan.deltas)
    rows: dict[Delta, Tensor] = {}
    for name, users in unsharing.layer.tensors.items():
        weight = model.get_parameter(name)
        parameter, parts = _places(plan, unsharing, users)
        if ".delta_" in parameter:
            deltas = _cut(deltas, unsharing, parameter, parts)
        elif unsharing.kind != "low_rank" or weight.ndim > 1:
            kind = "own" if unsharing.kind == "unshare" or weight.ndim < 2 else unsharing.kind
            rank = unsharing.rank_of(weight) if kind == "low_rank" else 0
            for number in sorted(set(parts) - {0}):
                new = Delta(parameter, parts[number], kind, rank)
                deltas = [*_room_for(new, deltas), new]
                if rank:
                    drawn = torch.randn(rank, weight[0].numel(), generator=generator)
                    rows[new] = bases.get(f"{name}@{number}", drawn)
    return replace(plan, deltas=tuple(without_empty_groups(deltas, plan.groups))), rows


def _places(
    plan: FoldPlan, unsharing: Unsharing, users: Mapping[Use, str]
) -> tuple[str, dict[int, tuple[int, ...]]]:
    """The parameter's name inside its block, and the original block numbers of each group.

    Users without a gradient stay with the first group.
    """
    if any(use.module == "lm_head" for use in users):
        return HEAD, {0: (), 1: ()}
    found: dict[int, list[int]] = {}
    for use, user in users.items():
        place = int(use.module.split(".")[2])
        found.setdefault(unsharing.group_of(user) or 0, []).append(plan.remaining[place])
    use = next(iter(users))
    inside = ".".join([*use.module.split(".")[3:], use.name])
    return inside, {number: tuple(sorted(blocks)) for number, blocks in found.items()}


def _parts_of_a_group(
    model: Any, plan: FoldPlan, unsharing: Unsharing
) -> list[tuple[int, ...]] | None:
    """The new groups, if the suggestion is about all that a group of blocks shares."""
    places = [_places(plan, unsharing, users) for users in unsharing.layer.tensors.values()]
    names = {name for name, _ in places}
    parts = list(places[0][1].values())
    block = [name for name, _ in model.model.layers[0].named_parameters()]
    private = {name for name in block if any(part in name for part in plan.private)}
    shared = {name for name in block if ".delta_" not in name} - private
    together = tuple(sorted(number for part in parts for number in part))
    return parts if together in plan.groups and shared <= names else None


def _split(plan: FoldPlan, parts: Iterable[tuple[int, ...]]) -> FoldPlan:
    """One group in several; a delta that spans the parts is cut, each part keeps its values."""
    parts = list(parts)
    together = {block for part in parts for block in part}
    groups = [*(group for group in plan.groups if not set(group) & together), *parts]
    deltas = [
        piece
        for delta in plan.deltas
        for piece in (delta.cut(parts) if set(delta.blocks) & together else [delta])
    ]
    deltas = without_empty_groups(deltas, groups)
    return replace(plan, groups=tuple(groups), representatives=None, deltas=tuple(deltas))


def _cut(
    deltas: list[Delta],
    unsharing: Unsharing,
    parameter: str,
    parts: Mapping[int, tuple[int, ...]],
) -> list[Delta]:
    """A delta that several blocks share becomes one for each group of them."""
    if unsharing.kind != "unshare":
        raise UserError(
            f"{parameter!r} is itself a delta; it can be given to fewer uses ('unshare'), "
            f"but has no {unsharing.kind} of its own."
        )
    weight = parameter.rpartition(".")[0] + ".weight"
    blocks = {block for part in parts.values() for block in part}
    result: list[Delta] = []
    for delta in deltas:
        mine = delta.parameter == weight and delta.kind != "own" and blocks <= set(delta.blocks)
        result += delta.cut(parts.values()) if mine else [delta]
    return result


def _room_for(new: Delta, deltas: Iterable[Delta]) -> list[Delta]:
    """The deltas beside a new one: a copy takes its blocks out of an older copy."""
    result: list[Delta] = []
    for delta in deltas:
        both = set(delta.blocks) & set(new.blocks)
        alike = (delta.kind == "own") == (new.kind == "own")
        if delta.parameter != new.parameter or not alike or (new.blocks and not both):
            result.append(delta)
        elif new.kind == "own":
            result += delta.cut([set(delta.blocks) - both])
        else:
            raise UserError(
                f"the blocks {sorted(both)} have a delta of {new.parameter!r} already; one weight "
                "of a use has one scale or low-rank delta."
            )
    return result
