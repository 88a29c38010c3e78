"""A whole federation in this process, from its options: data, participants, grid and strategy."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
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
from weightshare.federated.examination import LIMIT, worst_class
from weightshare.federated.federation import run_rounds
from weightshare.federated.grid import InProcessGrid
from weightshare.federated.loading import load_samples
from weightshare.federated.local import (
    Classifier,
    Examples,
    LoopTraining,
    Training,
    accuracies,
    confusion,
    layer_sizes,
    loss_of,
    weights_of,
)
from weightshare.federated.material import ROOT, Material
from weightshare.federated.models import model_for
from weightshare.federated.participant import Cohort, Memory
from weightshare.federated.partitions import deal
from weightshare.federated.root import RootAlong
from weightshare.federated.rules import FLTrust, FoolsGold, GeometricMedian, SingleQFedAvg
from weightshare.federated.samples import Samples
from weightshare.federated.stacked import StackedTraining
from weightshare.federated.strategy import ReputationStrategy
from weightshare.federated.vectors import Vector
from weightshare.training import Task, checkpoint, device_of

MakeTraining = Callable[[Task, Mapping[str, Examples], LocalConfig], Training]
"""What local training is made by: task, data by participant, options."""


@dataclass
class Simulation:
    """Everything of one federation; ``simulate`` makes it."""

    config: FederateConfig
    material: Material
    cohort: Cohort
    grid: InProcessGrid
    strategy: Strategy
    arrays: ArrayRecord
    done: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    _measured: tuple[int, dict[str, dict[str, float]]] = (-1, {})

    @property
    def honest(self) -> list[str]:
        """Names of the honest participants."""
        return self.material.honest

    @property
    def adversaries(self) -> list[str]:
        """Names of the others."""
        return self.material.adversaries

    @property
    def examples(self) -> dict[str, int]:
        """Training samples by participant."""
        return self.material.examples

    @property
    def initial(self) -> Vector:
        """What everyone starts from, ``(D,)``."""
        return self.material.initial

    @property
    def training(self) -> Training:
        """What participants do between two messages."""
        return self.material.learner

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
        """Of everyone's model on the test data, with what else is measured."""
        round_, found = self._measured
        if round_ == self.done:
            return found
        vectors = self.vectors()
        distinct = {vector.tobytes(): name for name, vector in vectors.items()}
        chosen = {name: vectors[name] for name in distinct.values()}
        rows = self.material.measure(chosen)
        found = {name: rows[distinct[vector.tobytes()]] for name, vector in vectors.items()}
        self._measured = self.done, found
        return found

    def alone(self) -> dict[str, float]:
        """Test accuracy of each honest participant that trains as long on its own samples only."""
        vectors: Mapping[str, Vector] = dict.fromkeys(self.honest, self.initial)
        for number in range(1, self.config.rounds + 1):
            vectors = self.training.train(vectors, number)
        found = self.material.measure(vectors)
        return {name: row["accuracy"] for name, row in found.items()}

    def save(self, folder: Path) -> None:
        """A checkpoint of the server after the current round."""
        moved = np.array([self.grid.sent_bytes, self.grid.received_bytes])
        if self.reputation is not None:
            # Who replays its rewards must know the last one, though it is sent its model instead.
            last = {name: self.reputation.reward_of(name) for name in self.adversaries}
            kept = {name: reward for name, reward in last.items() if reward is not None}
            self.reputation.save(folder, extra=kept | {"bytes": moved})
            return
        tensors = {"weights": self.arrays["weights"].numpy(), "bytes": moved}
        history = self.strategy.history if isinstance(self.strategy, FoolsGold) else {}
        tensors |= {f"history/{node}": vector for node, vector in history.items()}
        packed = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
        checkpoint.save(folder, self.done, packed, {})

    def restore(self, folder: Path) -> int:
        """Go on from the newest checkpoint; returns its round, 0 where there is none."""
        if self.reputation is not None:
            self.done = self.reputation.restore(folder)
            self._moved(self.reputation.extra.pop("bytes", None))
            for name, reward in self.reputation.extra.items():
                self.cohort.memories[name] = Memory(reward=reward)
            return self.done
        checkpoint.sweep(folder)
        found = checkpoint.checkpoints(folder)
        if found:
            tensors, _ = checkpoint.load(found[-1])
            self._moved(tensors.get("bytes"))
            self.done = checkpoint.step_of(found[-1])
            self.arrays = ArrayRecord({"weights": wire.array(tensors["weights"].numpy())})
            if isinstance(self.strategy, FoolsGold):
                self.strategy.history = {
                    int(name.removeprefix("history/")): tensor.numpy()
                    for name, tensor in tensors.items()
                    if name.startswith("history/")
                }
        return self.done

    def _moved(self, moved: Any) -> None:
        if moved is not None:
            self.grid.sent_bytes, self.grid.received_bytes = map(int, moved)


def simulate(
    config: FederateConfig,
    folder: Path | None = None,
    training: MakeTraining | None = None,
    samples: Samples | None = None,
    as_bytes: bool = True,
) -> Simulation:
    """Build a federation.

    Args:
        config: the command's options.
        folder: where a strategy of reputation keeps models and its log.
        training: local training other than the options say (``Lockstep.training``).
        samples: the data, where they are loaded already.
        as_bytes: pass every message through its bytes (``InProcessGrid``).

    Raises:
        UserError: options that cannot be used, or too little data for them.
    """
    config.check()
    samples = samples or load_samples(config.data)
    total = len(samples.train_labels)
    if config.root_samples >= total:
        raise UserError(
            f"--root-samples is {config.root_samples} but {config.data} has {total} training "
            "samples in all; give fewer, as 50."
        )
    if config.samples > total - config.root_samples:
        raise UserError(
            f"--samples is {config.samples} but {config.data} has {total} training samples, "
            f"{config.root_samples} of them for the server; give fewer, or 0 for all."
        )
    # The server's trusted samples come off first, so that no participant holds one.
    order = np.random.default_rng([config.seed, 1]).permutation(total)
    root_rows, rows = order[: config.root_samples], order[config.root_samples :]
    shards = deal(
        samples.train_labels[rows],
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
    # Two classes have no 7: praise becomes blame.
    flip = (1, 7) if samples.classes > 7 else (1, 0)

    def examples_of(chosen: Any, flipped: bool = False) -> Examples:
        labels = samples.train_labels[chosen].copy()
        if flipped:
            labels[labels == flip[0]] = flip[1]
        return torch.from_numpy(samples.train[chosen]), torch.from_numpy(labels)

    flips = attack is not None and attack.flips
    data = {name: examples_of(chosen) for name, chosen in honest.items()}
    data |= {name: examples_of(chosen, flips) for name, chosen in evil.items()}
    task = Classifier(model_for(samples, config.hidden, config.seed))
    test = torch.from_numpy(samples.test), torch.from_numpy(samples.test_labels)
    local = LocalConfig(config.epochs, config.batch_size, config.rate(), config.decay, config.seed)
    trusted = examples_of(root_rows)
    trained = data | ({ROOT: trusted} if config.root_samples else {})
    if training is None:
        training = LoopTraining if config.training == "loop" else on(config.device)
    material = Material(
        task=task,
        initial=weights_of(task),
        layers=layer_sizes(task),
        learner=training(task, trained, local),
        examples={name: len(labels) for name, (_, labels) in data.items()},
        honest=list(honest),
        adversaries=list(evil),
        measure=lambda vectors: accuracies(
            task.model, vectors, test, flip, str(device_of(config.device))
        ),
        loss=lambda name, vector: loss_of(task, vector, data[name]),
        tested=len(test[1]),
        flip=flip,
        passes=lambda vector: worst_class(task.model, vector, trusted) <= LIMIT,
        confusion=lambda vector: confusion(task.model, vector, test, samples.classes),
    )
    return assemble(config, material, folder, as_bytes)


def assemble(
    config: FederateConfig, material: Material, folder: Path | None = None, as_bytes: bool = True
) -> Simulation:
    """Participants, grid and strategy around what is trained; see ``simulate``."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    initial, attack = material.initial, ATTACKS.get(config.attack)
    learner = RootAlong(material.learner, lambda: strategy.server)
    cohort = Cohort(
        learner if config.root_samples else material.learner,
        len(initial),
        material.examples,
        dict.fromkeys(material.adversaries, attack) if attack else {},
        seed=config.seed,
        loss=material.loss if config.strategy == "qfedavg" else None,
    )
    strategy = make_strategy(
        config,
        initial,
        material.examples,
        layers=material.layers,
        root=learner.update if config.root_samples else None,
        passes=material.passes,
        folder=folder,
    )
    return Simulation(
        config=config,
        material=material,
        cohort=cohort,
        grid=InProcessGrid(material.examples, cohort.answer, as_bytes),
        strategy=strategy,
        arrays=ArrayRecord({"weights": wire.array(initial)}),
    )


def on(device: str) -> MakeTraining:
    """Stacked training on a device."""
    return partial(StackedTraining, device=str(device_of(device)))


def make_strategy(
    config: FederateConfig,
    initial: Vector,
    sizes: Mapping[str, int],
    *,
    layers: list[int],
    root: Callable[[Vector, int], Vector] | None = None,
    passes: Callable[[Vector], bool] | None = None,
    folder: Path | None = None,
) -> Strategy:
    """The server's rule by its name in the options. Those that need it are told the true number of
    adversaries, as far as they can bear it."""
    rules = config.rules()
    if rules is not None:
        return ReputationStrategy(
            initial,
            rules,
            sizes=sizes,
            layers=layers,
            root=root,
            passes=passes,
            folder=folder,
            wait=0,
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
    if config.strategy == "qfedavg":
        return SingleQFedAvg(config.rate(), **options)
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
