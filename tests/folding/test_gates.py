"""Gates: exact when open or hard, and able to see that two blocks can replace each other."""

import math

import pytest
import torch
from small_models import make, tokens

from weightshare.folding import FoldPlan, GateConfig, choose_by_gates, fold, gated, learn_gates
from weightshare.folding.coupling import best_subset
from weightshare.folding.gates import epsilon_at, gate, gate_slope


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_open_and_hard_open_gates_are_the_model_bit_for_bit(model, dtype, training):
    model.to(dtype).train(training)
    plain = logits(model, tokens())
    for gates, mode in (([1.0] * 6, "hard"), (None, "open"), (torch.ones(6), "soft")):
        with gated(model, gates, mode):
            assert torch.equal(logits(model, tokens()), plain)
    assert torch.equal(logits(model, tokens()), plain)


@pytest.mark.parametrize("removed", [(0,), (2, 3), (5,), (0, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hard_mask_is_the_model_without_those_blocks_bit_for_bit(model, removed, dtype):
    model.to(dtype)
    gates = [0.0 if block in removed else 1.0 for block in range(6)]
    with gated(model, gates, "hard"):
        masked = logits(model, tokens())
    shorter = fold(model, FoldPlan(6, removed=removed))
    assert torch.equal(masked, logits(shorter, tokens()))


def test_gates_are_taken_off_when_something_fails():
    model = make("llama")
    with pytest.raises(RuntimeError), gated(model, torch.zeros(6)):
        raise RuntimeError
    assert all(not block._forward_hooks for block in model.model.layers)


def test_the_slope_is_the_derivative_of_the_gate():
    theta = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    for epsilon in (0.1, 0.01, 1e-3):
        (slope,) = torch.autograd.grad(gate(theta, epsilon).sum(), theta)
        assert torch.allclose(slope, gate_slope(theta.detach(), epsilon), rtol=1e-12)
        steepest = math.sqrt(epsilon / 3)
        near = torch.tensor([steepest * 0.9, steepest, steepest * 1.1], dtype=torch.float64)
        assert gate_slope(near, epsilon).argmax() == 1


def test_epsilon_stays_for_half_the_steps_and_then_falls_geometrically():
    config = GateConfig(steps=101)
    assert epsilon_at(0, config) == epsilon_at(50, config) == 0.1
    assert epsilon_at(75, config) == pytest.approx(0.01)
    assert epsilon_at(100, config) == pytest.approx(1e-3)


def coupled(form, scale, seed):
    """Blocks 0 and 1 are each sufficient, 2 to 4 are needed, 5 is worth little."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64).square()

    def loss(g, step):
        if form == "product":
            pair = 1 - (1 - g[0]) * (1 - g[1])
        else:
            pair = torch.tanh(4 * (g[0] + g[1])) / math.tanh(4)
        needed = sum((1 - g[k]) ** 2 * x[:, k] for k in (2, 3, 4))
        return scale * ((pair - 1) ** 2 * x[:, 0] + needed + 0.01 * (1 - g[5]) ** 2).mean()

    return loss


def chosen_by_gates(form, scale, seed):
    order, _, runs = choose_by_gates(coupled(form, scale, seed), 6, 2, seed=3 * seed)
    assert len(runs) == 3
    return set(order[:2])


@pytest.mark.parametrize("form", ["product", "tanh"])
def test_gates_drop_one_of_a_redundant_pair_and_the_small_block(form):
    for seed, scale in enumerate((0.1, 1.0, 10.0)):
        assert chosen_by_gates(form, scale, seed) in ({0, 5}, {1, 5})


@pytest.mark.slow
@pytest.mark.parametrize("form", ["product", "tanh"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_gates_see_the_pair_on_nineteen_of_twenty_seeds(form, scale):
    right = sum(chosen_by_gates(form, scale, seed) in ({0, 5}, {1, 5}) for seed in range(20))
    assert right >= 19


def three_alike(x):
    """Any one of blocks 0 to 2 is sufficient, 6 is worth little; three should go."""

    def loss(g, step):
        some = 1 - (1 - g[0]) * (1 - g[1]) * (1 - g[2])
        needed = sum((1 - g[k]) ** 2 * x[:, k] for k in (3, 4, 5))
        return ((some - 1) ** 2 * x[:, 0] + needed + 0.01 * (1 - g[6]) ** 2).mean()

    return loss


def two_pairs(x):
    """0 or 1 and 2 or 3 are sufficient, behind a saturation; 6 is worth little."""

    def loss(g, step):
        one, two = torch.tanh(4 * (g[0] + g[1])), torch.tanh(4 * (g[2] + g[3]))
        needed = sum((1 - g[k]) ** 2 * x[:, k] for k in (4, 5))
        pairs = (one - 1) ** 2 * x[:, 0] + (two - 1) ** 2 * x[:, 1]
        return (pairs + needed + 0.01 * (1 - g[6]) ** 2).mean()

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_gates_see_other_kinds_of_redundancy(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 7, generator=generator, dtype=torch.float64).square()
    gone = set(choose_by_gates(three_alike(x), 7, 3, seed=3 * seed)[0][:3])
    assert 6 in gone and len(gone & {0, 1, 2}) == 2
    gone = set(choose_by_gates(two_pairs(x), 7, 3, seed=3 * seed)[0][:3])
    assert 6 in gone and len(gone & {0, 1}) == len(gone & {2, 3}) == 1


def test_scores_of_single_blocks_drop_both_of_the_pair_and_greed_does_not():
    loss = coupled("product", 1.0, 0)

    def without(*removed):
        gates = torch.ones(6, dtype=torch.float64)
        gates[list(removed)] = 0
        return float(loss(gates, 0))

    alone = sorted(range(6), key=without)[:2]
    assert set(alone) == {0, 1}
    first = min(range(6), key=without)
    second = min(set(range(6)) - {first}, key=lambda block: without(first, block))
    assert {first, second} in ({0, 5}, {1, 5})


def test_the_local_quadratic_does_not_see_a_saturating_pair():
    """Why coupling should be followed by swaps."""
    gates = torch.ones(6, dtype=torch.float64, requires_grad=True)

    def removed(form):
        loss = coupled(form, 1.0, 0)
        slope = torch.autograd.functional.jacobian(lambda g: loss(g, 0), gates)
        hessian = torch.autograd.functional.hessian(lambda g: loss(g, 0), gates)
        return set(best_subset(slope, hessian, 2)[0])

    assert removed("tanh") == {0, 1}


def test_gate_training_touches_nothing_but_the_gates():
    model = make("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    from weightshare.folding import rank

    found = rank(model, tokens(), "gates", remove=2, gates=GateConfig(steps=10, seeds=1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    history = found.metadata["runs"][0]["history"]
    assert len(history) == 10 and len(history[0]) == 6


def test_the_order_of_sequences_in_a_batch_changes_no_ranking():
    model, ids = make("llama"), tokens(4)
    from weightshare.folding import rank

    quick = GateConfig(steps=20, seeds=1, sequences=4)
    one = rank(model, ids, "gates", remove=2, gates=quick)
    two = rank(model, ids.flip(0), "gates", remove=2, gates=quick)
    assert one.order == two.order


def test_a_run_interrupted_between_memos_goes_on_with_the_same_numbers():
    kept: dict[str, object] = {}

    def remember(key, compute):
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    loss = coupled("product", 1.0, 0)
    whole = learn_gates(loss, 6, 2, GateConfig(steps=60))
    learn_gates(loss, 6, 2, GateConfig(steps=60), memo=remember)
    later = list(kept)[1:]
    for key in later:
        del kept[key]
    assert learn_gates(loss, 6, 2, GateConfig(steps=60), memo=remember) == whole
