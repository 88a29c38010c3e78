"""An update is everything between a batch and changed weights."""

from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from weightshare.training.place import Place
from weightshare.training.state import State, join, part
from weightshare.training.trees import to_device

Metrics = dict[str, Tensor]


class Update:
    """What the loop drives. A method's own update overrides ``apply`` and what else it needs."""

    place = Place()

    def move(self, place: Place) -> None:
        """Go to a device and take part in its ranks; called once, before the first step."""
        self.place = place

    def prepare(self, batch: Any, step: int) -> Any:
        """Host side of step ``step``: sampling, augmentation, learning rate, copy to the device."""
        return to_device(batch, self.place.device)

    def apply(self, tensors: Any) -> Metrics:
        """Device side: change the weights, return 0-dim tensors (never waits for the device)."""
        raise NotImplementedError

    def state(self) -> State:
        """Everything that the next step depends on and the program does not rebuild."""
        raise NotImplementedError

    def load(self, state: State) -> None:
        """Go on from ``state``."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """The live tensors that this update trains, with the buffers that follow them."""
        return {}

    def averaged(self) -> AbstractContextManager[Any]:
        """Inside, the weights are their running average, where one is kept."""
        return nullcontext()

    def keep_average(self) -> None:
        """Replace the weights by their running average for good, where one is kept."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers inside, for ``Captured``."""
        return []

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.place.device


class Sequence(Update):
    """Several updates one after another on the batches of ``Zipped``: one bilevel step.

    ``Sequence(architecture=..., weights=...)`` reports ``architecture.loss``, ``weights.loss``;
    unnamed updates are numbered. All are prepared before the first is applied.
    """

    def __init__(self, *updates: Update, **named: Update) -> None:
        self.updates = {str(i): update for i, update in enumerate(updates)} | named

    def move(self, place: Place) -> None:
        self.place = place
        for update in self.updates.values():
            update.move(place)

    def prepare(self, batch: Any, step: int) -> Any:
        pairs = zip(self.updates.values(), batch, strict=True)
        return tuple(update.prepare(one, step) for update, one in pairs)

    def apply(self, tensors: Any) -> Metrics:
        metrics: Metrics = {}
        for (name, update), one in zip(self.updates.items(), tensors, strict=True):
            metrics |= {f"{name}.{key}": value for key, value in update.apply(one).items()}
        return metrics

    def state(self) -> State:
        return join({name: update.state() for name, update in self.updates.items()})

    def load(self, state: State) -> None:
        for name, update in self.updates.items():
            update.load(part(state, name))

    def weights(self) -> dict[str, Tensor]:
        return join({name: State(u.weights()) for name, u in self.updates.items()}).tensors

    @contextmanager
    def averaged(self) -> Any:
        with ExitStack() as stack:
            for update in self.updates.values():
                stack.enter_context(update.averaged())
            yield

    def keep_average(self) -> None:
        for update in self.updates.values():
            update.keep_average()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [one for update in self.updates.values() for one in update.optimizers()]

    @property
    def device(self) -> torch.device:
        return next(iter(self.updates.values())).device
