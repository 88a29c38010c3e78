"""Local training of participants by the library's loop, and the accuracy of many models at once."""

import copy
from collections.abc import Mapping
from contextlib import suppress
from math import ceil
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from weightshare.errors import UserError
from weightshare.federated.config import LocalConfig
from weightshare.federated.vectors import Vector
from weightshare.training import (
    EpochBatches,
    GradientUpdate,
    Loop,
    LoopConfig,
    Losses,
    Task,
    Term,
    total,
)
from weightshare.training.randomness import mix

Examples = tuple[Tensor, Tensor]
"""Inputs and labels, row by row."""


class Training(Protocol):
    """What participants do between two messages."""

    def train(self, starts: Mapping[str, Vector], number: int) -> dict[str, Vector]:
        """New weights from ``starts`` in round ``number`` (from 1), by participant."""
        ...


class Classifier(Task):
    """Cross-entropy of ``model`` on (inputs, labels)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Examples) -> Losses:
        inputs, labels = batch
        logits = self.model(inputs)
        return {"cross_entropy": Term(cross_entropy(logits, labels, reduction="sum"), len(labels))}


def weights_of(model: nn.Module) -> Vector:
    """The trainable weights as one vector; buffers stay where they are.

    Raises:
        UserError: nothing to train, or weights that are not float32.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters or any(p.dtype != torch.float32 for p in parameters):
        raise UserError("A federation trains float32 weights; give a model that has such weights.")
    return parameters_to_vector(parameters).detach().cpu().numpy().copy()


def set_weights(model: nn.Module, vector: Vector) -> None:
    """The inverse of ``weights_of``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        moved = torch.from_numpy(vector.copy()).to(parameters[0].device)
        vector_to_parameters(moved, parameters)


def layer_sizes(model: nn.Module) -> list[int]:
    """Number of weights of each trainable tensor, in the order of the vector."""
    return [p.numel() for p in model.parameters() if p.requires_grad]


def steps_of(examples: int, config: LocalConfig) -> int:
    """Local steps in a round."""
    return ceil(config.epochs * examples / config.batch_size)


def batches_of(data: Examples, name: str, number: int, config: LocalConfig) -> EpochBatches:
    """A participant's batches in round ``number``: a function of seed, name and round alone."""
    seed = mix(config.seed, int.from_bytes(name.encode(), "little"), number)
    return EpochBatches(data, config.batch_size, seed)


def rate_at(step: int, number: int, examples: int, config: LocalConfig) -> float:
    """Learning rate of a local step: it decays per epoch, counted over all rounds."""
    epoch = (number - 1) * config.epochs + step * config.batch_size // examples
    return float(config.learning_rate * config.decay**epoch)


class Weights(Protocol):
    """The weights that travel, as one vector."""

    def read(self) -> Vector: ...
    def write(self, vector: Vector, /) -> None: ...


class TrainableWeights:
    """All trainable weights of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def read(self) -> Vector:
        return weights_of(self.module)

    def write(self, vector: Vector, /) -> None:
        set_weights(self.module, vector)


class LoopTraining:
    """One participant after another, by ``weightshare.training.Loop``.

    Args:
        task: what is trained; its weights are overwritten.
        data: (inputs, labels) by participant.
        config: epochs, batch size, learning rate, optimiser. An optimiser's moments begin anew each
            round, because the reward has moved the weights.
        weights: what travels of the task; all its trainable weights where none are given.
    """

    def __init__(
        self,
        task: Task,
        data: Mapping[str, Examples],
        config: LocalConfig,
        weights: Weights | None = None,
    ) -> None:
        self.task, self.data, self.config = task, dict(data), config
        self.weights = weights or TrainableWeights(task)

    def train(self, starts: Mapping[str, Vector], number: int) -> dict[str, Vector]:
        return {name: self._train(name, start, number) for name, start in starts.items()}

    def _train(self, name: str, start: Vector, number: int) -> Vector:
        data, config = self.data[name], self.config
        size = len(data[0])
        self.weights.write(start)
        first = rate_at(0, number, size, config)
        kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
        optimizer = kind([p for p in self.task.parameters() if p.requires_grad], first)
        update = GradientUpdate(
            self.task,
            optimizer,
            schedule=lambda step: rate_at(step, number, size, config) / first,
        )
        steps = steps_of(size, config)
        options = LoopConfig(steps=steps, seed=mix(config.seed, number), log_every=steps)
        batches = batches_of(data, name, number, config)
        # Where it diverges, what it has is sent all the same; the server refuses it by its numbers.
        with suppress(UserError):
            Loop(update, batches, options, progress=False).fit()
        return self.weights.read()


def loss_of(task: Task, vector: Vector, data: Examples) -> float:
    """Of the task with these weights on all of ``data``."""
    set_weights(task, vector)
    with torch.no_grad():
        return float(total(task(data)))


def accuracies(
    model: nn.Module,
    vectors: Mapping[str, Vector],
    data: Examples,
    flip: tuple[int, int] = (1, 7),
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Of each model on the same data, computed on ``device``.

    Returns:
        by name, ``{"accuracy": share, "target": share of the flipped class that is recognised,
        "success": share of it that is taken for what the label-flip attack wants}``.
    """
    inputs, labels = (part.to(device) for part in data)
    model = copy.deepcopy(model).to(device)
    result = {}
    for name, vector in vectors.items():
        set_weights(model, vector)
        with torch.no_grad():
            found = model(inputs).argmax(1)
        flipped = found[labels == flip[0]]
        result[name] = {
            "accuracy": float((found == labels).double().mean()),
            "target": float((flipped == flip[0]).double().mean()),
            "success": float((flipped == flip[1]).double().mean()),
        }
    return result


def confusion(model: nn.Module, vector: Vector, data: Examples, classes: int) -> np.ndarray:
    """Shares of true class (row) taken for class (column), ``(C, C)``."""
    set_weights(model, vector)
    inputs, labels = data
    with torch.no_grad():
        found = model(inputs).argmax(1)
    counts = torch.zeros(classes, classes)
    counts.index_put_((labels, found), torch.ones(len(labels)), accumulate=True)
    return (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
