r"""Aggregation rules that Flower does not have, as strategies of its own kind: one model for all.

With updates :math:`g_i`:

* geometric median: :math:`\arg\min_z \sum_i \|g_i - z\|`, by Weiszfeld's iteration;
* FoolsGold (Fung et al. 2020): participants whose histories point the same way lose their weight;
* FLTrust (Cao et al. 2021): :math:`\sum_i T_i\, g_i \|g_0\| / \|g_i\| / \sum_i T_i` with
  :math:`T_i = \max(0, \cos(g_i, g_0))` and a trusted update :math:`g_0`.

A reply that is not a float32 vector of the right size with finite entries is left out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import log

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, QFedAvg
from numpy.typing import NDArray

from weightshare.federated import wire
from weightshare.federated.vectors import Vector, products, squared_norm, weighted_sum
from weightshare.sharing.agreement import normalised
from weightshare.sharing.products import inner_products

Double = NDArray[np.float64]


def geometric_median(rows: Sequence[Vector], rounds: int = 100, tolerance: float = 1e-7) -> Vector:
    """``(D,)``; the point with the least sum of distances to ``rows``."""
    matrix = np.stack(rows).astype(np.float64)
    point = matrix.mean(0)
    for _ in range(rounds):
        # Row by row: a difference that stays in the cache is six times as fast.
        distances = np.array([np.linalg.norm(row - point) for row in matrix])
        weights = 1 / np.maximum(distances, 1e-12)
        following = weights @ matrix / weights.sum()
        if np.linalg.norm(following - point) <= tolerance * (np.linalg.norm(point) + 1e-12):
            return following.astype(np.float32)
        point = following
    return point.astype(np.float32)


def foolsgold_weights(cosines: Double) -> Double:
    r"""Weights in [0, 1] from the cosines of the histories, ``(N, N)`` to ``(N,)``.

    :math:`v_i = \max_{j \ne i} c_{ij}`; where :math:`v_j > v_i`, :math:`c_{ij}` is scaled by
    :math:`v_i / v_j`; :math:`\alpha_i = 1 - \max_j c_{ij}`, divided by the largest, then
    :math:`\operatorname{clip}(\ln(\alpha / (1 - \alpha)) + 1/2, 0, 1)`.
    """
    count = len(cosines)
    if count == 1:
        return np.ones(1)
    others = np.where(np.eye(count, dtype=bool), -np.inf, cosines)
    most = others.max(1)
    pardoned = others.copy()
    for i in range(count):
        for j in range(count):
            if i != j and most[j] > most[i] and most[j] > 0:
                pardoned[i, j] *= most[i] / most[j]
    weights = np.clip(1 - pardoned.max(1), 0, 1)
    top = weights.max()
    if top <= 0:
        return np.zeros(count)
    weights = weights / top

    def logit(value: float) -> float:
        if value <= 0:
            return 0.0
        return 1.0 if value >= 1 else min(max(log(value / (1 - value)) + 0.5, 0.0), 1.0)

    return np.array([logit(float(value)) for value in weights])


def fltrust(rows: Sequence[Vector], root: Vector) -> Vector:
    """The trusted combination of updates, ``(D,)``; zero where nobody is trusted."""
    norms = np.sqrt([squared_norm(row) for row in rows])
    length = float(np.sqrt(squared_norm(root)))
    safe = np.where(norms > 0, norms, 1.0)
    trust = np.maximum(products(rows, root) / (safe * (length or 1.0)), 0) * (norms > 0)
    if trust.sum() <= 0:
        return np.zeros_like(root)
    return weighted_sum(rows, (trust / trust.sum() * length / safe).tolist())


class UpdateStrategy(FedAvg):
    """FedAvg's messages with another way to combine the updates; see the children."""

    def __init__(self, minimum: int = 2) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=minimum, min_available_nodes=minimum
        )
        self._weights = np.zeros(0, np.float32)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._weights = arrays["weights"].numpy()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        updates: dict[int, Vector] = {}
        for reply in replies:
            try:
                packed = reply.content["arrays"]["weights"]
                weights = wire.read_vector(packed, len(self._weights))
            except (wire.Rejected, KeyError, TypeError, ValueError):
                continue
            updates[reply.metadata.src_node_id] = weights - self._weights
        if not updates:
            return None, None
        updates = dict(sorted(updates.items()))
        weights = self._weights + self.combine(updates, server_round)
        return ArrayRecord({"weights": wire.array(weights)}), MetricRecord(
            {"answered": len(updates)}
        )

    def combine(self, updates: Mapping[int, Vector], server_round: int) -> Vector:
        """One update of many, by node."""
        raise NotImplementedError


class GeometricMedian(UpdateStrategy):
    """The geometric median of the updates."""

    def combine(self, updates: Mapping[int, Vector], server_round: int) -> Vector:
        return geometric_median(list(updates.values()), tolerance=1e-5)


class FoolsGold(UpdateStrategy):
    """Weights by how unlike the participants' histories are."""

    def __init__(self, minimum: int = 2) -> None:
        super().__init__(minimum)
        self.history: dict[int, Vector] = {}

    def combine(self, updates: Mapping[int, Vector], server_round: int) -> Vector:
        for node, update in updates.items():
            self.history[node] = self.history.get(node, np.zeros_like(update)) + update
        kept = [torch.from_numpy(self.history[node]) for node in updates]
        products = inner_products({"history": kept}, len(kept))["history"]
        cosines = normalised(products).nan_to_num().numpy()
        weights = foolsgold_weights(cosines)
        rows = list(updates.values())
        if weights.sum() <= 0:
            return np.zeros_like(rows[0])
        return weighted_sum(rows, (weights / weights.sum()).tolist())


class FLTrust(UpdateStrategy):
    """Weights by agreement with an update from trusted data.

    Args:
        root: (weights, round) -> trusted update, ``(D,)``.
    """

    def __init__(self, root: Callable[[Vector, int], Vector], minimum: int = 2) -> None:
        super().__init__(minimum)
        self.root = root

    @property
    def server(self) -> Vector:
        """What the trusted update starts from in this round."""
        return self._weights

    def combine(self, updates: Mapping[int, Vector], server_round: int) -> Vector:
        return fltrust(list(updates.values()), self.root(self._weights, server_round))


class SingleQFedAvg(QFedAvg):
    """Flower's q-FedAvg, whose weights come in double precision, in that of the participants."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            weights = arrays["weights"].numpy().astype(np.float32)
            arrays = ArrayRecord({"weights": wire.array(weights)})
        return arrays, metrics
