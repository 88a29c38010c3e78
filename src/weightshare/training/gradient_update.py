"""One optimizer step on a loss of sums and counts, whatever parts and ranks they come from."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from weightshare.errors import UserError
from weightshare.training import optimizer_state
from weightshare.training.config import LoopConfig
from weightshare.training.learning_rate import schedule as schedule_of
from weightshare.training.losses import Losses, Term, count_of, positive
from weightshare.training.place import Place
from weightshare.training.state import State, copy_into, join, part
from weightshare.training.trees import split, to_device
from weightshare.training.update import Metrics, Update

Parts = Callable[[Any], Iterable[tuple[Any, float]]]
Observer = Callable[[Any, Losses, dict[str, Tensor]], None]


class GradientUpdate(Update):
    r"""One optimizer step on the loss of a whole batch, over its parts and all ranks.

    .. math::
        L = \sum_k w_k \frac{\sum_{p,r} a_p\, s_{k,p,r}}{\sum_{p,r} c_{k,p,r}}

    :math:`s_{k,p,r}` and :math:`c_{k,p,r}` are the sum and count of term k in part p of the batch
    on rank r, :math:`w_k` the term's weight, :math:`a_p` the part's. Counts are gathered before the
    one division, so cutting a batch into parts or over ranks changes nothing but float rounding.
    Only ``params`` are differentiated; every ``.grad`` is None again when the step is done.

    Args:
        task: module with ``forward(batch) -> Losses``; its train/eval modes are left as they are.
        optimizer: any torch optimizer without closure, over parameters of ``task``.
        params: those to differentiate; default all of the optimizer's that require a gradient.
        clip: largest global gradient norm, or None.
        ema: decay of the running average of the weights, or None. After n steps the decay is
            ``min(ema, (1 + n) / (10 + n))``, so that the start is forgotten in short runs too.
        parts: number of parts a batch is cut into (gradient accumulation), or a function from the
            prepared batch to ``(inputs, weight)`` pairs that are differentiated one after another
            (several paths through a supernet). The weight scales a part's sums, not its counts.
        observers: called with ``(batch, losses, gradients)`` after the gradients are complete and
            before clipping: ``losses`` hold the gathered sums and counts, ``gradients`` the tensors
            themselves by parameter name (clone what is kept).
        schedule: factor on each group's learning rate by step.

    Several parts with terms counted by different tensors cost one backward pass per count (see
    ``Term``), because the counts are only known at the end.
    """

    def __init__(
        self,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        params: Iterable[nn.Parameter] | None = None,
        clip: float | None = None,
        ema: float | None = None,
        parts: int | Parts = 1,
        observers: SequenceOf[Observer] = (),
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.task, self.optimizer = task, optimizer
        self.clip, self.ema, self.observers, self.schedule = clip, ema, observers, schedule
        self.parts: Parts = parts if callable(parts) else _equal_parts(parts)
        names: dict[Tensor, str] = {p: name for name, p in task.named_parameters()}
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        chosen = [p for p in (owned if params is None else params) if p.requires_grad]
        if strangers := [tuple(p.shape) for p in [*owned, *chosen] if p not in names]:
            raise UserError(
                f"The optimizer holds a parameter of shape {strangers[0]} that the task does not "
                "contain; build it from task.parameters()."
            )
        if not chosen:
            raise UserError("Nothing to train: no parameter of the optimizer requires a gradient.")
        self.params = {names[p]: p for p in chosen}
        self._names = {p: names[p] for p in owned}
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.place = Place(device=chosen[0].device)
        self._start_average()

    @classmethod
    def from_config(
        cls,
        task: nn.Module,
        config: LoopConfig,
        params: Iterable[nn.Parameter] | None = None,
        **options: Any,
    ) -> Self:
        """AdamW, schedule, clipping, accumulation and averaging as ``config`` says.

        Matrices decay, vectors and scalars do not. ``options`` go to the constructor and win.
        """
        chosen = [p for p in (task.parameters() if params is None else params) if p.requires_grad]
        groups = [
            {"params": [p for p in chosen if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in chosen if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise UserError("Nothing to train: no parameter of the task requires a gradient.")
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        chosen_by_config = {
            "clip": config.clip,
            "ema": config.ema_decay,
            "parts": config.accumulate,
            "schedule": schedule_of(config),
        }
        return cls(task, optimizer, **(chosen_by_config | options))

    def move(self, place: Place) -> None:
        self.place = place
        self.task.to(place.device)
        place.broadcast_([*self.task.parameters(), *self.task.buffers()])
        self._start_average()

    def prepare(self, batch: Any, step: int) -> Any:
        if self.schedule is not None:
            factor = self.schedule(step)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor
        return to_device(batch, self.place.device)

    def apply(self, tensors: Any) -> Metrics:
        losses, gradients = self.differentiate(tensors)
        for observe in self.observers:
            observe(tensors, losses, gradients)
        metrics = {name: term.sum / term.count for name, term in losses.items()}
        metrics["loss"] = _sum(
            [term.weight * metrics[name] for name, term in losses.items() if term.weight]
        )
        params = self.params.values()
        for name, parameter in self.params.items():
            parameter.grad = gradients.get(name)
        if self.clip is not None:
            metrics["gradient_norm"] = get_total_norm(gradients.values())
            clip_grads_with_norm_(params, self.clip, metrics["gradient_norm"])
        self.optimizer.step()
        for parameter in params:
            parameter.grad = None
        if self.ema is not None:
            self._update_average()
        return metrics

    def differentiate(self, tensors: Any) -> tuple[Losses, dict[str, Tensor]]:
        """Losses with sums and counts over all parts and ranks, and the gradients by name.

        A parameter that no part on any rank has used is left out.
        """
        parts = list(self.parts(tensors))
        seen: list[tuple[Losses, float]] = []
        none: list[Tensor | None] = [None] * len(self.params)
        if len(parts) == 1:
            inputs, weight = parts[0]
            seen.append((self._forward(inputs), weight))
            losses = self._gather(seen)
            shares = {name: 1 / count_of(term) for name, term in losses.items()}
            gradients = self._backward(seen[0][0], weight, list(losses), shares, none)
        else:
            sums: dict[tuple[str, ...], list[Tensor | None]] = {}
            for inputs, weight in parts:
                found = self._forward(inputs)
                groups = _counted_alike(found)
                for group in groups:
                    gradient = sums.get(group, none)
                    more = group != groups[-1]
                    sums[group] = self._backward(found, weight, group, {}, gradient, more)
                seen.append(({name: _detached(term) for name, term in found.items()}, weight))
                if set(groups) != set(sums):
                    raise ValueError(f"parts count their terms differently: {groups}, {list(sums)}")
            losses = self._gather(seen)
            gradients = none
            for group, found_gradients in sums.items():
                share = 1 / count_of(losses[group[0]])
                gradients = [
                    g if f is None else f.mul_(share) if g is None else g.add_(f.mul_(share))
                    for g, f in zip(gradients, found_gradients, strict=True)
                ]
        gradients = self._reduce(gradients)
        named = zip(self.params, gradients, strict=True)
        return losses, {name: gradient for name, gradient in named if gradient is not None}

    def _forward(self, inputs: Any) -> Losses:
        with self.place.autocast():
            losses: Losses = self.task(inputs)
        return losses

    def _backward(
        self,
        losses: Losses,
        weight: float,
        names: Iterable[str],
        shares: Mapping[str, Tensor],
        gradients: list[Tensor | None],
        retain_graph: bool = False,
    ) -> list[Tensor | None]:
        """Add the gradient of the named terms to ``gradients``; ``.grad`` is borrowed for it."""
        terms = [(losses[name], shares.get(name)) for name in names if losses[name].weight]
        if not terms:
            return gradients
        factors = [
            weight * term.weight * (1.0 if share is None else share) for term, share in terms
        ]
        objective = _sum([term.sum * f for (term, _), f in zip(terms, factors, strict=True)])
        params = list(self.params.values())
        # Accumulating into .grad frees each layer's gradient as it is added; autograd.grad would
        # hold a second full set for every part.
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient
        torch.autograd.backward(objective, retain_graph=retain_graph, inputs=params)
        found = [parameter.grad for parameter in params]
        for parameter in params:
            parameter.grad = None
        return found

    def _gather(self, seen: list[tuple[Losses, float]]) -> Losses:
        """Sums and counts over parts and ranks; a count of 0 becomes 1 (its sum is 0)."""
        names = list(seen[0][0])
        rows = [
            torch.stack(
                [weight * losses[name].sum.detach() for name in names]
                + [count_of(losses[name]) for name in names]
            )
            for losses, weight in seen
        ]
        table = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
        if table.dtype in (torch.bfloat16, torch.float16):
            table = table.float()
        self.place.sum_([table])
        sums, counts = table[: len(names)], positive(table[len(names) :])
        first = seen[0][0]
        return {name: Term(sums[i], counts[i], first[name].weight) for i, name in enumerate(names)}

    def _reduce(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Sum over ranks; what one rank has used and another has not counts as zero there."""
        if self.place.world == 1:
            return gradients
        used = [gradient is not None for gradient in gradients]
        capturing = self.place.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not capturing:  # inside a CUDA graph the ranks use the same parameters by construction
            mask = torch.tensor(used, dtype=torch.float32, device=self.place.device)
            self.place.sum_([mask])
            used = [count > 0 for count in mask.tolist()]
        full = [
            (torch.zeros_like(parameter) if gradient is None else gradient) if on else None
            for parameter, gradient, on in zip(self.params.values(), gradients, used, strict=True)
        ]
        self.place.sum_([gradient for gradient in full if gradient is not None])
        return full

    def _start_average(self) -> None:
        self._average: dict[str, Tensor] = {}
        if self.ema is not None:
            for name, p in self.params.items():
                wide = torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
                self._average[name] = p.detach().to(wide, copy=True)
            self._averaged_steps = torch.zeros((), device=self.place.device)

    @torch.no_grad()
    def _update_average(self) -> None:
        assert self.ema is not None
        n = self._averaged_steps.add_(1)
        pace = 1 - ((1 + n) / (10 + n)).clamp(max=self.ema)
        averages = list(self._average.values())
        # A few kernels for all tensors instead of three for each: a tenth of a captured step.
        change = torch._foreach_sub([self.params[name] for name in self._average], averages)
        torch._foreach_mul_(change, pace)
        torch._foreach_add_(averages, change)

    @contextmanager
    def averaged(self) -> Any:
        live = {name: self.params[name].detach().clone() for name in self._average}
        try:
            self.keep_average()
            yield
        finally:
            with torch.no_grad():
                for name, tensor in live.items():
                    self.params[name].copy_(tensor)

    @torch.no_grad()
    def keep_average(self) -> None:
        for name, average in self._average.items():
            self.params[name].copy_(average)

    def weights(self) -> dict[str, Tensor]:
        kept = self.task.state_dict().keys()
        buffers = {name: b for name, b in self.task.named_buffers() if name in kept}
        return {name: p.detach() for name, p in self.params.items()} | buffers

    def state(self) -> State:
        """Trained parameters, buffers, optimizer and average; frozen parameters are not in it."""
        states = {
            "weights": State(self.weights()),
            "optimizer": optimizer_state.pack(self.optimizer, self._names),
        }
        if self.ema is not None:
            states["average"] = State(self._average | {"": self._averaged_steps})
        return join(states)

    @torch.no_grad()
    def load(self, state: State) -> None:
        copy_into(self.weights(), part(state, "weights").tensors)
        if self.ema is not None:
            average = self._average | {"": self._averaged_steps}
            copy_into(average, part(state, "average").tensors)
        optimizer_state.unpack(self.optimizer, self._names, part(state, "optimizer"))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]


def _equal_parts(number: int) -> Parts:
    def cut(tensors: Any) -> list[tuple[Any, float]]:
        return [(one, 1.0) for one in (split(tensors, number) if number > 1 else [tensors])]

    return cut


def _counted_alike(losses: Losses) -> list[tuple[str, ...]]:
    """Names of the differentiated terms, those that carry the same count tensor together."""
    groups: dict[Any, list[str]] = {}
    for name, term in losses.items():
        if term.weight:
            key = id(term.count) if isinstance(term.count, Tensor) else name
            groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def _sum(numbers: list[Tensor]) -> Tensor:
    return numbers[0] if len(numbers) == 1 else torch.stack(numbers).sum()


def _detached(term: Term) -> Term:
    return Term(term.sum.detach(), term.count, term.weight)
