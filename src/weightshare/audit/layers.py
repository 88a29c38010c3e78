"""What is audited together: shared tensors with the same users."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from weightshare.sharing import Use
from weightshare.sharing.uses import find_uses

Per = Literal["layer", "tensor"]


@dataclass(frozen=True)
class Layer:
    """Shared tensors that the same users use, such as the matrices of two folded blocks.

    ``tensors`` gives for every tensor which use belongs to which user.
    """

    name: str
    users: tuple[str, ...]
    tensors: Mapping[str, Mapping[Use, str]] = field(compare=False)

    def __hash__(self) -> int:
        return hash((self.name, self.users))


def find_layers(
    model: nn.Module, seen: Mapping[str, Sequence[Use]], calls: Mapping[str, int], per: Per
) -> list[Layer]:
    """The layers of ``model`` whose tensors had or should have had more than one use.

    ``seen`` are the uses of one forward, ``calls`` how often each module ran; a use that is
    registered but was not seen is a user too, one that never gets a gradient.
    """
    registered = find_uses(model)
    shared: dict[str, dict[Use, str]] = {}
    for name, parameter in model.named_parameters():
        if name in seen:
            extra = [use for use in registered[parameter] if use not in seen[name]]
            users = label_uses([*seen[name], *extra], calls)
            if len(users) > 1:
                shared[name] = users
    if per == "tensor":
        return [Layer(name, tuple(users.values()), {name: users}) for name, users in shared.items()]
    together: dict[tuple[str, ...], dict[str, dict[Use, str]]] = {}
    for name, users in shared.items():
        together.setdefault(tuple(users.values()), {})[name] = users
    return [Layer(layer_name(users), users, tensors) for users, tensors in together.items()]


def label_uses(uses: Sequence[Use], calls: Mapping[str, int]) -> dict[Use, str]:
    """Short names for the uses of one tensor, equal for all tensors of the same users.

    ``layers.5.mlp.up.weight`` and ``layers.6.mlp.up.weight`` are the users ``layers.5`` and
    ``layers.6``; the runs of a looped module are numbered behind the name of the outermost module
    that runs as often; a declared slice goes by its label.
    """
    paths = [[*use.module.split("."), *use.name.split(".")] for use in uses]
    same = min((len(path) for path in paths), default=1) - 1
    tail = 0
    while tail < same and len({path[-1 - tail] for path in paths}) == 1:
        tail += 1
    alike = len({tuple(path) for path in paths}) == 1
    labels: dict[Use, str] = {}
    for use, path in zip(uses, paths, strict=True):
        if use.view is not None:
            base = use.view.label if alike else f"{'.'.join(path)}[{use.view.label}]"
        elif alike:
            base = _looped(use.module, calls)
        else:
            base = ".".join(path[: len(path) - tail]) or "the model"
        repeats = sum((u.module, u.name, u.view) == (use.module, use.name, use.view) for u in uses)
        labels[use] = f"{base}#{use.call}" if repeats > 1 else base
    return labels


def _looped(module: str, calls: Mapping[str, int]) -> str:
    """The outermost module around ``module`` that runs as often as it."""
    parts = module.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if calls.get(outer, 0) == calls.get(module, 0) > 1:
            return outer
    return module


def layer_name(users: Sequence[str]) -> str:
    """``layers.{5,6}`` for two blocks, ``block (4 calls)`` for a loop, else the users joined."""
    bases = list(dict.fromkeys(user.split("#")[0] for user in users))
    if len(bases) == 1:
        return f"{bases[0]} ({len(users)} calls)"
    split = [base.rpartition(".") for base in bases]
    heads = {head for head, _, _ in split}
    if len(heads) == 1 and heads != {""}:
        return f"{heads.pop()}.{{{','.join(last for _, _, last in split)}}}"
    return " + ".join(bases)
