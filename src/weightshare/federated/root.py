"""The server's own training on trusted samples, done along with that of the participants."""

from collections.abc import Callable, Mapping

from weightshare.federated.local import Training
from weightshare.federated.material import ROOT
from weightshare.federated.vectors import Vector


class RootAlong:
    """Trains what it is asked to and, in the same go, the server's weights on trusted samples.

    Where federations run in lockstep, training them one by one afterwards would put those with a
    trusted update out of step with the others.

    Args:
        learner: knows the trusted samples under the name ``ROOT``.
        server: the weights that the trusted update of this round starts from.
    """

    def __init__(self, learner: Training, server: Callable[[], Vector]) -> None:
        self.learner, self.server = learner, server
        self._found: tuple[int, Vector, Vector] | None = None

    def train(self, starts: Mapping[str, Vector], number: int) -> dict[str, Vector]:
        begun = self.server()
        trained = self.learner.train({**starts, ROOT: begun}, number)
        self._found = number, begun, trained.pop(ROOT)
        return trained

    def update(self, weights: Vector, number: int) -> Vector:
        """The trusted update from ``weights`` in round ``number``, ``(D,)``."""
        if self._found is None or self._found[0] != number or self._found[1] is not weights:
            self._found = number, weights, self.learner.train({ROOT: weights}, number)[ROOT]
        return self._found[2] - weights
