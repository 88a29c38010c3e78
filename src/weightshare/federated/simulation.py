"""A whole federation in this process, from its options: data, participants, grid and strategy."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import (
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)

from weightshare.errors import UserError
from weightshare.federated import wire
from weightshare.federated.attacks import ATTACKS
from weightshare.federated.config import FederateConfig, LocalConfig
from weightshare.federated.federation import run_rounds
from weightshare.federated.grid import InProcessGrid
from weightshare.federated.images import load_images
from weightshare.federated.local import (
    Classifier,
    Examples,
    LoopTraining,
    Training,
    accuracies,
    layer_sizes,
    perceptron,
    weights_of,
)
from weightshare.federated.participant import Cohort, Memory
from weightshare.federated.partitions import deal
from weightshare.federated.rules import FLTrust, FoolsGold, GeometricMedian
from weightshare.federated.stacked import StackedTraining
from weightshare.federated.strategy import ReputationStrategy
from weightshare.federated.vectors import Vector
from weightshare.training import checkpoint

CLASSES = 10
ROOT = "root"
"""Name under which the server's trusted samples are trained on."""


@dataclass
class Simulation:
    """Everything of one federation; ``simulate`` makes it."""

    config: FederateConfig
    task: Classifier
    initial: Vector
    training: Training
    test: Examples
    examples: dict[str, int]
    honest: list[str]
    adversaries: list[str]
    cohort: Cohort
    grid: InProcessGrid
    strategy: Strategy
    arrays: ArrayRecord
    done: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def reputation(self) -> ReputationStrategy | None:
        """The strategy, where it is one of reputation."""
        return self.strategy if isinstance(self.strategy, ReputationStrategy) else None

    def run(self, after: Callable[["Simulation"], None] | None = None) -> None:
        """The rounds that are left, then the last reward; ``after`` is called after each round."""

        def then(number: int, arrays: ArrayRecord, metrics: MetricRecord | None) -> None:
            self.done, self.arrays = number, arrays
            self.metrics = {k: float(v) for k, v in (metrics or {}).items()}
            if after is not None:
                after(self)

        run_rounds(
            self.strategy,
            self.grid,
            self.arrays,
            self.config.rounds,
            done=self.done,
            seed=self.config.seed,
            after=then,
        )
        if self.reputation is not None:
            self.reputation.deliver(self.grid)

    def vectors(self) -> dict[str, Vector]:
        """Everyone's model as it is now, ``(D,)`` by participant."""
        names = [*self.honest, *self.adversaries]
        if self.reputation is not None:
            # Before the first round the strategy has met nobody.
            known = self.reputation.names
            return {n: self.reputation.model_of(n) if known else self.initial for n in names}
        return dict.fromkeys(names, self.arrays["weights"].numpy())

    def accuracies(self) -> dict[str, dict[str, float]]:
        """Of everyone's model on the test data."""
        vectors = self.vectors()
        distinct = {vector.tobytes(): name for name, vector in vectors.items()}
        found = accuracies(self.task.model, {n: vectors[n] for n in distinct.values()}, self.test)
        return {name: found[distinct[vector.tobytes()]] for name, vector in vectors.items()}

    def alone(self) -> dict[str, float]:
        """Test accuracy of each honest participant that trains as long on its own samples only."""
        vectors: Mapping[str, Vector] = dict.fromkeys(self.honest, self.initial)
        for number in range(1, self.config.rounds + 1):
            vectors = self.training.train(vectors, number)
        found = accuracies(self.task.model, vectors, self.test)
        return {name: row["accuracy"] for name, row in found.items()}

    def save(self, folder: Path) -> None:
        """A checkpoint of the server after the current round."""
        if self.reputation is not None:
            # Who replays its rewards must know the last one, though it is sent its model instead.
            last = {name: self.reputation.reward_of(name) for name in self.adversaries}
            kept = {name: reward for name, reward in last.items() if reward is not None}
            self.reputation.save(folder, extra=kept)
            return
        tensors = {"weights": self.arrays["weights"].numpy()}
        history = self.strategy.history if isinstance(self.strategy, FoolsGold) else {}
        tensors |= {f"history/{node}": vector for node, vector in history.items()}
        packed = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
        checkpoint.save(folder, self.done, packed, {})

    def restore(self, folder: Path) -> int:
        """Go on from the newest checkpoint; returns its round, 0 where there is none."""
        if self.reputation is not None:
            self.done = self.reputation.restore(folder)
            for name, reward in self.reputation.extra.items():
                self.cohort.memories[name] = Memory(reward=reward)
            return self.done
        checkpoint.sweep(folder)
        found = checkpoint.checkpoints(folder)
        if found:
            tensors, _ = checkpoint.load(found[-1])
            self.done = checkpoint.step_of(found[-1])
            self.arrays = ArrayRecord({"weights": wire.array(tensors["weights"].numpy())})
            if isinstance(self.strategy, FoolsGold):
                self.strategy.history = {
                    int(name.removeprefix("history/")): tensor.numpy()
                    for name, tensor in tensors.items()
                    if name.startswith("history/")
                }
        return self.done


def simulate(config: FederateConfig, folder: Path | None = None) -> Simulation:
    """Build a federation. ``folder`` is where a strategy of reputation keeps models and its log.

    Raises:
        UserError: options that cannot be used, or too little data for them.
    """
    config.check()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    images = load_images(config.data)
    total = len(images.train_labels)
    if config.samples > total - config.root_samples:
        raise UserError(
            f"--samples is {config.samples} but {config.data} has {total} training samples, "
            f"{config.root_samples} of them for the server; give fewer, or 0 for all."
        )
    # The server's trusted samples come off first, so that no participant holds one.
    order = np.random.default_rng([config.seed, 1]).permutation(total)
    root_rows, rows = order[: config.root_samples], order[config.root_samples :]
    shards = deal(
        images.train_labels[rows],
        config.partition,
        config.participants,
        config.adversaries,
        samples=config.samples,
        seed=config.seed,
    )
    width = max(2, len(str(max(config.participants, config.adversaries))))
    honest = {f"p{i:0{width}d}": rows[s] for i, s in enumerate(shards.honest, 1)}
    evil = {f"x{i:0{width}d}": rows[s] for i, s in enumerate(shards.adversaries, 1)}
    attack = ATTACKS.get(config.attack)

    def examples_of(chosen: Any, flip: tuple[int, int] | None = None) -> Examples:
        labels = images.train_labels[chosen].copy()
        if flip is not None:
            labels[labels == flip[0]] = flip[1]
        return torch.from_numpy(images.train[chosen]), torch.from_numpy(labels)

    data = {name: examples_of(chosen) for name, chosen in honest.items()}
    data |= {name: examples_of(s, attack.flip if attack else None) for name, s in evil.items()}
    examples = {name: len(labels) for name, (_, labels) in data.items()}
    pixels = int(np.prod(images.train.shape[1:]))
    task = Classifier(perceptron(pixels, config.hidden, CLASSES, config.seed))
    initial = weights_of(task)
    local = LocalConfig(config.epochs, config.batch_size, config.rate(), config.decay, config.seed)
    trained = data | ({ROOT: examples_of(root_rows)} if config.root_samples else {})
    training: Training = (StackedTraining if config.training == "stacked" else LoopTraining)(
        task, trained, local
    )

    def root(weights: Vector, number: int) -> Vector:
        return training.train({ROOT: weights}, number)[ROOT] - weights

    cohort = Cohort(
        training,
        len(initial),
        examples,
        dict.fromkeys(evil, attack) if attack else {},
        seed=config.seed,
    )
    grid = InProcessGrid(examples, cohort.answer)
    strategy = make_strategy(
        config,
        initial,
        examples,
        layers=layer_sizes(task),
        root=root if config.root_samples else None,
        folder=folder,
    )
    return Simulation(
        config=config,
        task=task,
        initial=initial,
        training=training,
        test=(torch.from_numpy(images.test), torch.from_numpy(images.test_labels)),
        examples=examples,
        honest=list(honest),
        adversaries=list(evil),
        cohort=cohort,
        grid=grid,
        strategy=strategy,
        arrays=ArrayRecord({"weights": wire.array(initial)}),
    )


def make_strategy(
    config: FederateConfig,
    initial: Vector,
    sizes: Mapping[str, int],
    *,
    layers: list[int],
    root: Callable[[Vector, int], Vector] | None = None,
    folder: Path | None = None,
) -> Strategy:
    """The server's rule by its name in the options. Those that need it are told the true number of
    adversaries, as far as they can bear it."""
    rules = config.rules()
    if rules is not None:
        return ReputationStrategy(
            initial, rules, sizes=sizes, layers=layers, root=root, folder=folder, wait=0
        )
    everyone, bad = len(sizes), config.adversaries
    tolerated = min(bad, (everyone - 1) // 2)
    options: dict[str, Any] = {
        "fraction_evaluate": 0.0,
        "min_train_nodes": everyone,
        "min_available_nodes": everyone,
    }
    if config.strategy == "fedavg":
        return FedAvg(**options)
    if config.strategy == "median":
        return FedMedian(**options)
    if config.strategy == "trimmed_mean":
        return FedTrimmedAvg(**options, beta=min(tolerated / everyone, 0.49))
    if config.strategy == "krum":
        return Krum(**options, num_malicious_nodes=tolerated)
    if config.strategy == "multi_krum":
        return MultiKrum(
            **options, num_malicious_nodes=tolerated, num_nodes_to_select=everyone - tolerated
        )
    if config.strategy == "geometric_median":
        return GeometricMedian(everyone)
    if config.strategy == "foolsgold":
        return FoolsGold(everyone)
    assert root is not None
    return FLTrust(root, everyone)
