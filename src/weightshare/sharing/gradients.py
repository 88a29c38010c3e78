"""The gradient of each user of a weight, apart.

Everything here returns one thing, ``gradients[tensor][user]``: for each tensor the gradient (or
what was kept of it) of every user that used it. A user that did not use it is missing, never zero.
:class:`~weightshare.sharing.Gram` reads nothing else, so any source of such a mapping can be
measured: uses of a tied weight, tasks, children of a supernet, domains, clients.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightshare.errors import UserError
from weightshare.sharing.ghost import Factors

Kept = Tensor | Factors
User = TypeVar("User", bound=Hashable)
Gradients = dict[str, dict[User, Kept]]
Keep = Callable[[str, Tensor], Tensor]


def check_loss(loss: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"the loss is {shape}; it must be a tensor with one value.")
    if not loss.requires_grad:
        check_finite(loss)
        raise UserError("the loss does not depend on any trainable parameter of the model.")


def check_finite(loss: Tensor) -> None:
    """To be called after the backward pass: a GPU is not waited for before its work is queued."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise UserError(
            f"the loss is {value}, not a finite number; "
            "check the batch and the model's weights before measuring agreement."
        )


def user_gradients(
    losses: Mapping[User, Callable[[], Tensor]],
    parameters: Mapping[str, nn.Parameter],
    keep: Keep | None = None,
    together: int = 2**26,
) -> Iterator[Gradients[User]]:
    """Users with graphs of their own: children of a supernet, domains of data, tasks.

    ``losses[user]()`` computes that user's loss. All users start from the same random state, so
    that dropout or a sampled context differs between them only where their graphs do.

    Yields ``gradients[tensor][user]`` for one group of tensors after the other. With ``keep`` each
    user runs once and only what is kept is held. Without it each user runs once per group, and
    never more than the gradients of one group, for all users, are in memory: a group has at most
    ``together`` elements over all users (default 2²⁶, 256 MB in float32), or is one tensor.
    """
    groups = [list(parameters)] if keep else _groups(parameters, together // max(1, len(losses)))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    for names in groups:
        found: Gradients[User] = {name: {} for name in names}
        for user, loss in losses.items():
            with torch.random.fork_rng(devices):
                value = loss()
            check_loss(value)
            gradients = torch.autograd.grad(
                value, [parameters[name] for name in names], allow_unused=True
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    found[name][user] = keep(name, gradient) if keep else gradient
            check_finite(value)
            del gradients, value
        yield found


def task_gradients(
    losses: Mapping[User, Tensor],
    parameters: Mapping[str, nn.Parameter],
    keep: Keep | None = None,
) -> Gradients[User]:
    """Tasks on one graph: a common trunk with a head and a loss per task.

    One backward per task; the graph is kept between them and freed by the last.
    """
    found: Gradients[User] = {name: {} for name in parameters}
    for number, (user, loss) in enumerate(losses.items(), start=1):
        check_loss(loss)
        gradients = torch.autograd.grad(
            loss,
            list(parameters.values()),
            allow_unused=True,
            retain_graph=number < len(losses),
        )
        for (name, _), gradient in zip(parameters.items(), gradients, strict=True):
            if gradient is not None:
                found[name][user] = keep(name, gradient) if keep else gradient
        check_finite(loss)
    return found


def by_tensor(updates: Mapping[User, Mapping[str, Tensor]]) -> Gradients[User]:
    """``{user: {tensor: update}}``, such as clients' updates, as ``{tensor: {user: update}}``."""
    found: Gradients[User] = {}
    for user, tensors in updates.items():
        for name, tensor in tensors.items():
            found.setdefault(name, {})[user] = tensor
    return found


def by_rows(gradients: Gradients[Any], owners: Sequence[User]) -> Gradients[User]:
    """Users that own rows of one batch, such as domains of data, in one backward pass for all.

    A linear layer's gradient, kept as its factors, can be told apart by the rows it came from. What
    a user's rows give is its gradient where rows do not mix inside the model (no batch norm) and
    the loss is the *sum* of the users' losses::

        with per_use(model, factors=True) as uses:
            found = by_rows(uses.gradients(losses.sum()), owners)

    Args:
        gradients: of :func:`per_use` with ``factors=True``.
        owners: the user of each row of the batch, which is the first dimension of every layer's
            input.

    Returns the weights of linear layers and, where they were watched, their biases; of other
    parameters no rows are known, they are left out.

    Raises:
        UserError: a layer saw a number of inputs that is no multiple of the rows.
    """
    found: Gradients[User] = {}
    places: dict[User, Any] = {}
    for user in dict.fromkeys(owners):
        rows = [i for i, owner in enumerate(owners) if owner == user]
        together = rows[-1] - rows[0] + 1 == len(rows)
        places[user] = slice(rows[0], rows[-1] + 1) if together else rows  # no copy of neighbours
    for name, uses in gradients.items():
        for use, factors in uses.items():
            if not isinstance(factors, Factors):
                continue
            if len(factors.inputs) % len(owners):
                raise UserError(
                    f"{name!r} saw {len(factors.inputs)} inputs, no multiple of the "
                    f"{len(owners)} rows; their owners cannot be told."
                )
            inputs, outputs = (
                part.view(len(owners), -1, part.shape[-1])
                for part in (factors.inputs, factors.outputs)
            )
            bias = f"{use.module}.bias" if use.module else "bias"
            row_sums = outputs.sum(1)
            for user, rows in places.items():
                mine = Factors(inputs[rows].flatten(0, 1), outputs[rows].flatten(0, 1))
                parts: Gradients[User] = {name: {user: mine}}
                if bias in gradients:
                    of_bias = row_sums[rows]
                    parts[bias] = {user: of_bias[0] if len(of_bias) == 1 else of_bias.sum(0)}
                found = accumulate(found, parts)
    return found


def accumulate(total: Gradients[User] | None, new: Gradients[User]) -> Gradients[User]:
    """Add the gradients of one more micro-batch: for sums of losses, or equal weights."""
    if total is None:
        return {name: dict(users) for name, users in new.items()}
    for name, users in new.items():
        mine = total.setdefault(name, {})
        for user, gradient in users.items():
            mine[user] = mine[user] + gradient if user in mine else gradient  # type: ignore[operator]
    return total


def all_reduce(gradients: Gradients[User], group: Any = None) -> Gradients[User]:
    """Mean over the ranks of ``torch.distributed``, as DDP takes it: the Gram of the full batch.

    The mean of the ranks' cosines would be another quantity. Sketches reduce like gradients.

    Raises:
        UserError: when the ranks hold different users or factors, which cannot be averaged.
    """
    keys = [(name, user) for name in sorted(gradients) for user in gradients[name]]
    flat = [gradients[name][user] for name, user in keys]
    if any(isinstance(gradient, Factors) for gradient in flat):
        raise UserError("factors cannot be averaged across ranks; measure with a sketch instead.")
    device = flat[0].device if flat and isinstance(flat[0], Tensor) else torch.device("cpu")
    mark = torch.tensor(float(_mark(keys)), dtype=torch.float64, device=device)
    ends = torch.stack([mark, -mark])
    dist.all_reduce(ends, dist.ReduceOp.MAX, group)
    if bool(ends[0] != -ends[1]):
        raise UserError(
            "the ranks saw different users of the shared weights; "
            "give every rank batches that take the same path through the model."
        )
    for gradient in flat:
        assert isinstance(gradient, Tensor)
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)
    return gradients


def _mark(keys: list[tuple[str, Any]]) -> int:
    return crc32("\n".join(f"{name} {user}" for name, user in keys).encode())


def _groups(parameters: Mapping[str, nn.Parameter], together: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    room = together
    for name, parameter in parameters.items():
        if groups[-1] and parameter.numel() > room:
            groups.append([])
            room = together
        groups[-1].append(name)
        room -= parameter.numel()
    return groups
