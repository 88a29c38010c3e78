"""``--log-with`` reaches accelerate's trackers, and says what is missing."""

import pytest
from accelerate import tracking as accelerate_tracking

from weightshare.cli.trackers import tracking
from weightshare.errors import UserError
from weightshare.report import Run


class Notebook:
    """A tracker that notes what it is told, with the interface of accelerate's."""

    requires_logging_directory = True
    seen: list[tuple[dict, int]] = []

    def __init__(self, name, logging_dir):
        self.name, self.folder = name, logging_dir

    def start(self):
        self.seen.append(({"started": True}, 0))

    def log(self, values, step):
        self.seen.append((values, step))

    def finish(self):
        self.seen.append(({"finished": True}, -1))


def test_metrics_reach_the_tracker(tmp_path, monkeypatch):
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(accelerate_tracking, "get_available_trackers", lambda: ["notebook"])
    with Run.open(tmp_path / "run", {}, command="fold") as run, tracking(run, "notebook"):
        run.log(3, loss=1.5, note="text stays here")
    assert Notebook.seen == [({"started": True}, 0), ({"loss": 1.5}, 3), ({"finished": True}, -1)]


def test_trackers_that_are_not_there_are_refused(tmp_path, monkeypatch):
    with Run.open(tmp_path / "run", {}, command="fold") as run:
        with pytest.raises(UserError, match="accelerate knows"), tracking(run, "papyrus"):
            pass
        monkeypatch.setattr(accelerate_tracking, "get_available_trackers", list)
        with pytest.raises(UserError, match="needs the package wandb"), tracking(run, "wandb"):
            pass
        with tracking(run, None):
            run.log(1, loss=1.0)
    assert not run.listeners
