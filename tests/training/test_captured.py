"""One CUDA graph does what eager steps do."""

import pytest
import torch
from tiny_task import TwoCounts, seeded, tokens

from weightshare.errors import UserError
from weightshare.training import Captured, EpochBatches, GradientUpdate, Loop, LoopConfig, Losses
from weightshare.training.captured import make_capturable

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class OnDevice(TwoCounts):
    """Counts stay tensors: a number read back from the device cannot be captured."""

    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        from dataclasses import replace

        losses = super(TwoCounts, self).forward(batch)
        hidden = self.net(self.frozen(batch["inputs"])).square().sum()
        size = replace(losses["cross_entropy"], sum=hidden, count=len(batch["inputs"]), weight=0.3)
        return losses | {"size": size}


def train(device, capture, steps=50, dropout=0.0, run=None, **options):
    config = LoopConfig(steps=steps, learning_rate=0.01, ema_decay=0.9, **options)
    task = seeded(OnDevice, dropout=dropout).to(device)
    update = GradientUpdate.from_config(task, config)
    update = Captured(update) if capture else update
    batches = EpochBatches(tokens(40), 8)
    fitted = Loop(update, batches, config, run, progress=False).fit()
    return fitted, torch.cat([p.detach().flatten() for p in task.parameters()]).cpu()


def test_on_the_cpu_a_captured_update_is_the_update():
    (plain, expected), (captured, found) = train("cpu", False), train("cpu", True)
    assert torch.equal(found, expected) and captured.metrics == plain.metrics


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"accumulate": 3}])
def test_fifty_captured_steps_are_fifty_eager_steps(options):
    (plain, expected), (captured, found) = (
        train("cuda", False, **options),
        train("cuda", True, **options),
    )
    assert (found - expected).abs().max() < 1e-6
    assert captured.metrics == pytest.approx(plain.metrics, rel=1e-5)


@cuda
@pytest.mark.gpu
def test_captured_updates_side_by_side_do_not_disturb_each_other():
    def weights(together):
        config = LoopConfig(learning_rate=0.01, ema_decay=0.9)
        tasks = [seeded(OnDevice).to("cuda") for _ in range(3)]
        updates = [Captured(GradientUpdate.from_config(task, config)) for task in tasks]
        streams = [torch.cuda.Stream() for _ in updates]
        torch.cuda.synchronize()
        for step in range(200):
            for seed, (update, stream) in enumerate(zip(updates, streams, strict=True)):
                with torch.cuda.stream(stream):
                    update.apply(update.prepare(tokens(400, seed=100 * seed + step), step))
                if not together:
                    torch.cuda.synchronize()
        torch.cuda.synchronize()
        return torch.cat([p.detach().flatten() for task in tasks for p in task.parameters()])

    assert (weights(True) - weights(False)).abs().max() < 1e-6


@cuda
@pytest.mark.gpu
def test_a_captured_run_goes_on_from_a_checkpoint(run):
    train("cuda", True, steps=50, schedule="constant", warmup_fraction=0, run=run)
    _, resumed = train("cuda", True, steps=80, schedule="constant", warmup_fraction=0, run=run)
    _, whole = train("cuda", True, steps=80, schedule="constant", warmup_fraction=0)
    assert (resumed - whole).abs().max() < 1e-6


@cuda
@pytest.mark.gpu
def test_a_batch_of_another_shape_is_refused():
    task = seeded(OnDevice).to("cuda")
    update = Captured(GradientUpdate.from_config(task, LoopConfig()), warmup=1)
    for step in range(3):
        update.apply(update.prepare(tokens(8, seed=step), step))
    with pytest.raises(UserError, match="batches of one shape"):
        update.apply(update.prepare(tokens(9), 3))


def test_an_optimizer_without_the_option_is_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(UserError, match="SGD cannot be captured"):
        make_capturable([optimizer], torch.device("cpu"))
