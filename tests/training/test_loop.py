"""Order and survival: what the loop logs, evaluates, keeps and resumes."""

import random
import signal
import threading

import pytest
import torch
from tiny_task import FakeRun, Tokens, TwoCounts, seeded, tokens

from weightshare.errors import UserError
from weightshare.report import Run
from weightshare.training import (
    EpochBatches,
    GradientUpdate,
    Loop,
    LoopConfig,
    Phase,
    Sequence,
    Zipped,
    checkpoint,
    held_out,
    schedule,
)


def make(run=None, *, steps=20, evaluate=None, batches=None, dropout=0.2, **options):
    defaults = {"learning_rate": 0.01, "checkpoint_every": 6, "log_every": 4}
    config = LoopConfig(steps=steps, **(defaults | options))
    task = seeded(TwoCounts, dropout=dropout)
    update = GradientUpdate.from_config(task, config)
    batches = batches or EpochBatches(tokens(40), 8, config.seed)
    return Loop(update, batches, config, run, evaluate=evaluate, progress=False)


def bytes_of(loop):
    return [t.numpy().tobytes() for t in loop.update.task.state_dict().values()]


class Stopped(Exception):
    pass


class StopAt:
    """Batches that fail before a step, as a killed process would."""

    def __init__(self, batches, step):
        self.batches, self.step = batches, step

    def __getitem__(self, step):
        if step == self.step:
            raise Stopped
        return self.batches[step]


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"accumulate": 3}])
@pytest.mark.parametrize("stop", [5, 6, 13, 19])
def test_a_resumed_run_ends_with_the_same_bytes_and_the_same_metrics(tmp_path, stop, options):
    whole, broken = FakeRun(tmp_path / "whole"), FakeRun(tmp_path / "broken")
    uninterrupted = make(whole, **options)
    uninterrupted.fit()
    batches = StopAt(EpochBatches(tokens(40), 8, 0), stop)
    with pytest.raises(Stopped):
        make(broken, batches=batches, **options).fit()
    resumed = make(broken, **options)
    fitted = resumed.fit()
    assert bytes_of(resumed) == bytes_of(uninterrupted)
    assert broken.rows() == whole.rows()
    assert fitted.metrics == uninterrupted.fitted.metrics


def test_resuming_a_finished_run_takes_no_step_and_gives_the_same_weights(run):
    first = make(run, ema_decay=0.9)
    first.fit()
    rows = run.rows()
    again = make(run, ema_decay=0.9, batches=StopAt(EpochBatches(tokens(40), 8, 0), 20))
    assert again.fit().step == 20
    assert bytes_of(again) == bytes_of(first) and run.rows() == rows


def test_a_run_can_be_lengthened_only_with_the_same_seed(run):
    make(run, steps=10).fit()
    assert make(run, steps=14).fit().step == 14
    with pytest.raises(UserError, match="at least as many steps"):
        make(run, steps=8).fit()
    with pytest.raises(UserError, match="seed"):
        make(run, steps=20, seed=1).fit()


def test_a_checkpoint_of_another_model_is_refused_by_name(run):
    make(run, steps=3).fit()
    loop = make(run, steps=5)
    other = seeded(Tokens)
    other.net[0] = torch.nn.Linear(6, 8, dtype=torch.float64, bias=False)
    other.net[3] = torch.nn.Linear(8, 11, dtype=torch.float64)
    other.net.append(torch.nn.Linear(11, 11, dtype=torch.float64))
    loop.update = GradientUpdate.from_config(other, loop.config)
    with pytest.raises(UserError, match=r"not of this model: 'net\.4"):
        loop.fit()


def test_without_a_run_no_file_is_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().fit()
    assert list(tmp_path.iterdir()) == []


def test_a_logged_row_is_the_mean_since_the_row_before(run):
    loop = make(run, steps=10, dropout=0.0)
    losses = []
    apply = loop.update.apply
    loop.update.apply = lambda tensors: (m := apply(tensors), losses.append(m["loss"].item()))[0]
    loop.fit()
    rows = run.rows()
    assert [row["step"] for row in rows] == [4, 8, 10]
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 4), (4, 8), (8, 10))]
    assert [row["loss"] for row in rows] == pytest.approx(means, rel=1e-12)


def test_the_schedule_drives_the_learning_rate():
    rates = []
    loop = make(steps=9)
    group = loop.update.optimizer.param_groups[0]
    apply = loop.update.apply
    loop.update.apply = lambda tensors: (rates.append(group["lr"]), apply(tensors))[1]
    loop.fit()
    factor = schedule(loop.config)
    assert rates == [0.01 * factor(step) for step in range(9)]


def test_training_leaves_the_global_random_states_alone():
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(()).item()
    loop = make()
    random.seed(5)
    torch.manual_seed(5)
    loop.fit()
    assert (random.random(), torch.rand(()).item()) == expected


def test_the_global_random_states_do_not_reach_the_run():
    first, second = make(), make()
    torch.manual_seed(1)
    first.fit()
    torch.manual_seed(2)
    second.fit()
    assert bytes_of(first) == bytes_of(second)
    other = make(seed=1)
    other.fit()
    assert bytes_of(first) != bytes_of(other)


class Course:
    """An evaluation that follows a given course and remembers the weights it saw."""

    def __init__(self, losses):
        self.losses, self.seen = losses, []
        self.loop = None

    def __call__(self):
        self.seen.append(bytes_of(self.loop))
        return {"loss": self.losses[self.loop.fitted.step // 3 - 1]}


def with_course(losses, run=None, **options):
    course = Course(losses)
    course.loop = make(run, evaluate=course, evaluate_every=3, **options)
    return course.loop, course


def test_early_stopping_ends_with_the_best_weights(run):
    loop, course = with_course([5.0, 3.0, 4.0, 3.5, 1.0, 0.0], run, steps=18, patience=2)
    fitted = loop.fit()
    assert (fitted.step, fitted.best_step, fitted.stopped_early) == (12, 6, True)
    assert fitted.evaluation == {"loss": 3.0}
    assert bytes_of(loop) == course.seen[1] != course.seen[-1]
    evaluations = [row["evaluation.loss"] for row in run.rows() if "evaluation.loss" in row]
    assert evaluations == [5.0, 3.0, 4.0, 3.5]
    again, _ = with_course([0.0] * 9, run, steps=18, patience=2)
    again.fit()
    assert bytes_of(again) == bytes_of(loop) and again.fitted == fitted


def test_keep_best_follows_the_direction_and_survives_a_resume(run):
    losses = [1.0, 9.0, 2.0, 3.0, 4.0, 5.0]
    options = {"steps": 18, "keep_best": True, "higher_is_better": True}
    whole, course = with_course(losses, **options)
    whole.fit()
    assert bytes_of(whole) == course.seen[1]
    batches = StopAt(EpochBatches(tokens(40), 8, 0), 14)
    with pytest.raises(Stopped):
        with_course(losses, run, batches=batches, **options)[0].fit()
    resumed, _ = with_course(losses, run, **options)
    assert resumed.fit().best_step == 6
    assert bytes_of(resumed) == bytes_of(whole)


def test_evaluation_sees_the_averaged_weights_and_they_are_kept():
    loop, course = with_course([0.0] * 6, steps=18, ema_decay=0.9)
    loop.fit()
    assert bytes_of(loop) == course.seen[-1]
    plain, _ = with_course([0.0] * 6, steps=18)
    plain.fit()
    assert bytes_of(loop) != bytes_of(plain)


def test_an_unknown_watched_metric_is_refused_with_the_known_ones():
    loop, _ = with_course([0.0] * 6, steps=18, keep_best=True, watch="accuracy")
    with pytest.raises(UserError, match=r"'accuracy'.*'loss'"):
        loop.fit()


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(run):
    with pytest.raises(UserError, match="lower the learning rate"):
        make(run, learning_rate=1e200, clip=None, checkpoint_every=3, log_every=100).fit()
    for path in checkpoint.checkpoints(run.checkpoints):
        assert all(torch.isfinite(t).all() for t in checkpoint.load(path)[0].values())


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_the_step_writes_a_checkpoint_and_is_passed_on(run, number, kind):
    def terminate(*arguments):
        raise SystemExit

    class Signal(StopAt):
        def __getitem__(self, step):
            if step == self.step:
                signal.raise_signal(number)
            return self.batches[step]

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(kind):
            make(run, batches=Signal(EpochBatches(tokens(40), 8, 0), 8)).fit()
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoint.step_of(checkpoint.checkpoints(run.checkpoints)[-1]) == 9
    resumed, whole = make(run), make()
    resumed.fit()
    whole.fit()
    assert bytes_of(resumed) == bytes_of(whole)


def test_a_signal_that_the_process_ignores_stops_nothing(run):
    """As SIGINT is in a shell's background job: it once ended the loop and was then lost."""

    class Signal(StopAt):
        def __getitem__(self, step):
            if step == self.step:
                signal.raise_signal(signal.SIGINT)
            return self.batches[step]

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loop = make(run, batches=Signal(EpochBatches(tokens(40), 8, 0), 8))
        fit = loop.fit()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert fit.step == loop.config.steps


def test_a_real_run_directory_resumes_to_the_same_metrics(tmp_path):
    def train(folder, stop=None, resume=False):
        with Run.open(folder, LoopConfig(), resume=resume) as run:
            loop = make(run, batches=StopAt(EpochBatches(tokens(40), 8, 0), stop))
            loop.fit()
        return bytes_of(loop), (folder / "metrics.jsonl").read_text()

    with pytest.raises(Stopped):
        train(tmp_path / "broken", stop=10)
    assert train(tmp_path / "broken", resume=True) == train(tmp_path / "whole")


def test_loops_run_in_threads(run):
    loops = [make(Phase(run, str(number)), steps=4) for number in range(2)]
    threads = [threading.Thread(target=loops[0].fit)]
    threads[0].start()
    threads[0].join()
    assert loops[0].fitted.step == 4


def test_phases_of_a_run_keep_their_own_checkpoints_and_metrics(run):
    def both(stop=None):
        first = make(Phase(run, "first"), steps=8)
        first.fit()
        batches = EpochBatches(tokens(40), 8, 1)
        second = make(
            Phase(run, "second", start=8), steps=12, seed=1, batches=StopAt(batches, stop)
        )
        second.fit()
        return first, second

    with pytest.raises(Stopped):
        both(stop=10)
    _, second = both()
    assert [row["step"] for row in run.rows()] == [4, 8, 12, 16, 20]
    alone = make(steps=12, seed=1, batches=EpochBatches(tokens(40), 8, 1))
    alone.fit()
    assert bytes_of(second) == bytes_of(alone)


def test_a_bilevel_run_resumes_with_the_same_bytes(tmp_path):
    def bilevel(path, stop=None):
        task = seeded(Tokens, dropout=0.1)
        config = LoopConfig(steps=12, checkpoint_every=5, log_every=3)
        outer = GradientUpdate(task, torch.optim.Adam(task.net[0].parameters(), lr=0.01))
        inner = GradientUpdate.from_config(task, config, task.net[3].parameters())
        sources = (EpochBatches(tokens(9, seed=s), 4, seed=s) for s in (1, 2))
        batches = StopAt(Zipped(*sources), stop)
        run = FakeRun(path)
        update = Sequence(architecture=outer, weights=inner)
        loop = Loop(update, batches, config, run, progress=False)
        loop.fit()
        return [t.numpy().tobytes() for t in task.state_dict().values()], run.rows()

    with pytest.raises(Stopped):
        bilevel(tmp_path / "broken", stop=7)
    assert bilevel(tmp_path / "broken") == bilevel(tmp_path / "whole")


def test_stateful_batches_are_restored(run):
    class Adaptive:
        """Rows whose weight follows what was drawn before, as adaptive sampling does."""

        def __init__(self, stop=None):
            self.base, self.drawn, self.stop = tokens(10), torch.zeros(10), stop

        def __getitem__(self, step):
            if step == self.stop:
                raise Stopped
            rows = self.drawn.argsort(stable=True)[:3]
            self.drawn[rows] += torch.tensor([1.0, 2.0, 3.0])
            return {key: value[rows] for key, value in self.base.items()}

        def state(self):
            from weightshare.training import State

            return State({"drawn": self.drawn})

        def load(self, state):
            self.drawn = state.tensors["drawn"]

    whole = make(batches=Adaptive())
    whole.fit()
    with pytest.raises(Stopped):
        make(run, batches=Adaptive(stop=15)).fit()
    resumed = make(run, batches=Adaptive())
    resumed.fit()
    assert bytes_of(resumed) == bytes_of(whole)


def test_bf16_runs_the_forward_pass_under_autocast():
    task = seeded(Tokens, dtype=torch.float32)
    seen = []
    task.net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    config = LoopConfig(steps=2, precision="bf16")
    update = GradientUpdate.from_config(task, config)
    Loop(update, EpochBatches(tokens(), 4), config, progress=False).fit()
    assert set(seen) == {torch.bfloat16}
    assert task.net[0].weight.dtype == torch.float32


def test_held_out_loss_is_weighted_by_counts_and_leaves_modes_as_they_were():
    task = seeded(TwoCounts, dropout=0.5)
    task.net[0].eval()
    modes = [module.training for module in task.modules()]
    batch = tokens()
    pieces = [{k: v[a:b] for k, v in batch.items()} for a, b in ((0, 2), (2, 9), (9, 12))]
    parts, whole = held_out(task, pieces), held_out(task, [batch])
    for name in ("cross_entropy", "size", "loss"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-12)
    assert [module.training for module in task.modules()] == modes
    with torch.no_grad():
        logits = task.eval().net(task.frozen(batch["inputs"])).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten())
    assert whole["cross_entropy"] == pytest.approx(loss.item(), rel=1e-12)


def test_progress_goes_to_standard_error_and_silence_is_silent(capfd):
    loop = make()
    loop.fit()
    assert capfd.readouterr() == ("", "")
    loop = make()
    loop.progress = True
    loop.fit()
    shown = capfd.readouterr()
    assert shown.out == "" and "20/20" in shown.err and "loss" in shown.err
