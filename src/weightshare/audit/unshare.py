"""Do what a suggestion says, in place, without changing what the model computes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightshare.audit.suggest import Suggestion
from weightshare.audit.unsharing import SAYS, Unsharing
from weightshare.errors import UserError
from weightshare.sharing import Use
from weightshare.sharing.aliases import recomputing
from weightshare.sharing.uses import acting

if TYPE_CHECKING:
    from weightshare.folding import FoldPlan


def apply(
    model: nn.Module, suggestion: Suggestion | Unsharing, *, seed: int = 0
) -> "nn.Module | FoldPlan":
    """Unshare in place; the model computes the same numbers, bit for bit, until it is trained.

    Returns the model or, where it is a folded language model, its new
    :class:`~weightshare.folding.FoldPlan`: the model saves, loads and unfolds with what was added.

    In any other model a group other than the first gets, where the weight is tied across modules,
    a parameter of its own (``unshare``), or a parametrization of the tied weight (``scale``,
    ``low_rank``), which :func:`merge` turns into a weight of its own. Where one module runs several
    times, a parametrization gives each group of runs its own delta.

    Low-rank deltas start at zero with their row space on the leading directions of the measured
    disagreement, or on random ones when only an :class:`Unsharing` is given.

    Raises:
        UserError: when the uses are slices of one weight inside one module, or a module reads a
            weight that another one holds: only their code can tell those apart; or when the weight
            was unshared before.
    """
    if hasattr(getattr(model, "config", None), "fold_plan"):
        from weightshare.audit.folded import unshare_folded

        return unshare_folded(model, suggestion, seed)
    unsharing = suggestion.unsharing if isinstance(suggestion, Suggestion) else suggestion
    bases = suggestion.directions if isinstance(suggestion, Suggestion) else {}
    if unsharing.kind == "nothing":
        return model
    generator = torch.Generator().manual_seed(seed)
    plans = {
        name: _uses_by_group(model, name, unsharing, users)
        for name, users in unsharing.layer.tensors.items()
    }
    for name, groups in plans.items():
        weight = model.get_parameter(name)
        modules = {(use.module, use.name) for uses in groups.values() for use in uses}
        make = _Maker(unsharing, weight, name, bases, generator)
        if len(modules) == 1:
            _by_call(model, modules.pop(), groups, make)
        else:
            _by_module(model, groups, make)
    _head_of_its_own(model)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Turn scales and deltas of tied modules into weights of their own, in place.

    Modules that share a delta share the merged weight. The deltas of a loop stay: its one module
    cannot hold two weights. (``parametrize.remove_parametrizations`` would write the merged values
    into the tied weight, and so into every other use.)
    """
    merged: dict[tuple[int, int], nn.Parameter] = {}
    for module in model.modules():
        for name in list(getattr(module, "parametrizations", {})):
            chain: Any = module.parametrizations[name]  # type: ignore[index, union-attr]
            if len(chain) != 1 or not isinstance(chain[0], Scaled | LowRank):
                continue
            key = id(chain.original), id(chain[0])
            if key not in merged:
                merged[key] = nn.Parameter(
                    getattr(module, name).detach().clone(), chain.original.requires_grad
                )
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, merged[key])
    _head_of_its_own(model)
    return model


def _head_of_its_own(model: Any) -> None:
    """Transformers would tie an untied head again on load: the configuration must know."""
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        own = getattr(model.get_output_embeddings(), "_parameters", {}).get("weight")
        if own is not None and own is not model.get_input_embeddings().weight:
            model.config.tie_word_embeddings = False


class Scaled(nn.Module):
    """``weight · (1 + s / m)`` with a number s per row, zero at first; m is the weight's rms.

    Divided by m, a step of Adam on s moves the weight about as far as one on the weight itself.
    """

    unit: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(weight.new_zeros(len(weight)))
        rms = weight.detach().square().mean().sqrt()
        self.register_buffer("unit", torch.where(rms > 0, rms, 1.0).reciprocal())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.unit * self.scale.view(-1, *[1] * (weight.ndim - 1)))


class LowRank(nn.Module):
    """``weight + B A``; B is zero at first, A spans where the groups were seen to disagree.

    A's entries are 1 / √rank in root mean square, so that a step of Adam on B moves the weight
    about as far as one on the weight itself: larger ones along large activations went too far.
    """

    def __init__(self, weight: Tensor, rows: Tensor) -> None:
        super().__init__()
        size = len(rows) ** 0.5 * rows.square().mean().sqrt()
        self.a = nn.Parameter((rows / size).to(weight).contiguous())
        self.b = nn.Parameter(weight.new_zeros(len(weight), len(rows)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


class Moved(nn.Module):
    """``weight + delta``: a weight of its own for some of the runs of one module."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


class PerCall(nn.Module):
    """The weight as each run of a module sees it: ``groups[call]`` chooses the delta.

    Calls are counted from the start of each forward of the whole model.
    """

    def __init__(self, groups: list[int], deltas: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.groups = groups
        self.deltas = nn.ModuleDict({str(number): delta for number, delta in deltas.items()})
        self.call = -1

    def begin(self, *_: Any) -> None:
        """Hook of the model: a new forward begins."""
        self.call = -1

    def next_call(self, *_: Any) -> None:
        """Hook of the module that reads the weight."""
        if recomputing():
            raise UserError(
                "the runs of an unshared loop cannot be told apart when checkpointing recomputes "
                "them; switch checkpointing off for this model."
            )
        self.call += 1

    def forward(self, weight: Tensor) -> Tensor:
        if not 0 <= self.call < len(self.groups):
            return weight
        group = str(self.groups[self.call])
        result: Tensor = self.deltas[group](weight) if group in self.deltas else weight
        return result


class _Maker:
    """The delta of one group of one tensor."""

    def __init__(
        self,
        unsharing: Unsharing,
        weight: Tensor,
        name: str,
        bases: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> None:
        self.unsharing, self.weight, self.name = unsharing, weight, name
        self.bases, self.generator = bases, generator

    @property
    def copies(self) -> bool:
        return self.unsharing.kind == "unshare" or (
            self.unsharing.kind == "scale" and self.weight.ndim < 2
        )

    @property
    def idle(self) -> bool:
        return self.unsharing.kind == "low_rank" and self.weight.ndim < 2

    def delta(self, group: int) -> nn.Module:
        if self.copies:
            return Moved(self.weight)
        if self.unsharing.kind == "scale":
            return Scaled(self.weight)
        rank, columns = self.unsharing.rank_of(self.weight), self.weight[0].numel()
        rows = self.bases.get(f"{self.name}@{group}")
        if rows is None:
            rows = torch.randn(rank, columns, generator=self.generator)
        return LowRank(self.weight, rows[:rank])


def _uses_by_group(
    model: nn.Module, name: str, unsharing: Unsharing, users: Mapping[Use, str]
) -> dict[int, list[Use]]:
    groups: dict[int, list[Use]] = {}
    weight = model.get_parameter(name)
    for use, user in users.items():
        group = unsharing.group_of(user)
        if use.view is not None:
            raise UserError(
                f"the uses of {name!r} are slices taken inside one module; "
                f"it cannot be given {SAYS[unsharing.kind]} from outside."
            )
        holder = model.get_submodule(use.module)
        own = isinstance(getattr(holder, use.name, None), nn.Parameter)
        changed = own and getattr(holder, use.name) is not weight
        if changed or parametrize.is_parametrized(holder, use.name):
            raise UserError(
                f"{use} has been unshared before; apply one suggestion per shared weight, "
                "or merge(model) and audit again."
            )
        if getattr(holder, use.name, None) is not weight:
            raise UserError(
                f"{use.module or 'the model'} reads {name!r} from another module; register the "
                "parameter where it is used (module.weight = other.weight) to unshare it."
            )
        groups.setdefault(0 if group is None else group, []).append(use)
    return groups


def _by_module(model: nn.Module, groups: Mapping[int, list[Use]], make: _Maker) -> None:
    """Modules of their own hold one Parameter: each later group gets a parameter or a delta."""
    for number in sorted(set(groups) - {0}):
        places = dict.fromkeys((use.module, use.name) for use in groups[number])
        if make.idle:
            continue
        if make.copies:
            own = nn.Parameter(make.weight.detach().clone(), make.weight.requires_grad)
            for module, name in places:
                setattr(model.get_submodule(module), name, own)
            continue
        delta = make.delta(number)
        for module, name in places:
            parametrize.register_parametrization(
                model.get_submodule(module), name, delta, unsafe=True
            )


def _by_call(
    model: nn.Module, place: tuple[str, str], groups: Mapping[int, list[Use]], make: _Maker
) -> None:
    """One module runs several times: a parametrization that knows which run it is."""
    if make.idle:
        return
    module = model.get_submodule(place[0])
    runner = next(m for m in model.modules() if module in acting(m))
    calls = {use.call: number for number, uses in groups.items() for use in uses}
    per_call = PerCall(
        [calls.get(call, 0) for call in range(max(calls) + 1)],
        {number: make.delta(number) for number in groups if number},
    )
    parametrize.register_parametrization(module, place[1], per_call, unsafe=True)
    model.register_forward_pre_hook(per_call.begin, prepend=True)
    runner.register_forward_pre_hook(per_call.next_call)
