"""The training loop: it owns order and survival, the update owns the mathematics."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightshare.errors import UserError
from weightshare.training import checkpoint
from weightshare.training.batches import Batches, StatefulBatches
from weightshare.training.config import LoopConfig
from weightshare.training.interrupt import Interrupt
from weightshare.training.phase import RunLike
from weightshare.training.place import Place
from weightshare.training.randomness import reseed, same_streams_after
from weightshare.training.state import State, copy_into, join, part
from weightshare.training.update import Update


@dataclass
class Fit:
    """How training ended; all of it survives a kill."""

    step: int = 0
    """Updates done."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over the last logged steps."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """The evaluation of the weights that were kept."""
    best_step: int | None = None
    """Step of the best evaluation so far."""
    stale: int = 0
    """Evaluations since then."""
    stopped_early: bool = False
    seconds: float = 0.0
    """Training time, over all resumes."""


class Loop:
    """Train ``update`` on ``batches``: schedule, evaluation, early stopping, checkpoints, resume.

    Step t takes ``batches[t]``, after the global random states have been set to a function of
    (seed, t, rank); a run that was killed and resumed therefore ends with the same bytes as one
    that was not. ``fit`` leaves the random states as it found them.

    Args:
        update: what is done to the weights at each step; its weights stay where they are, or go to
            the accelerator's device.
        batches: ``batches[step]``, a pure function of the step; checkpointed too if it has
            ``state()`` and ``load()``.
        config: see ``LoopConfig``.
        run: a run directory. With it, metrics are logged, checkpoints written, and the newest one
            is resumed from; without, no file is touched. Every process of a run passes it, only
            the first writes.
        accelerator: an ``accelerate.Accelerator`` made by the caller, for its device and ranks.
            None: one process, on the device where the weights are.
        evaluate: called without arguments between steps; returns numbers by name, logged as
            ``evaluation.NAME``. Called on every rank; the first one's numbers count.
        progress: a bar with loss and time left, on standard error.

    On SIGINT or SIGTERM a loop with a run ends its step, writes a checkpoint and passes the signal
    on; a second signal acts at once.
    """

    def __init__(
        self,
        update: Update,
        batches: Batches,
        config: LoopConfig | None = None,
        run: RunLike | None = None,
        accelerator: Any = None,
        *,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        progress: bool = True,
    ) -> None:
        self.update, self.batches, self.run = update, batches, run
        self.config = config or LoopConfig()
        self.evaluate = evaluate
        self.place = (
            Place.of(accelerator, self.config.precision)
            if accelerator is not None
            else Place(update.device, self.config.precision)
        )
        self.progress = progress and self.place.rank == 0
        self.fitted = Fit()
        self._best: dict[str, Tensor] = {}
        self._pending: dict[str, list[Tensor]] = {}

    def fit(self) -> Fit:
        """Train to ``config.steps`` and leave the weights to keep in the model.

        These are the best ones (``keep_best``, ``patience``), else the averaged ones
        (``ema_decay``), else the last.

        Raises:
            UserError: the loss is not finite, the disk is full, a checkpoint is damaged or of
                another run.
        """
        config, done = self.config, self.fitted
        self.update.move(self.place)
        with same_streams_after(), ExitStack() as stack:
            self._resume()
            begun = time.perf_counter() - self.fitted.seconds
            done = self.fitted
            interrupt = stack.enter_context(Interrupt()) if self.run is not None else None
            bar = stack.enter_context(self._bar())
            for step in range(done.step, config.steps):
                if done.stopped_early:
                    break
                reseed(config.seed, step, self.place.rank)
                tensors = self.update.prepare(self.batches[step], step)
                for name, value in self.update.apply(tensors).items():
                    self._pending.setdefault(name, []).append(value)
                done.step = step + 1
                if self._due(config.log_every):
                    self._log()
                if self.evaluate is not None and self._due(config.evaluate_every):
                    self._evaluate()
                    if done.stopped_early:
                        self._log()
                done.seconds = time.perf_counter() - begun
                stop = self._stopping(interrupt)
                if self._due(config.checkpoint_every) or stop:
                    self._save()
                bar(done)
                if stop:
                    return done
        if self._best:
            copy_into(self.update.weights(), self._best)
        else:
            self.update.keep_average()
        return done

    def _stopping(self, interrupt: Interrupt | None) -> bool:
        """Whether to stop after this step; several ranks must stop at the same one."""
        stop = interrupt is not None and interrupt.noted is not None
        if self.place.world > 1:
            return self._due(self.config.log_every) and self.place.agreed(stop)
        return stop

    def _due(self, every: int) -> bool:
        step = self.fitted.step
        last = step == self.config.steps or self.fitted.stopped_early
        return last or bool(every and step % every == 0)

    def _values(self) -> dict[str, list[float]]:
        """The pending metrics as numbers; the one place where the loop waits for the device."""
        lengths = {name: len(values) for name, values in self._pending.items()}
        flat = [torch.as_tensor(v) for values in self._pending.values() for v in values]
        numbers = iter(torch.stack([v.detach().double() for v in flat]).tolist() if flat else [])
        values = {name: [next(numbers) for _ in range(n)] for name, n in lengths.items()}
        for name, series in values.items():
            if not all(map(isfinite, series)):
                raise UserError(
                    f"{name} became {next(v for v in series if not isfinite(v))} before step "
                    f"{self.fitted.step}; lower the learning rate or clip the gradients."
                )
        return values

    def _log(self) -> None:
        means = {name: sum(values) / len(values) for name, values in self._values().items()}
        self._pending.clear()
        if means:
            self.fitted.metrics = means
            self._write(means)

    def _write(self, scalars: Mapping[str, float]) -> None:
        if self.run is not None and self.place.rank == 0:
            self.run.log(self.fitted.step, **scalars)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        config, done = self.config, self.fitted
        with self.update.averaged():
            found = {name: float(value) for name, value in self.evaluate().items()}
            found = self.place.agreed(found)
            keep = config.keep_best or config.patience is not None
            if keep and config.watch not in found:
                raise UserError(
                    f"The watched metric {config.watch!r} is not among the evaluation's "
                    f"{sorted(found)}; set watch to one of them."
                )
            sign = -1 if config.higher_is_better else 1
            before = sign * done.evaluation[config.watch] if done.best_step is not None else inf
            if not keep:
                done.evaluation = found
            elif sign * found[config.watch] < before:
                done.evaluation, done.best_step, done.stale = found, done.step, 0
                self._best = {name: t.clone() for name, t in self.update.weights().items()}
            else:
                done.stale += 1
                done.stopped_early = config.patience is not None and done.stale >= config.patience
        self._write({f"evaluation.{name}": value for name, value in found.items()})

    def _save(self) -> None:
        pending = self._values()
        if self.run is None or self.place.rank > 0:
            return
        states = {"update": self.update.state(), "best": State(self._best)}
        if isinstance(self.batches, StatefulBatches):
            states["batches"] = self.batches.state()
        states["loop"] = State({}, {"seed": self.config.seed, "pending": pending})
        state = join(states)
        values = state.values | {"fit": vars(self.fitted)}
        keep = self.config.keep_checkpoints
        checkpoint.save(self.run.checkpoints, self.fitted.step, state.tensors, values, keep)

    def _resume(self) -> None:
        if self.run is None:
            return
        folder = self.run.checkpoints
        if self.place.rank == 0:
            checkpoint.sweep(folder)
        found = self.place.agreed([str(path) for path in checkpoint.checkpoints(folder)])
        if not found:
            if self.place.rank == 0:
                self.run.truncate(0)
            return
        path = Path(found[-1])
        state = State(*checkpoint.load(path))
        fitted, loop = Fit(**state.values["fit"]), state.values["loop"]
        if fitted.step > self.config.steps or loop["seed"] != self.config.seed:
            raise UserError(
                f"{path} was written at step {fitted.step} with seed {loop['seed']}, this run has "
                f"{self.config.steps} steps and seed {self.config.seed}; give the same seed and at "
                "least as many steps, or start in an empty folder."
            )
        self.update.load(part(state, "update"))
        if isinstance(self.batches, StatefulBatches):
            self.batches.load(part(state, "batches"))
        self.fitted = fitted
        device = self.place.device
        self._best = {name: t.to(device) for name, t in part(state, "best").tensors.items()}
        self._pending = {
            name: [torch.tensor(value, dtype=torch.float64) for value in values]
            for name, values in loop["pending"].items()
        }
        # What is logged after a finished loop belongs to what came next in the run.
        finished = fitted.stopped_early or fitted.step == self.config.steps
        if self.place.rank == 0 and not finished:
            self.run.truncate(fitted.step)

    def _bar(self) -> AbstractContextManager[Callable[[Fit], None]]:
        return _Bar(self.fitted, self.config.steps) if self.progress else nullcontext(_silent)


def _silent(done: Fit) -> None:
    pass


class _Bar:
    """A rich progress bar that is touched ten times a second, not at every step."""

    def __init__(self, done: Fit, steps: int) -> None:
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("training"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[loss]}"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task("training", total=steps, completed=done.step, loss="")
        self.next, self.steps = 0.0, steps

    def __enter__(self) -> Callable[[Fit], None]:
        self.bar.start()
        return self.update

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, done: Fit) -> None:
        now = time.monotonic()
        if now >= self.next or done.step == self.steps:
            self.next = now + 0.1
            losses = [value for name, value in done.metrics.items() if name.endswith("loss")]
            text = f"loss {losses[-1]:.4g}" if losses else ""
            self.bar.update(self.task, completed=done.step, loss=text)
