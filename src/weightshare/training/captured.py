"""The device side of an update as one CUDA graph: a step costs one launch instead of hundreds."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from weightshare.errors import UserError
from weightshare.training.place import Place
from weightshare.training.state import State
from weightshare.training.trees import map_tensors
from weightshare.training.update import Metrics, Update


class Captured(Update):
    """``update`` with ``apply`` recorded as a CUDA graph and replayed; on the CPU, ``update``.

    The first ``warmup`` steps run eagerly on a side stream (they are real steps: optimizer state
    and library handles come to be), the next one is recorded. From then on prepared batches are
    copied into fixed buffers, so all must have one structure, shape and type. Loading a checkpoint
    drops the recording, and the warm-up begins again.

    Several captured updates may be replayed side by side, each in a stream of its own from the
    first step on: it is recorded there too, because cuBLAS has one workspace per stream, and graphs
    that were recorded on one stream would write into the same while they run.

    Inside ``apply`` nothing may depend on values on the host: observers run while recording only,
    so what they do must be device work on tensors that stay; ``parts`` must not sample. Sampling
    belongs into ``prepare``.

    Raises:
        UserError: the optimizer has no ``capturable`` option, or a batch has another shape.
    """

    def __init__(self, update: Update, *, warmup: int = 3) -> None:
        self.update, self.warmup = update, max(warmup, 1)
        self._forget()

    def _forget(self) -> None:
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._form: Any = None
        self._metrics: Metrics = {}

    def move(self, place: Place) -> None:
        self.place = place
        self.update.move(place)
        self._forget()

    def prepare(self, batch: Any, step: int) -> Any:
        return self.update.prepare(batch, step)

    def apply(self, tensors: Any) -> Metrics:
        if self.device.type != "cuda":
            return self.update.apply(tensors)
        if self._graph is not None:
            return self._replay(tensors)
        if self._eager_steps == 0:
            make_capturable(self.update.optimizers(), self.device)
        if self._eager_steps < self.warmup:
            self._eager_steps += 1
            return self._beside(tensors)
        self._capture(tensors)
        return self._replay(tensors)

    def _beside(self, tensors: Any) -> Metrics:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            metrics = self.update.apply(tensors)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return metrics

    def _capture(self, tensors: Any) -> None:
        static = map_tensors(torch.clone, tensors)
        self._inputs, self._form = _leaves(static), _form(tensors)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream(self.device)
        if here == torch.cuda.default_stream(self.device):  # nothing can be recorded there
            here = torch.cuda.Stream(self.device)
        with torch.cuda.graph(graph, stream=here):
            self._metrics = self.update.apply(static)
        self._graph = graph

    def _replay(self, tensors: Any) -> Metrics:
        if _form(tensors) != self._form:
            raise UserError(
                f"A captured update was recorded for {self._form} and was given {_form(tensors)}; "
                "give batches of one shape, or train without capture."
            )
        assert self._graph is not None
        for static, tensor in zip(self._inputs, _leaves(tensors), strict=True):
            static.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return {name: value.clone() for name, value in self._metrics.items()}

    def state(self) -> State:
        return self.update.state()

    def load(self, state: State) -> None:
        self._forget()
        self.update.load(state)

    def weights(self) -> dict[str, Tensor]:
        return self.update.weights()

    def averaged(self) -> AbstractContextManager[Any]:
        return self.update.averaged()

    def keep_average(self) -> None:
        self.update.keep_average()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self.update.optimizers()

    @property
    def device(self) -> torch.device:
        return self.update.device


def make_capturable(optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
    """Let every optimizer step inside a CUDA graph: counters and learning rates become tensors."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "capturable" not in group:
                raise UserError(
                    f"{type(optimizer).__name__} cannot be captured in a CUDA graph; give an "
                    "optimizer with a capturable option (Adam, AdamW, NAdam, RMSprop...)."
                )
            group["capturable"] = True
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(group["lr"], device=device)
        for entries in optimizer.state.values():
            if isinstance(entries.get("step"), Tensor):
                entries["step"] = entries["step"].to(device)


def _leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def _form(tree: Any) -> Any:
    """The batch with shape and type in place of each tensor."""
    return map_tensors(lambda tensor: (tuple(tensor.shape), str(tensor.dtype)), tree)
