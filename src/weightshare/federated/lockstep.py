"""Several federations side by side: each in a thread, all their local training in one stack.

Rules, attacks and seeds to be compared train the same small network; stacked, a step costs little
more for thirty federations than for one. Only one thread runs at a time. When all of them wait for
local training, it is done for all in one go.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from typing import TypeVar

from weightshare.federated.config import LocalConfig
from weightshare.federated.local import Examples
from weightshare.federated.stacked import Lesson, Stack
from weightshare.federated.vectors import Vector
from weightshare.training import Task

T = TypeVar("T")


@dataclass
class _Request:
    lessons: list[Lesson]
    trained: list[Vector] | None = None
    failure: Exception | None = None


@dataclass
class Lockstep:
    """Federations that train together.

    Make each federation with ``training`` (an argument of ``simulate``), then ``run`` them.

    Args:
        device: where to train.
        capture: see ``Stack``.
    """

    device: str = "cpu"
    capture: bool = True
    _turn: Condition = field(default_factory=Condition)
    _running: int = 0
    _requests: list[_Request] = field(default_factory=list)
    _data: list[Examples] = field(default_factory=list)
    _task: Task | None = None
    _stack: Stack | None = None

    def training(
        self, task: Task, data: Mapping[str, Examples], config: LocalConfig
    ) -> "LockstepTraining":
        """Local training of one more federation; all tasks must have the same structure."""
        self._task = self._task or task
        self._data.extend(data.values())
        return LockstepTraining(self, dict(data), config)

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all jobs, each of which may train; the first failure is raised."""
        assert self._task is not None
        self._stack = Stack(self._task, self._data, self.device, self.capture)
        self._running, self._requests = len(jobs), []
        with ThreadPoolExecutor(max_workers=len(jobs)) as threads:
            return list(threads.map(self._take_part, jobs))

    def _take_part(self, job: Callable[[], T]) -> T:
        with self._turn:
            try:
                return job()
            finally:
                self._running -= 1
                self._answer_if_all_wait()

    def train(self, lessons: list[Lesson]) -> list[Vector]:
        """Wait until everybody asks, then train them all; called from a job."""
        request = _Request(lessons)
        self._requests.append(request)
        self._answer_if_all_wait()
        while request.trained is None and request.failure is None:
            self._turn.wait()  # gives the turn to another federation meanwhile
        if request.failure is not None:
            raise request.failure
        assert request.trained is not None
        return request.trained

    def _answer_if_all_wait(self) -> None:
        if not self._requests or len(self._requests) < self._running:
            return
        assert self._stack is not None
        requests, self._requests = self._requests, []
        try:
            trained = iter(self._stack.train([each for r in requests for each in r.lessons]))
            for request in requests:
                request.trained = [next(trained) for _ in request.lessons]
        except Exception as error:
            for request in requests:
                request.failure = error
        self._turn.notify_all()


@dataclass(frozen=True)
class LockstepTraining:
    """What one federation of a ``Lockstep`` trains with."""

    lockstep: Lockstep
    data: Mapping[str, Examples]
    config: LocalConfig

    def train(self, starts: Mapping[str, Vector], number: int) -> dict[str, Vector]:
        lessons = [
            Lesson(start, self.data[name], name, number, self.config)
            for name, start in starts.items()
        ]
        return dict(zip(starts, self.lockstep.train(lessons), strict=True))
