"""Local training of all simulated participants at once: one batched step for everybody."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch.func import functional_call, grad, vmap

from weightshare.federated.config import LocalConfig
from weightshare.federated.local import Examples, batches_of, layer_sizes, rate_at, steps_of
from weightshare.federated.vectors import Vector
from weightshare.training import Task, total


class StackedTraining:
    """The same steps as ``LoopTraining``, with the models stacked and differentiated by ``vmap``.

    Participants with few samples finish earlier and leave the stack. For models without buffers and
    without randomness.

    Args:
        task: gives structure and loss; it is not changed.
        data: (inputs, labels) by participant.
        config: epochs, batch size, learning rate.
        device: where to compute.
    """

    def __init__(
        self,
        task: Task,
        data: Mapping[str, Examples],
        config: LocalConfig,
        device: str = "cpu",
    ) -> None:
        self.task, self.config, self.device = task.to(device), config, device
        self.sizes = {name: len(examples[0]) for name, examples in data.items()}
        self.data = dict(data)
        places = np.cumsum([0, *self.sizes.values()])
        self.offsets = dict(zip(self.sizes, places.tolist(), strict=False))
        self.inputs = torch.cat([inputs for inputs, _ in data.values()]).to(device)
        self.labels = torch.cat([labels for _, labels in data.values()]).to(device)
        self.shapes = {n: p.shape for n, p in task.named_parameters() if p.requires_grad}
        self.layers = layer_sizes(task)
        self._gradient = vmap(grad(self._loss))

    def _loss(self, parameters: dict[str, torch.Tensor], batch: Examples) -> torch.Tensor:
        return total(functional_call(self.task, parameters, (batch,)))

    def train(self, starts: Mapping[str, Vector], number: int) -> dict[str, Vector]:
        steps = {name: steps_of(self.sizes[name], self.config) for name in starts}
        names = sorted(starts, key=lambda name: (-steps[name], name))
        if not names:
            return {}
        flat = torch.from_numpy(np.stack([starts[name] for name in names])).to(self.device)
        edges = np.cumsum([0, *self.layers])
        stacks = {
            name: flat[:, a:b].reshape(-1, *shape).clone()
            for (name, shape), (a, b) in zip(self.shapes.items(), pairwise(edges), strict=True)
        }
        batches = [batches_of(self.data[name], name, number, self.config) for name in names]
        for step in range(steps[names[0]]):
            active = sum(steps[name] > step for name in names)
            rows = torch.stack(
                [
                    batches[i].indices(step) + self.offsets[name]
                    for i, name in enumerate(names[:active])
                ]
            ).to(self.device)
            rates = torch.tensor(
                [rate_at(step, number, self.sizes[n], self.config) for n in names[:active]],
                device=self.device,
            )
            now = {name: stack[:active] for name, stack in stacks.items()}
            gradients = self._gradient(now, (self.inputs[rows], self.labels[rows]))
            for name, gradient in gradients.items():
                shape = (-1, *[1] * (gradient.ndim - 1))
                now[name].sub_(rates.view(shape) * gradient)
        trained = torch.cat([stack.flatten(1) for stack in stacks.values()], 1).cpu().numpy()
        return {name: trained[i].copy() for i, name in enumerate(names)}
