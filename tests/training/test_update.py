"""What one update computes, against plain torch."""

import copy

import pytest
import torch
from tiny_task import Tokens, TwoCounts, seeded, tokens
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW

from weightshare.errors import UserError
from weightshare.training import (
    GradientUpdate,
    LoopConfig,
    Sequence,
    Task,
    Term,
    split,
    total,
)


def sgd(task, **options):
    return GradientUpdate(task, SGD(task.net.parameters(), lr=0.5, momentum=0.9), **options)


def trained(task, update, steps=3):
    for step in range(steps):
        update.apply(update.prepare(tokens(seed=step), step))
    return torch.cat([p.detach().flatten() for p in task.net.parameters()])


def largest(a, b):
    return (a - b).abs().max().item()


def test_an_update_is_the_hand_written_step():
    task = seeded(Tokens)
    plain = copy.deepcopy(task)
    optimizer = AdamW(plain.net.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(5):
        batch = tokens(seed=step)
        logits = plain.net(plain.frozen(batch["inputs"]))
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(plain.net.parameters(), 0.1)
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in plain.net.parameters()])
    options = {"lr": 0.01, "weight_decay": 0.1}
    update = GradientUpdate(task, AdamW(task.net.parameters(), **options), clip=0.1)
    assert largest(trained(task, update, 5), expected) < 1e-13


@pytest.mark.parametrize("kind", [Tokens, TwoCounts])
@pytest.mark.parametrize("parts", [2, 5, 12, 40])
def test_parts_of_unequal_counts_give_the_update_of_the_whole_batch(kind, parts):
    whole, cut = seeded(kind), seeded(kind)
    pieces = split(tokens(), parts)
    counts = {int((piece["labels"] != -100).sum()) for piece in pieces}
    assert len(counts) > 1
    assert largest(trained(whole, sgd(whole)), trained(cut, sgd(cut, parts=parts))) < 1e-12


def test_the_mean_of_part_means_would_be_another_update():
    """The test above can fail: averaging per-part means is not the token-weighted mean."""
    task = seeded(Tokens)
    whole = total(task(tokens()))
    means = torch.stack([total(task(piece)) for piece in split(tokens(), 5)])
    assert abs(whole - means.mean()) > 1e-3


def test_metrics_of_parts_are_those_of_the_whole_batch():
    for kind in (Tokens, TwoCounts):
        task = seeded(kind)
        whole, _ = sgd(task).differentiate(tokens())
        parts, _ = sgd(task, parts=5).differentiate(tokens())
        for name in whole:
            assert whole[name].sum == pytest.approx(parts[name].sum.item(), rel=1e-12)
            assert whole[name].count == parts[name].count


def test_part_weights_scale_sums_and_not_counts():
    task = seeded(Tokens)
    _, once = sgd(task).differentiate(tokens())
    repeated = sgd(task, parts=lambda batch: [(batch, 0.5), (batch, 2.0)])
    _, mixed = repeated.differentiate(tokens())
    for name in once:
        assert largest(mixed[name], once[name] * 1.25) < 1e-12


def test_only_the_chosen_parameters_are_differentiated_and_no_gradient_is_left():
    task = seeded(Tokens)
    first, last = task.net[0], task.net[3]
    update = GradientUpdate(task, SGD(task.net.parameters(), lr=0.1), params=last.parameters())
    before = copy.deepcopy(task.state_dict())
    update.apply(tokens())
    assert all(p.grad is None for p in task.parameters())
    assert torch.equal(first.weight, before["net.0.weight"])
    assert not torch.equal(last.weight, before["net.3.weight"])


def test_frozen_parameters_never_get_a_gradient():
    task = seeded(Tokens)
    seen = []
    update = GradientUpdate(
        task,
        SGD(task.parameters(), lr=0.1),
        observers=[lambda batch, losses, gradients: seen.append(set(gradients))],
    )
    update.apply(tokens())
    assert seen == [{n for n, p in task.named_parameters() if p.requires_grad}]
    assert task.frozen.weight.grad is None


def test_observers_see_complete_gradients_before_clipping():
    task = seeded(Tokens)
    seen = {}

    def observe(batch, losses, gradients):
        seen.update({name: gradient.clone() for name, gradient in gradients.items()})
        seen["count"] = losses["cross_entropy"].count

    update = sgd(task, parts=3, clip=1e-3, observers=[observe])
    params = dict(task.net.named_parameters(prefix="net"))
    expected = torch.autograd.grad(total(task(tokens())), list(params.values()))
    metrics = update.apply(tokens())
    for name, gradient in zip(params, expected, strict=True):
        assert largest(seen[name], gradient) < 1e-12
    assert seen["count"] == (tokens()["labels"] != -100).sum()
    norm = torch.stack([g.square().sum() for g in expected]).sum().sqrt()
    assert metrics["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-12)


def test_a_parameter_that_no_part_uses_is_left_alone():
    class TwoPaths(Task):
        def __init__(self):
            super().__init__()
            self.paths = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(3))

        def forward(self, batch):
            inputs, path = batch
            return {"loss": Term(self.paths[path](inputs).square().sum(), len(inputs))}

    task = TwoPaths()
    before = copy.deepcopy(task.state_dict())
    optimizer = SGD(task.parameters(), lr=0.1, weight_decay=0.1)
    both = lambda inputs: [((inputs, path), 1.0) for path in (0, 2)]  # noqa: E731
    GradientUpdate(task, optimizer, parts=both).apply(torch.ones(4, 2))
    changed = [not torch.equal(task.state_dict()[name], before[name]) for name in before]
    assert changed == [True, True, False, False, True, True]


def test_a_batch_without_a_single_label_changes_nothing():
    task = seeded(Tokens)
    batch = tokens()
    batch["labels"][:] = -100
    before = copy.deepcopy(task.state_dict())
    metrics = GradientUpdate(task, SGD(task.net.parameters(), lr=1.0)).apply(batch)
    assert metrics["loss"] == 0
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_forces_train_through_double_backward_in_parts():
    class Potential(Task):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(3, 8, dtype=torch.float64),
                torch.nn.Tanh(),
                torch.nn.Linear(8, 1, dtype=torch.float64),
            )

        def forward(self, batch):
            places = batch["places"].requires_grad_()
            energy = self.net(places).sum((1, 2))
            forces = -torch.autograd.grad(energy.sum(), places, create_graph=True)[0]
            return {
                "energy": Term((energy - batch["energy"]).square().sum(), len(energy)),
                "forces": Term((forces - batch["forces"]).square().sum(), forces.numel(), 10.0),
            }

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    batch = {"places": draw(5, 4, 3), "energy": draw(5), "forces": draw(5, 4, 3)}
    torch.manual_seed(0)
    task = Potential()
    params = dict(task.named_parameters())
    expected = torch.autograd.grad(
        total(task({key: value.clone() for key, value in batch.items()})),
        list(params.values()),
        allow_unused=True,
    )
    _, found = GradientUpdate(task, SGD(task.parameters(), lr=0.1), parts=2).differentiate(batch)
    for name, gradient in zip(params, expected, strict=True):
        assert largest(found[name], 0 if gradient is None else gradient) < 1e-12


def test_the_average_is_the_recursion_and_can_be_put_in_place():
    task = seeded(Tokens)
    update = sgd(task, ema=0.6)
    average = task.net[0].weight.detach().clone()
    for n in range(1, 8):
        update.apply(tokens(seed=n))
        decay = min(0.6, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * task.net[0].weight.detach()
    live = task.net[0].weight.detach().clone()
    with update.averaged():
        # The decay is computed in single precision on the device.
        assert largest(task.net[0].weight, average) < 1e-6
        assert largest(task.net[0].weight, live) > 1e-4
    assert torch.equal(task.net[0].weight, live)
    update.keep_average()
    assert largest(task.net[0].weight, average) < 1e-6


def test_sequence_changes_each_updates_own_parameters():
    task = seeded(Tokens)
    outer = GradientUpdate(task, SGD(task.net[0].parameters(), lr=0.1))
    inner = GradientUpdate(task, AdamW(task.net[3].parameters(), lr=0.1))
    both = Sequence(architecture=outer, weights=inner)
    plain = copy.deepcopy(task)
    metrics = both.apply(both.prepare((tokens(seed=1), tokens(seed=2)), 0))
    assert {"architecture.loss", "weights.loss"} <= set(metrics)
    GradientUpdate(plain, SGD(plain.net[0].parameters(), lr=0.1)).apply(tokens(seed=1))
    GradientUpdate(plain, AdamW(plain.net[3].parameters(), lr=0.1)).apply(tokens(seed=2))
    for name, value in plain.state_dict().items():
        assert torch.equal(task.state_dict()[name], value)


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"accumulate": 3}])
def test_state_restores_every_bit(options):
    config = LoopConfig(steps=20, learning_rate=0.01, **options)
    task = seeded(TwoCounts)
    update = GradientUpdate.from_config(task, config)
    trained(task, update, 4)
    state = update.state()
    kept = {name: tensor.clone() for name, tensor in state.tensors.items()}
    assert not any(name.startswith("weights/frozen") for name in kept)
    other = seeded(TwoCounts)
    again = GradientUpdate.from_config(other, config)
    again.load(type(state)(kept, copy.deepcopy(state.values)))
    for step in range(4, 8):
        for one in (update, again):
            one.apply(one.prepare(tokens(seed=step), step))
    for name, value in task.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    with update.averaged(), again.averaged():
        assert torch.equal(task.net[0].weight, other.net[0].weight)


def test_weight_decay_is_for_matrices_only():
    task = seeded(Tokens)
    groups = GradientUpdate.from_config(task, LoopConfig(weight_decay=0.3)).optimizer.param_groups
    decays = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {2: 0.3, 1: 0.0}


def test_parameters_of_another_module_are_refused():
    with pytest.raises(UserError, match="does not contain"):
        GradientUpdate(Tokens(), SGD(Tokens().parameters(), lr=0.1))
    with pytest.raises(UserError, match="Nothing to train"):
        GradientUpdate.from_config(Tokens().requires_grad_(False), LoopConfig())
