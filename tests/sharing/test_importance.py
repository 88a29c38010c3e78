"""Exact checks on a small softmax supernet whose 64 x 256 gradients are all enumerated."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightshare.errors import UserError
from weightshare.sharing import Importance, joint, linear_mix, mix_for_ess
from weightshare.sharing.importance import _joint_moment, marginal, second_moment

FOUR = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def gradients():
    """``(64 paths, samples, weights)``: 3 blocks of 4 linear operations, scales .1, 1, 3, 10."""
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 3.0, 10.0], dtype=torch.float64)
    weights = 0.2 * torch.randn(3, 4, 4, 3, generator=g, dtype=torch.float64)
    weights.requires_grad_()
    x = torch.randn(256, 4, generator=g, dtype=torch.float64)
    y = torch.randint(3, (256,), generator=g)
    rows = []
    for path in itertools.product(range(4), repeat=3):
        logits = sum(scales[o] * x @ weights[e, o] for e, o in enumerate(path))
        # The gradient of sample i w.r.t. W_eo is scale_o x_i (softmax - onehot)ᵀ.
        error = (logits.softmax(-1) - torch.nn.functional.one_hot(y, 3)).detach()
        full = torch.zeros(256, 3, 4, 4, 3, dtype=torch.float64)
        for e, o in enumerate(path):
            full[:, e, o] = scales[o] * x[:, :, None] * error[:, None]
        if not rows:
            loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
            (exact,) = torch.autograd.grad(loss, weights)
            assert torch.allclose(full.sum(0), exact, atol=1e-10)
        rows.append(full.flatten(1))
    return torch.stack(rows)


scores = st.lists(st.floats(0, 1e6), min_size=1, max_size=12).map(
    lambda s: torch.tensor(s, dtype=torch.float64)
)


def test_1_without_mixing_p_is_uniform_and_draws_are_the_plain_samplers():
    plain = Importance(torch.ones(7), mix=0.0)
    skewed = Importance(torch.arange(1.0, 8.0), mix=0.0)
    assert torch.allclose(skewed.probabilities, torch.full((7,), 1 / 7).double(), atol=1e-12)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(plain.draw(1000, seeds[0]), skewed.draw(1000, seeds[1]))


@given(scores, st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_2_p_is_a_distribution_above_its_floor(s, mix, floor_share):
    floor = floor_share / len(s)
    p = Importance(s, mix=mix, floor=floor).probabilities
    assert abs(float(p.sum()) - 1) < 1e-12
    assert float(p.min()) >= floor - 1e-15 and bool(torch.isfinite(p).all())


@pytest.mark.parametrize(
    "s", [[0.0, 0.0, 0.0], [1.0, math.nan, 2.0], [1.0, math.inf, 0.0], [1e300, 1e300, 0.0]]
)
def test_2_scores_that_say_nothing_fall_back_to_the_base(s):
    p = Importance(torch.tensor(s, dtype=torch.float64), mix=1.0).probabilities
    assert abs(float(p.sum()) - 1) < 1e-12
    if s[0] < 1e300:
        assert torch.allclose(p, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_2_one_hot_scores_keep_the_floor():
    p = Importance(torch.tensor([0.0, 3.0, 0.0]), mix=1.0, floor=0.1).probabilities
    assert torch.allclose(p, torch.tensor([0.1, 0.8, 0.1], dtype=torch.float64))


def test_3_at_full_mix_p_is_the_normalised_scores_at_any_scale():
    s = torch.tensor([1.0, 2.0, 5.0])
    p = Importance(s, mix=1.0).probabilities
    assert torch.allclose(p, s.double() / 8)
    assert torch.allclose(Importance(s * 1e30, mix=1.0).probabilities, p)


def test_4_weighted_draws_are_unbiased_by_enumeration(gradients):
    generator = torch.Generator().manual_seed(1)
    paths, samples, _ = gradients.shape
    p = Importance(torch.rand(paths, generator=generator), mix=0.7)
    q = Importance(torch.rand(samples, generator=generator), mix=0.9)
    factor = (p.probabilities * p.weights)[:, None] * (q.probabilities * q.weights)
    estimate = (factor[..., None] * gradients).sum((0, 1))
    assert torch.allclose(estimate, gradients.mean((0, 1)), atol=1e-10)


def test_4_a_base_measure_is_the_objective():
    base = torch.tensor([1.0, 2.0, 3.0])
    g = torch.tensor([4.0, -1.0, 2.0], dtype=torch.float64)
    drawn = Importance(g.abs(), base, mix=0.8)
    estimate = (drawn.probabilities * drawn.weights * g).sum()
    assert float(estimate) == pytest.approx(float((base / 6 * g).sum()))
    best = Importance(g.abs(), base, mix=1.0)
    assert second_moment(g.abs(), best.probabilities, base) <= second_moment(
        g.abs(), drawn.probabilities, base
    )


def test_5_the_gain_in_variance_is_the_variance_of_the_norms(gradients):
    norms = gradients[37].norm(dim=1)
    best = Importance(norms, mix=1.0)
    uniform = Importance(norms, mix=0.0)
    gap = second_moment(norms, uniform.probabilities) - second_moment(norms, best.probabilities)
    assert gap == pytest.approx(float(norms.var(correction=0)), abs=1e-10)
    ratio = second_moment(norms, uniform.probabilities) / second_moment(norms, best.probabilities)
    assert best.gain == pytest.approx(ratio)


def test_5_measured_variance_follows_the_formula_and_falls_with_the_batch():
    drawn = Importance(FOUR, mix=0.5)
    value = FOUR * drawn.weights
    variance = second_moment(FOUR, drawn.probabilities) - 4
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 8):
        x = value[drawn.draw(20_000 * batch, generator)].view(-1, batch).mean(1)
        error = (x - 2).square().std() / math.sqrt(len(x))
        assert abs(float((x - 2).square().mean()) - variance / batch) < 4 * float(error)


def test_6_the_worked_example():
    found = [
        second_moment(FOUR, Importance(FOUR, mix=d).probabilities) - 4
        for d in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert found == pytest.approx([3, 1.402597, 0.571429, 0.141176, 0], abs=1e-6)


@given(scores.filter(lambda s: float(s.min()) > 1e-3), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_7_mixtures_are_bounded_by_their_ends_and_by_uniform(s, mix):
    def moment(d):
        return second_moment(s, Importance(s, mix=d).probabilities)

    bound = mix * moment(1.0) + (1 - mix) * moment(0.0)
    assert moment(mix) <= bound * (1 + 1e-12)
    if mix > 0.01 and float(s.max()) > 1.01 * float(s.min()):
        assert moment(mix) < moment(0.0)


def test_7_bad_scores_cost_at_most_the_bound():
    norms = torch.tensor([5.0, 1.0, 1.0], dtype=torch.float64)
    wrong = Importance(torch.tensor([0.0, 0.0, 1.0]), mix=0.9)
    uniform = second_moment(norms, torch.full((3,), 1 / 3))
    assert second_moment(norms, wrong.probabilities) <= uniform / (1 - 0.9) * (1 + 1e-9)


def test_8_unweighted_draws_estimate_another_mean():
    full = Importance(FOUR, mix=1.0).probabilities
    half = Importance(FOUR, mix=0.5).probabilities
    assert float((full * FOUR).sum()) == pytest.approx(3.5)
    assert float((half * FOUR).sum()) == pytest.approx(2.75)


def test_9_joint_optimum_beats_marginals_and_equals_them_on_rank_one():
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(6, 8, generator=generator, dtype=torch.float64).exp()
        full = float(a.mean()) ** 2
        best = joint(a)
        p, q = marginal(a)
        assert full <= best.second_moment + 1e-12
        assert best.second_moment <= _joint_moment(a.square(), p, q) + 1e-12
        assert best.p.sum() == pytest.approx(1) and best.q.sum() == pytest.approx(1)
        rank_one = a[:, :1] * a[:1]
        p, q = marginal(rank_one)
        expected = float(rank_one.mean()) ** 2
        assert joint(rank_one).second_moment == pytest.approx(expected, rel=1e-8)
        assert _joint_moment(rank_one.square(), p, q) == pytest.approx(expected, rel=1e-8)


def test_9_paths_and_samples_without_gradient_are_never_drawn():
    a = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
    some, best = joint(a[[0, 2]][:, 1:]), joint(a)
    assert best.p.tolist() == pytest.approx([float(some.p[0]), 0.0, float(some.p[1])])
    assert best.q.tolist() == pytest.approx([0.0, *some.q.tolist()])
    assert best.second_moment == pytest.approx(some.second_moment * (4 / 9) ** 2)
    nothing = joint(torch.zeros(2, 3))
    assert nothing.p.tolist() == [0.5, 0.5] and nothing.second_moment == 0
    for bad in (torch.ones(3), -torch.ones(2, 2), torch.full((2, 2), math.nan)):
        with pytest.raises(UserError, match="matrix"):
            joint(bad)


def test_13_weights_have_mean_one_over_draws():
    drawn = Importance(torch.tensor([0.1, 1.0, 4.0, 9.0]), mix=0.8)
    w = drawn.weights[drawn.draw(20_000, torch.Generator().manual_seed(0))]
    assert abs(float(w.mean()) - 1) < 4 * float(w.std()) / math.sqrt(len(w))
    floor = Importance(torch.tensor([0.0, 0.0, 1.0]), mix=1.0, floor=0.05)
    assert float(floor.weights.max()) <= 1 / (3 * 0.05) + 1e-9  # never above 1 / (n · floor)


def test_effective_sample_size_is_what_squared_weights_say():
    # p = δ(0,0,.4,.6,0) + (1-δ)/5 over six blocks: ESS = (1/E w²)⁶
    s = torch.tensor([0.0, 0.0, 0.4, 0.6, 0.0])
    for mix, second in ((0.1, 1.09), (0.25, 1.71), (0.5, 8.7), (0.75, 305)):
        assert Importance(s, mix=mix).ess ** -6 == pytest.approx(second, rel=0.01)


def test_the_mix_that_keeps_an_effective_sample_size():
    s = torch.tensor([0.0, 0.0, 0.4, 0.6, 0.0])
    mix = mix_for_ess(s, 0.5)
    assert Importance(s, mix=mix).ess == pytest.approx(0.5, abs=1e-6)
    assert mix_for_ess(torch.ones(4)) == 1.0


def test_flat_norms_do_not_pay_and_the_schedule_is_linear():
    assert not Importance(torch.tensor([1.0, 1.1, 0.9])).pays()
    assert Importance(FOUR).pays()
    assert [linear_mix(t) for t in (0, 0.5, 1, 2)] == pytest.approx([0, 0.45, 0.9, 0.9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": torch.tensor([-1.0, 2.0])}, "negative"),
        ({"scores": torch.ones(2, 2)}, "shape"),
        ({"scores": torch.tensor(1.0)}, "shape"),
        ({"scores": torch.ones(2), "base": torch.tensor([1.0, math.inf])}, "finite"),
        ({"scores": torch.ones(2), "mix": 1.5}, "mix is 1.5"),
        ({"scores": torch.ones(4), "floor": 0.5}, "at most 0.25"),
        ({"scores": torch.ones(2), "base": torch.zeros(2)}, "base"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Importance(**arguments)
