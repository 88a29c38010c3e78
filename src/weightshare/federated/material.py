"""What a federation is about, whatever it trains: images, sentences or adapters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from weightshare.federated.local import Training
from weightshare.federated.vectors import Vector
from weightshare.training import Task

ROOT = "root"
"""Name under which the server's trusted samples are trained on."""


@dataclass(frozen=True)
class Material:
    """What is trained in a federation, by whom, on what, and how a model is measured."""

    task: Task
    initial: Vector
    """What everyone starts from."""
    layers: list[int]
    """Sizes of the tensors."""
    learner: Training
    examples: dict[str, int]
    """Training samples by participant."""
    honest: list[str]
    adversaries: list[str]
    measure: Callable[[Mapping[str, Vector]], dict[str, dict[str, float]]]
    """``{"accuracy": ...}`` and more of each model on test data."""
    loss: Callable[[str, Vector], float]
    """Of a model on the training samples of a participant."""
    tested: int
    """Samples that are tested on."""
    flip: tuple[int, int] = (1, 7)
    """Classes of the label-flip attack: what is flipped, and into what."""
    passes: Callable[[Vector], bool] | None = None
    """Whether a model passes an examination on the server's trusted samples."""
    confusion: Callable[[Vector], NDArray[Any]] | None = None
    """Of a model: shares of true class (row) taken for class (column)."""
