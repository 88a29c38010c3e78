"""A folded language model keeps its plan in its configuration; unsharing blocks is a new plan."""

from typing import Any

from torch import nn

from weightshare.audit.suggest import Suggestion, Unsharing
from weightshare.errors import UserError
from weightshare.folding import FoldPlan


def is_folded(model: nn.Module) -> bool:
    """Whether ``model`` was made by ``weightshare.folding``."""
    return isinstance(getattr(getattr(model, "config", None), "fold_plan", None), dict)


def unshared_plan(model: nn.Module, suggestion: Suggestion | Unsharing) -> FoldPlan:
    """The plan of the folded model in which a group of blocks is split as suggested.

    Raises:
        UserError: the model is not folded, or the suggestion is none that a plan can say: a plan
            splits whole blocks, it has no place for scales, deltas or single matrices.
    """
    unsharing = suggestion.unsharing if isinstance(suggestion, Suggestion) else suggestion
    if not is_folded(model):
        raise UserError("the model was not folded by weightshare; apply() unshares it in place.")
    plan: dict[str, Any] = model.config.fold_plan  # type: ignore[union-attr, assignment]
    if unsharing.kind != "unshare":
        raise UserError(
            f"a fold plan cannot say {unsharing.kind!r}, only which blocks share their weights; "
            "choose a suggestion of kind 'unshare', or use apply() on the live model."
        )
    remaining = sorted(block for group in plan["groups"] for block in group)
    depths = {user: _depth(user) for user in unsharing.layer.users}
    blocks = {user: remaining[depth] for user, depth in depths.items() if depth is not None}
    together = tuple(sorted(blocks.values()))
    old = [tuple(sorted(group)) for group in plan["groups"]]
    if len(blocks) < len(unsharing.layer.users) or together not in old:
        raise UserError(
            f"{unsharing.layer.name!r} is not a group of blocks of the fold; "
            f"its groups are {[list(group) for group in old if len(group) > 1]}."
        )
    names = {
        name
        for name in model.block_ties.values()  # type: ignore[operator, union-attr]
        if name.startswith(tuple(f"{user}." for user in unsharing.layer.users))
    }
    if names - set(unsharing.layer.tensors):
        raise UserError(
            "a fold plan splits whole blocks, but the suggestion is about "
            f"{len(unsharing.layer.tensors)} of {len(names)} tensors; audit per layer instead."
        )
    missing = [user for user in blocks if unsharing.group_of(user) is None]
    parts = [[blocks[user] for user in group] for group in unsharing.groups]
    parts[0] += [blocks[user] for user in missing]
    groups = [group for group in old if group != together] + [tuple(sorted(p)) for p in parts]
    return FoldPlan.from_dict({**plan, "groups": groups, "representatives": None})


def record(model: nn.Module, plan: FoldPlan) -> None:
    """Write the new plan into the model, so that it saves and loads with its new groups."""
    model.config.fold_plan = plan.to_dict()  # type: ignore[union-attr]
    model._block_ties = None  # type: ignore[assignment]
    model._tie_blocks()  # type: ignore[operator]


def _depth(user: str) -> int | None:
    head, _, last = user.rpartition(".")
    return int(last) if head.endswith("layers") and last.isdigit() else None
