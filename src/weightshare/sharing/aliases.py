"""Each use of a weight gets its own gradient, in the one backward pass there is anyway."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from weightshare.errors import UserError
from weightshare.sharing.ghost import GhostLinear
from weightshare.sharing.gradients import Gradients, Keep, Kept, check_finite, check_loss
from weightshare.sharing.uses import Use, View, acting, find_uses


class PerUse:
    """What :func:`per_use` yields: the uses seen so far, and their gradients after a backward.

    ``seen`` lists the uses of each parameter in the order of the forward, ``calls`` how often each
    module ran in the last forward.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], keep: Keep | None, factors: bool) -> None:
        self.names = names
        self.seen: dict[str, list[Use]] = {name: [] for name in names.values()}
        self.calls: dict[str, int] = {}
        self._keep = keep
        self._factors = factors
        self._received: Gradients[Use] = {}
        self._observing = True

    def gradients(self, loss: Tensor) -> Gradients[Use]:
        """``{parameter: {use: gradient}}`` of a scalar loss, in one backward pass.

        The graph is freed, ``.grad`` is not touched. Uses that the loss does not depend on are
        missing. The forward must have run inside the context.

        Raises:
            UserError: when the loss is not a finite scalar, or the model uses re-entrant
                checkpointing, under which the uses cannot be told apart.
        """
        check_loss(loss)
        self._observing = False  # nothing flows on to the parameters: their own sum is not wanted
        try:
            torch.autograd.grad(loss, list(self.names), allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise UserError(
                "the model uses re-entrant checkpointing, whose recomputation hides the uses of a "
                "weight; pass use_reentrant=False to torch.utils.checkpoint "
                "(gradient_checkpointing_kwargs={'use_reentrant': False} in Transformers)."
            ) from None
        finally:
            self._observing = True
        received = self.take()
        check_finite(loss)
        return received

    def take(self) -> Gradients[Use]:
        """What has arrived since the last call; for use after an ordinary ``loss.backward()``.

        In that mode one backward gives both: the parameters' ``.grad`` and the gradient of each
        use (:func:`per_use` with ``factors`` cannot do this, it forms no weight gradient).
        """
        received, self._received = self._received, {}
        return {  # in the order of the forward, whatever order the backward took
            name: {use: received[name][use] for use in seen if use in received[name]}
            for name, seen in self.seen.items()
            if name in received
        }

    def receive(self, name: str, use: Use, gradient: Kept) -> None:
        if isinstance(gradient, Tensor):
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            gradient = self._keep(name, gradient) if self._keep else gradient.detach()
        uses = self._received.setdefault(name, {})
        uses[use] = uses[use] + gradient if use in uses else gradient  # type: ignore[operator]


@contextmanager
def per_use(
    model: nn.Module,
    weights: Collection[str] | None = None,
    *,
    keep: Keep | None = None,
    factors: bool = False,
) -> Iterator[PerUse]:
    """Tell the uses of ``model``'s weights apart while its forward runs.

    Inside the context every operation that reads one of the weights reads an alias of it that
    belongs to the running module and its call number. The forward computes the same numbers; the
    backward sends each use's gradient to its own place::

        with per_use(model) as uses:
            gradients = uses.gradients(loss(model(batch)))

    Nothing is written to the model but what any forward writes (statistics of batch norm, random
    streams), which ``with preserved(model), per_use(model) as uses`` puts back.

    Works under autocast, non-re-entrant checkpointing and DDP (whose synchronisation is off
    inside: each rank sees its own gradients, see :func:`all_reduce`). A model compiled by
    ``torch.compile`` is not looked into: pass the original module.

    Args:
        weights: names of the parameters to watch; by default all that require a gradient.
        keep: what to keep of a gradient the moment it arrives, called with the parameter's name,
            for example a :class:`~weightshare.sharing.CountSketch`: K full gradients of a large
            weight then never exist together.
        factors: where a weight is the matrix of a linear layer, keep its gradient as
            :class:`~weightshare.sharing.ghost.Factors` and never form it.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if hasattr(inner, "_orig_mod"):
        raise UserError(
            "the model was compiled by torch.compile, which hides the uses of its weights; "
            "pass the model it was made from."
        )
    names = {
        parameter: name
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad and (weights is None or name in weights)
    }
    if weights is not None and len(names) < len(set(weights)):
        missing = sorted(set(weights) - set(names.values()))
        raise UserError(
            f"the model has no trainable parameter {missing[0]!r} (under its first name); "
            "see find_shared(model) for the names of its shared weights."
        )
    record = PerUse(names, keep, factors)
    with ExitStack() as stack:
        if inner is not model:
            stack.enter_context(model.no_sync())  # type: ignore[operator]
        stack.enter_context(_Aliasing(inner, record))
        yield record


@contextmanager
def displaced(
    model: nn.Module, offsets: Mapping[str, Mapping[Use, Tensor]], amount: Tensor | float = 1.0
) -> Iterator[None]:
    """Each use reads ``weight + amount · offset`` of its own; nothing is written to the model.

    The loss as a function of a scalar tensor ``amount`` is what unsharing a weight along these
    offsets would do: its first two derivatives at zero are the slope and the curvature.

    Raises:
        UserError: in the forward, under checkpointing.
    """
    names = {p: name for name, p in model.named_parameters() if name in offsets}
    record = PerUse(names, keep=None, factors=False)
    with _Aliasing(model, record, offsets, amount):
        yield


def use(parameter: Tensor, label: str) -> Tensor:
    """Mark one of several uses of ``parameter`` inside one forward of one module.

    A module that slices or gathers a weight for several purposes reads it through this, with the
    labels of its ``shared_uses()``: ``use(self.weight, "3x3")[..., 1:4, 1:4]``. Outside
    :func:`per_use` it returns the parameter itself.
    """
    if not _ACTIVE:
        return parameter
    with torch._C.DisableTorchFunctionSubclass():
        return _ACTIVE[-1].alias(parameter, label)


class _Alias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, record: PerUse, use: Use, name: str) -> Tensor:  # type: ignore[override]
        ctx.record, ctx.use, ctx.name = record, use, name
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        ctx.record.receive(ctx.name, ctx.use, gradient)
        return gradient if ctx.record._observing else None, None, None, None


# Properties whose result carries a gradient; reading any other one (shape, dtype) is not a use.
_DIFFERENTIABLE = {
    getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")
}
_BACKWARD = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}


class _Watched:
    """Mixed into the class of each watched parameter while its model is looked at.

    PyTorch then asks here about every operation that reads one of them, and about no other: a
    ``TorchFunctionMode`` would be asked about all, which cost a third of a small model's step.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _ACTIVE[-1].read(func, args, kwargs or {})


@cache
def _watched(kind: type) -> type:
    return type(kind)(kind.__name__, (_Watched, kind), {})


class _Aliasing:
    """Hand out one alias per (parameter, running module, call, label)."""

    def __init__(
        self,
        model: nn.Module,
        record: PerUse,
        offsets: Mapping[str, Mapping[Use, Tensor]] | None = None,
        amount: Tensor | float = 1.0,
    ) -> None:
        self.record = record
        self.offsets = offsets
        self.amount = amount
        self.model = model
        self.ids = {id(parameter) for parameter in record.names}
        self.paths = {module: path for path, module in model.named_modules()}
        self.own = {
            (module, parameter): (self.paths[holder], name)
            for module in model.modules()
            for holder in acting(module)
            for name, parameter in holder._parameters.items()
            if parameter is not None
        }
        declared = any(hasattr(module, "shared_uses") for module in model.modules())
        self.views = {
            (parameter, u.view.label): u
            for parameter, uses in (find_uses(model) if declared else {}).items()
            for u in uses
            if u.view
        }
        self.aliases: dict[tuple[nn.Parameter, Use], Tensor] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.running: list[tuple[nn.Module, int]] = []
        self.handles: list[Any] = []
        self.kinds: dict[nn.Parameter, type] = {p: type(p) for p in record.names}

    def __enter__(self) -> "_Aliasing":
        for module in filter(_may_read, self.paths):
            self.handles += [
                module.register_forward_pre_hook(self._begin, prepend=True),
                module.register_forward_hook(self._end, always_call=True),
            ]
        # Optimizers take their fast path for plain parameters only.
        self.handles += [
            register_optimizer_step_pre_hook(self._rest),
            register_optimizer_step_post_hook(self._watch),
        ]
        _ACTIVE.append(self)
        self._watch()
        return self

    def __exit__(self, *error: Any) -> None:
        self._rest()
        _ACTIVE.remove(self)
        for handle in self.handles:
            handle.remove()

    def _watch(self, *_: Any) -> None:
        for parameter, kind in self.kinds.items():
            parameter.__class__ = _watched(kind)

    def _rest(self, *_: Any) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for parameter, kind in self.kinds.items():
                parameter.__class__ = kind

    def _begin(self, module: nn.Module, _: Any) -> None:
        if recomputing():
            return
        if module is self.model and not self.running:  # a new forward: calls count from 0 again
            self.calls.clear()
            self.aliases.clear()
            self.record.calls.clear()
        self.running.append((module, self.calls[module]))
        for runs in acting(module):
            self.calls[runs] += 1
            self.record.calls[self.paths[runs]] = self.calls[runs]

    def _end(self, module: nn.Module, *_: Any) -> None:
        if not recomputing() and self.running:
            self.running.pop()

    def alias(self, parameter: Tensor, label: str | None = None) -> Tensor:
        name = self.record.names.get(parameter)  # type: ignore[call-overload]
        if name is None or recomputing() or not (torch.is_grad_enabled() or self.offsets):
            return parameter
        assert isinstance(parameter, nn.Parameter)
        if self.offsets is not None:
            _refuse_checkpointing("the uses of a weight cannot be moved apart")
        use = self._current(parameter, label)
        if (parameter, use) not in self.aliases:
            if use not in self.record.seen[name]:
                self.record.seen[name].append(use)
            if self.offsets is None:
                alias = _Alias.apply(parameter, self.record, use, name)
            else:
                offset = self.offsets[name].get(use)
                alias = parameter
                if offset is not None:
                    alias = (parameter + self.amount * offset).to(parameter.dtype)
            self.aliases[parameter, use] = alias
        return self.aliases[parameter, use]

    def _current(self, parameter: nn.Parameter, label: str | None) -> Use:
        module, call = self.running[-1] if self.running else (self.model, 0)
        if label is not None:
            known = self.views.get((parameter, label))
            view = known.view if known else View(label, lambda w: w)
            path, name = (known.module, known.name) if known else (self.paths[module], label)
            return Use(path, name, call, view)
        # A module may read a weight that another one holds: the reader is the user.
        foreign = self.paths[module], self.record.names[parameter]
        return Use(*self.own.get((module, parameter), foreign), call)

    def read(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """``func`` with the aliases of the weights among its arguments."""
        reads_property = getattr(func, "__name__", "") in ("__get__", "__set__")
        if func in _BACKWARD or (reads_property and func not in _DIFFERENTIABLE):
            return func(*args, **kwargs)
        if func is F.linear and self.record._factors and not recomputing():
            return self._linear(*args, **kwargs)
        return func(*map(self._swap, args), **{k: self._swap(v) for k, v in kwargs.items()})

    def _swap(self, value: Any) -> Any:
        if id(value) in self.ids:
            return self.alias(value)
        if isinstance(value, list | tuple) and any(id(v) in self.ids for v in value):
            return type(value)(map(self._swap, value))
        return value

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        name = self.record.names.get(weight)  # type: ignore[call-overload]
        if name is None or not torch.is_grad_enabled():
            return F.linear(input, weight, self._swap(bias))
        assert isinstance(weight, nn.Parameter)
        _refuse_checkpointing("factors cannot be kept")
        use = self._current(weight, None)
        if use not in self.record.seen[name]:
            self.record.seen[name].append(use)
        return GhostLinear.apply(
            input, weight, self._swap(bias), lambda f: self.record.receive(name, use, f)
        )


def _may_read(module: nn.Module) -> bool:
    """Whether a module can be the reader of a weight: not so PyTorch's activations and dropouts."""
    built_in = type(module).__module__.startswith("torch.nn.modules.")
    return not built_in or bool(module._parameters) or bool(module._modules)


_ACTIVE: list[_Aliasing] = []


def _refuse_checkpointing(what: str) -> None:
    """What is recomputed reads the ordinary weight in the ordinary layer: another model."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and torch.is_grad_enabled():
        raise UserError(
            f"{what} under checkpointing or saved-tensor hooks; switch checkpointing off for this "
            "measurement (the gradients of the uses themselves can be had with it)."
        )


def recomputing() -> bool:
    """Whether a backward is running: what a forward does then repeats what it did before."""
    return torch._C._current_graph_task_id() != -1
