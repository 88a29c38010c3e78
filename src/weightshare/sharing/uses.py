"""Which parameters of a model are shared, and by which uses.

A *use* is one place where a weight takes effect. Three kinds are found without being told: one
``Parameter`` registered under several names (tied weights), one module registered under several
names, and, when an example call is given, one module that runs several times in a forward. What
inspection cannot see, a slice or a gather of a larger weight, the module says itself:

    class Entangled(nn.Module):
        def shared_uses(self):
            return {"weight": {"3x3": lambda w: w[..., 1:4, 1:4], "5x5": lambda w: w}}
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from weightshare.errors import UserError
from weightshare.sharing.preserve import preserved


@dataclass(frozen=True)
class View:
    """What a use sees of a shared weight: ``take(parameter)``, known by its ``label``."""

    label: str
    take: Callable[[Tensor], Tensor] = field(compare=False, repr=False)


class DeclaresUses(Protocol):
    """A module that says which slices or gathers of its parameters are uses of their own."""

    def shared_uses(self) -> Mapping[str, Mapping[str, Callable[[Tensor], Tensor]]]:
        """``{parameter name: {use: what it sees}}``; names are relative to the module."""


@dataclass(frozen=True)
class Use:
    """One place where a weight takes effect.

    ``module`` is the qualified name of the module that holds the weight as ``name``; ``call``
    numbers the runs of that module inside one forward; ``view`` is None where the whole weight is
    used.
    """

    module: str
    name: str
    call: int = 0
    view: View | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        call = f"#{self.call}" if self.call else ""
        return path + call + (f"[{self.view.label}]" if self.view else "")


@dataclass(frozen=True, eq=False)
class SharedWeight:
    """A parameter with more than one use; ``name`` is the first name it is registered under."""

    name: str
    parameter: nn.Parameter
    uses: tuple[Use, ...]

    @property
    def saved(self) -> int:
        """Parameters that sharing saves: what the uses see in all, less what is stored."""
        return sum(used_elements(self.parameter, use) for use in self.uses) - (
            self.parameter.numel()
        )


def find_shared(model: nn.Module, example: Any = None) -> list[SharedWeight]:
    """The shared weights of ``model`` with their uses, in the order of ``named_parameters()``.

    Args:
        example: one call of the model (a mapping is passed as keywords, a tuple as positional
            arguments, anything else as the only argument). With it the model runs once, and a
            module that ran n times counts n uses; without it only what is registered is seen.
    """
    calls = count_calls(model, example) if example is not None else {}
    uses = find_uses(model, calls)
    return [
        SharedWeight(name, parameter, uses[parameter])
        for name, parameter in model.named_parameters()
        if len(uses[parameter]) > 1
    ]


def find_uses(
    model: nn.Module, calls: Mapping[nn.Module, int] | None = None
) -> dict[nn.Parameter, tuple[Use, ...]]:
    """Every parameter of ``model`` with all its uses, shared or not."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)

    uses: dict[nn.Parameter, list[Use]] = {}
    declared: dict[nn.Parameter, list[Use]] = {}
    for module, names in paths.items():
        runs = max(len(names), (calls or {}).get(module, 0))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(parameter, []).extend(Use(names[0], name, c) for c in range(runs))
        if (declares := getattr(module, "shared_uses", None)) is not None:
            for name, views in declares().items():
                parameter = named_parameter(model, names[0], name)
                for label, take in views.items():
                    use = Use(names[0], name, view=View(label, take))
                    declared.setdefault(parameter, []).append(use)
    # A declaration replaces the place where its weight is registered: it is the finer statement.
    return {p: tuple(declared.get(p, found)) for p, found in uses.items()}


def count_calls(model: nn.Module, example: Any) -> dict[nn.Module, int]:
    """How often each module runs in one call of ``model``; leaves the model as it was."""
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, _: Any) -> None:
        calls.update(acting(module))

    handles = [m.register_forward_pre_hook(count) for m in model.modules()]
    try:
        with preserved(model), torch.no_grad():
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return dict(calls)


def acting(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules whose weights a run of ``module`` reads in their place, itself first.

    Attention computes with its output projection's weights and never calls it.
    """
    return (module, module.out_proj) if isinstance(module, nn.MultiheadAttention) else (module,)


def run(model: nn.Module, example: Any) -> Any:
    """Call ``model`` on an example: a mapping as keywords, a tuple as positional arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def used_elements(parameter: Tensor, use: Use) -> int:
    """How many elements of ``parameter`` the use sees."""
    return parameter.numel() if use.view is None else use.view.take(parameter.detach()).numel()


def tie(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Make the parameters of each group one ``Parameter``; the first name of a group keeps its own.

    Only parameters are tied, never modules: each place keeps its hooks, buffers and name, and
    ``state_dict`` keeps all names. Works on the meta device. Ties survive ``deepcopy``,
    ``.to(dtype)`` and ``load_state_dict``; a move that must make new parameters (to or from the
    meta device, ``load_state_dict(assign=True)``) loses them, as PyTorch does, and ``tie`` with
    the same groups restores them.

    Raises:
        UserError: for an unknown name, a name given twice, a group that is no list of names, or
            members that differ in shape or dtype. Nothing is changed then.
    """
    groups = list(groups)
    for names in groups:
        if isinstance(names, str) or not names:
            raise UserError(f"a group is {names!r}; give the names to tie as a list in a list.")
    counted = Counter(name for group in groups for name in group)
    for name, count in counted.items():
        if count > 1:
            raise UserError(f"parameter {name!r} is named {count} times; a name ties once.")
    members = [[(name, parameter_of(model, name)) for name in group] for group in groups]
    for group in members:
        first, kept = group[0]
        for name, parameter in group[1:]:
            for what in ("shape", "dtype"):
                ours, theirs = getattr(kept, what), getattr(parameter, what)
                if ours != theirs:
                    ours, theirs = (
                        (tuple(ours), tuple(theirs)) if what == "shape" else (ours, theirs)
                    )
                    raise UserError(
                        f"{first!r} has {what} {ours} but {name!r} has {theirs}; "
                        f"tied parameters must have the same {what}."
                    )
    for group in members:
        for name, _ in group[1:]:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, group[0][1])


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Give each named parameter a copy of its own, equal in value; the others stay tied.

    A single name may be given as it is. Where all names of a tied group are given, the first keeps
    the original.

    Raises:
        UserError: for an unknown name, a parameter that is not tied, or one whose whole module is
            registered under several names (there is only one place to hold a parameter: copy the
            module first). Nothing is changed then.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    places: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    for name in names:
        owners = {holder(model, other) for other in places[parameter_of(model, name)]}
        if len(places[parameter_of(model, name)]) < 2:
            raise UserError(f"parameter {name!r} is not tied to any other; there is no tie to cut.")
        if len(owners) < len(places[parameter_of(model, name)]):
            raise UserError(
                f"{name!r} lies in a module that is registered under several names; "
                "copy the module (copy.deepcopy) to the second place first, then untie."
            )
    left = {parameter: set(found) for parameter, found in places.items()}
    for name in reversed(names):
        parameter = parameter_of(model, name)
        if len(left[parameter]) > 1:
            left[parameter].discard(name)
            path, _, leaf = name.rpartition(".")
            copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(model.get_submodule(path), leaf, copy)


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that full name, or a :class:`UserError` that says the name is unknown."""
    path, _, leaf = name.rpartition(".")
    return named_parameter(model, path, leaf)


def named_parameter(model: nn.Module, path: str, name: str) -> nn.Parameter:
    full = f"{path}.{name}" if path else name
    try:
        return model.get_parameter(full)
    except AttributeError:
        raise UserError(
            f"the model has no parameter {full!r}; see model.named_parameters() for its names."
        ) from None


def holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
