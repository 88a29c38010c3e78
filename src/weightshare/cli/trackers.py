"""``--log-with``: hand a run's metrics to one of accelerate's trackers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weightshare.errors import UserError

if TYPE_CHECKING:
    from weightshare.report import Run


@contextmanager
def tracking(run: "Run", name: str | None) -> Iterator[None]:
    """Inside, what the run logs also goes to the tracker ``name`` (tensorboard, trackio, wandb...).

    Raises:
        UserError: accelerate does not know the tracker, or its package is not installed.
    """
    if name is None:
        yield
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise UserError(f"--log-with is {name!r}; accelerate knows {', '.join(known)}.")
    if name not in [str(one) for one in get_available_trackers()]:
        raise UserError(f"--log-with {name} needs the package {name}; install it with pip.")
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    folder: Any = {"logging_dir": str(run.path)} if tracker_class.requires_logging_directory else {}
    tracker = tracker_class(run.path.name, **folder)
    tracker.start()

    def send(step: int, scalars: dict[str, Any]) -> None:
        numbers = {key: value for key, value in scalars.items() if isinstance(value, (int, float))}
        tracker.log(numbers, step=step)

    run.listeners.append(send)
    try:
        yield
    finally:
        run.listeners.remove(send)
        tracker.finish()
