import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightshare.errors import UserError
from weightshare.sharing import (
    Gram,
    Stable,
    by_rows,
    by_tensor,
    opposed,
    per_use,
    task_gradients,
    user_gradients,
)
from weightshare.sharing.ghost import Factors
from weightshare.sharing.products import inner_products


def observed(gram, rows):
    """``rows[b][user]`` of one tensor called w."""
    for batch in rows:
        gram.update({"w": {i: g for i, g in enumerate(batch) if g is not None}})
    return gram


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Edge(nn.Module):
    """A shared linear map followed by one of several operations."""

    def __init__(self, operations):
        super().__init__()
        self.shared = nn.Linear(4, 3, bias=False)
        self.operations = operations

    def losses(self, x, target=None):
        def loss(operation):
            out = operation(self.shared(x))
            return out.sum() if target is None else (out - target).square().sum()

        return {i: (lambda op=op: loss(op)) for i, op in enumerate(self.operations)}


def gram_of(model, batches, parameters=("shared.weight",), **kwargs):
    gram = Gram(range(len(model.operations)))
    named = dict(model.named_parameters())
    for x in batches:
        losses = model.losses(x)
        for part in user_gradients(losses, {n: named[n] for n in parameters}, **kwargs):
            gram.update(part)
    return gram


def test_identical_opposite_and_disjoint_users():
    def first(z):
        return z[:, :1]

    def second(z):
        return z[:, 1:2]

    model = Edge([lambda z: z, lambda z: z, lambda z: -z, first, second])
    cosine = gram_of(model, [torch.randn(5, 4)]).cosine()
    assert abs(cosine[0, 1] - 1) < 1e-6
    assert abs(cosine[0, 2] + 1) < 1e-6
    assert abs(cosine[3, 4]) < 1e-12


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_scale_changes_nothing(scale):
    rows = vectors(3, 4, 50).float()
    plain = observed(Gram(range(4)), rows)
    scaled = observed(Gram(range(4)), rows * scale)
    assert torch.allclose(plain.cosine(), scaled.cosine(), atol=1e-5)
    assert torch.allclose(plain.debiased(), scaled.debiased(), atol=1e-5, equal_nan=True)


def test_float32_gradients_whose_squares_underflow_have_their_cosine():
    g = torch.full((100,), 1e-23)
    assert torch.allclose(observed(Gram(range(2)), [[g, g]]).cosine(), torch.ones(2, 2).double())


@given(k=st.integers(2, 6), n=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_papers_matrix_is_a_cosine_matrix(k, n, seed):
    gram = observed(Gram(range(k)), vectors(n, k, 8, seed=seed))
    cosine = gram.cosine()
    assert torch.equal(cosine, cosine.T)
    assert torch.allclose(cosine.diagonal(), torch.ones(k).double())
    assert cosine.abs().max() <= 1
    assert torch.linalg.eigvalsh(gram.products("paper")).min() > -1e-9


def test_the_estimates_are_their_formulas():
    rows = vectors(5, 3, 20)
    gram = observed(Gram(range(3)), rows)
    mean = torch.stack([torch.corrcoef(torch.eye(3))] * 0 + [_cosines(g) for g in rows]).mean(0)
    assert torch.allclose(gram.cosine(), mean)
    s = rows.sum(0)
    cross = (s @ s.T - sum(g @ g.T for g in rows)) / (5 * 4)
    assert torch.allclose(gram.products(), cross)
    assert torch.allclose(gram.norms("paper"), rows.square().sum(-1).mean(0).sqrt())
    rate = torch.stack([(_cosines(g) < 0).double() for g in rows]).mean(0)
    assert torch.equal(gram.conflict_rate(), rate)
    assert opposed(gram.cosine()) is not None


def _cosines(g):
    return torch.nn.functional.cosine_similarity(g[:, None], g[None], -1)


def test_debiasing_inside_contexts_keeps_conflict_that_changes_sign():
    # Users 0 and 1 always oppose each other, but in a direction that flips with the context.
    signal = vectors(40, 200)
    gram = Gram(range(2))
    for context, direction in enumerate(signal):
        for batch in range(2):
            noise = vectors(2, 200, seed=1000 + 2 * context + batch)
            gram.update({"w": {0: direction + noise[0], 1: -direction + noise[1]}})
        gram.close()
    assert gram.units == 40
    assert gram.debiased()[0, 1] < -0.9
    low, high = gram.interval()
    assert low[0, 1] < gram.debiased()[0, 1] < high[0, 1] < -0.8


def test_common_noise_lifts_the_papers_mean_and_not_the_debiased_one():
    generator = torch.Generator().manual_seed(0)
    signal = torch.linalg.qr(torch.randn(400, 2, generator=generator, dtype=torch.float64))[0].T
    common = torch.randn(30, 1, 400, generator=generator, dtype=torch.float64)
    gram = observed(Gram(range(2)), 5 * signal + common)  # orthogonal users
    assert gram.cosine()[0, 1] > 0.8
    low, high = gram.interval()
    assert low[0, 1] < 0 < high[0, 1]
    assert abs(gram.debiased()[0, 1]) < 0.3


def test_permuting_users_and_tensors_permutes_the_matrix_only():
    a, b = 3 + vectors(3, 4, 6), vectors(3, 4, 9, seed=1)
    gram, other = Gram("pqrs"), Gram("rspq")
    for x, y in zip(a, b, strict=True):
        gram.update(
            {"a": dict(zip("pqrs", x, strict=True)), "b": dict(zip("pqrs", y, strict=True))}
        )
        other.update(
            {"b": dict(zip("pqrs", y, strict=True)), "a": dict(zip("pqrs", x, strict=True))}
        )
    order = [2, 3, 0, 1]
    assert torch.allclose(gram.cosine()[order][:, order], other.cosine())
    assert torch.allclose(gram.debiased()[order][:, order], other.debiased())


def test_a_user_without_gradient_is_masked_not_a_number():
    rows = [[g[0], torch.zeros(6), None, g[1]] for g in 3 + vectors(4, 2, 6)]
    gram = observed(Gram(range(4)), rows)
    for matrix in (gram.cosine(), gram.debiased(), gram.conflict_rate()):
        assert matrix[1].isnan().all() and matrix[2].isnan().all()
        assert not matrix[0, 3].isnan()
    assert gram.norms().isnan().tolist() == [False, True, True, False]


def test_the_total_is_over_tensors_that_all_users_use():
    # Pairwise intersections of used tensors give an indefinite matrix: eigenvalues -1, 2, 2.
    one = torch.ones(1)
    rows = {
        "s": {0: one, 1: one},
        "t": {1: one, 2: one},
        "u": {0: one, 2: -one},
    }
    gram = Gram(range(3)).update(rows)
    assert torch.linalg.eigvalsh(gram.cosine(pairwise=True)).min() < -0.9
    assert gram.cosine().isnan().all()  # no tensor is common to all three
    gram.update(rows | {"v": {0: one, 1: one, 2: one}})
    assert torch.allclose(gram.cosine(), torch.ones(3, 3).double())


def test_parameters_one_user_does_not_touch_do_not_enter():
    gradients = {"w": {0: vectors(5), 1: vectors(5, seed=1)}, "v": {0: vectors(5, seed=2)}}
    small = Gram(range(2)).update(gradients).cosine()
    gradients["v"][0] = gradients["v"][0] * 1e30
    assert torch.equal(small, Gram(range(2)).update(gradients).cosine())


def test_a_tensor_met_late_counts_as_unused_before():
    g = vectors(4, 2, 6)
    late, early = Gram(range(2)), Gram(range(2))
    for n, (x, y) in enumerate(g):
        late.update({"w": {0: x, 1: y}} | ({"v": {0: x, 1: y}} if n > 2 else {}))
        early.update({"w": {0: x, 1: y}, "v": {0: x, 1: y} if n > 2 else {}})
        if n == 1:
            late.close(), early.close()
    assert torch.equal(late.cosine(), early.cosine())
    assert torch.equal(late.select(["v"]).cosine(), early.select(["v"]).cosine())


def test_reading_between_batches_changes_nothing():
    rows = vectors(5, 3, 20)
    whole, watched = Gram(range(3)), Gram(range(3))
    for number, batch in enumerate(rows):
        found = {"w": {i: g for i, g in enumerate(batch) if (number, i) != (2, 1)}}
        found |= {"late": {0: batch[0], 2: batch[2]}} if number > 2 else {}
        whole.update(found)
        watched.update(found)
        if number in (1, 2, 3):
            watched.cosine()
    for name in ("w", "late"):
        (one,), (other,) = (gram.close().blocks[name] for gram in (whole, watched))
        assert torch.allclose(one.products, other.products, atol=1e-12)
        assert torch.equal(one.used, other.used)


def test_users_one_at_a_time_equal_autograd_on_each_in_double_precision():
    torch.manual_seed(0)
    model = Edge([lambda z: z.relu(), lambda z: z * 2, lambda z: z.tanh()]).double()
    x = vectors(6, 4)
    weight = model.shared.weight
    rows = [torch.autograd.grad(f(), weight)[0].flatten() for f in model.losses(x).values()]
    exact = torch.stack(rows) @ torch.stack(rows).T
    for together in (2**26, 1):  # all tensors at once, and one tensor group after the other
        gram = gram_of(model, [x], together=together)
        assert torch.allclose(gram.products("paper"), exact, atol=1e-10)


def test_users_with_graphs_of_their_own_are_streamed_a_group_of_tensors_at_a_time():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    named = dict(net.named_parameters())
    x = torch.randn(5, 4)
    losses = {user: (lambda s=user: (net(x) * s).square().sum()) for user in (1, 2, 3)}
    seen, alive = [], []
    for part in user_gradients(losses, named, together=3 * 20):
        assert sum(g.numel() for users in part.values() for g in users.values()) <= 3 * 20
        assert all(old() is None for old in alive)  # of the group before, nothing is left
        seen += part
        alive = [weakref.ref(g) for users in part.values() for g in users.values()]
        del part
    assert seen == list(named)


def test_the_gradient_is_right_by_finite_differences():
    theta = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
    losses = {
        "a": lambda: (theta[0] * theta[1]).sin(),
        "b": lambda: theta[0] ** 2 - theta[1],
    }
    (found,) = user_gradients(losses, {"w": theta})
    for user, loss in losses.items():
        for i in range(2):
            step = torch.zeros(2, dtype=torch.float64)
            step[i] = 1e-6
            with torch.no_grad():
                theta += step
                up = loss()
                theta -= 2 * step
                down = loss()
                theta += step
            assert abs(float(found["w"][user][i]) - float(up - down) / 2e-6) < 1e-8


def test_users_share_their_random_draws():
    dropout = nn.Dropout(0.5)
    model = Edge([dropout, dropout])
    assert torch.allclose(
        gram_of(model, [torch.randn(5, 4)]).cosine(), torch.ones(2, 2).double(), atol=1e-6
    )


def test_the_jackknife_interval_covers_the_truth():
    truth = torch.nn.functional.cosine_similarity(*_pair(0.4), 0)
    covered = 0
    for trial in range(60):
        noise = torch.randn(
            12, 2, 30, generator=torch.Generator().manual_seed(trial), dtype=torch.float64
        )
        low, high = observed(Gram(range(2)), torch.stack(_pair(0.4)) + 0.2 * noise).interval(0.9)
        covered += bool(low[0, 1] <= truth <= high[0, 1])
    assert 48 <= covered <= 60


def _pair(cosine):
    e = torch.eye(30, dtype=torch.float64)
    return e[0], cosine * e[0] + (1 - cosine**2) ** 0.5 * e[1]


def test_without_a_batch_nothing_is_defined():
    gram = Gram("ab")
    for matrix in (gram.cosine(), gram.cosine(pairwise=True), gram.conflict_rate()):
        assert matrix.shape == (2, 2) and matrix.isnan().all()


def test_one_batch_has_no_debiased_estimate_and_no_interval():
    gram = observed(Gram(range(2)), vectors(1, 2, 5))
    with pytest.raises(UserError, match="at least two batches"):
        gram.debiased()
    with pytest.raises(UserError, match="at least two"):
        gram.interval(estimate="paper")


def test_stable_needs_the_same_decision_in_a_row():
    stable = Stable(3)
    assert [stable.update(d) for d in "aabbbb"] == [False, False, False, False, True, True]


def test_tasks_on_one_trunk_are_told_apart():
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 3).double(), [nn.Linear(3, 1).double() for _ in range(3)]
    hidden = trunk(vectors(6, 4)).tanh()
    losses = {f"task {i}": head(hidden).square().sum() for i, head in enumerate(heads)}
    named = {f"trunk.{n}": p for n, p in trunk.named_parameters()}
    alone = {
        task: torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        for task, loss in losses.items()
    }
    found = task_gradients(losses, named | {"head": heads[1].weight})
    for number, name in enumerate(named):
        assert list(found[name]) == list(losses)
        for task, gradient in found[name].items():
            assert torch.equal(gradient, alone[task][number])
    assert list(found["head"]) == ["task 1"]


def test_owners_of_rows_are_told_apart_in_one_backward_pass():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    tied = nn.Sequential(net, nn.Linear(2, 4, bias=False), net).double()  # the net runs twice
    owners, x = ["a", "b", "a", "c"], vectors(4, 3, 4)  # three tokens a row
    named = dict(tied.named_parameters())

    def loss(user):
        rows = [i for i, owner in enumerate(owners) if owner == user]
        return tied(x[rows]).square().sum()

    (exact,) = user_gradients({u: (lambda u=u: loss(u)) for u in "abc"}, named)
    passes = []
    with per_use(tied, factors=True) as uses:
        total = tied(x).square().sum()
        total.register_hook(lambda _: passes.append(1))
        found = by_rows(uses.gradients(total), owners)
    assert len(passes) == 1 and set(found) == set(named)
    for name, users in found.items():
        for user, gradient in users.items():
            dense = gradient.dense() if isinstance(gradient, Factors) else gradient
            assert torch.allclose(dense, exact[name][user], atol=1e-12)
    ours, theirs = (Gram("abc").update(g).products("paper") for g in (found, exact))
    assert torch.allclose(ours, theirs, rtol=1e-10)
    with pytest.raises(UserError, match="no multiple"):
        by_rows({"w": {"use": Factors(torch.ones(5, 2), torch.ones(5, 3))}}, owners)


def test_the_updates_of_clients_are_users_too():
    steps = {"ann": {"w": torch.ones(3)}, "bob": {"w": -torch.ones(3), "b": torch.ones(1)}}
    gram = Gram(steps).update(by_tensor(steps))
    assert gram.select(["w"]).cosine()[0, 1] == -1
    assert gram.select(["b"]).cosine()[0, 1].isnan()


@pytest.mark.parametrize("size", [5, 20_000, 3 * 2**13 + 7])
@pytest.mark.parametrize("entries", [2**23, 2**14])
def test_products_of_any_size_are_those_of_all_rows(size, entries, monkeypatch):
    monkeypatch.setattr("weightshare.sharing.products.ENTRIES", entries)
    rows = {name: list(vectors(5, size, seed=seed)) for seed, name in enumerate("ab")}
    rows["c"] = [None, *vectors(4, size, seed=2)]
    found = inner_products(rows, 3)
    for name, each in rows.items():
        dense = torch.stack([torch.zeros(size).double() if row is None else row for row in each])
        assert torch.allclose(found[name], dense @ dense[-3:].T, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("entries", [2**23, 40])
@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (1, 5, 3, 2)])
def test_products_of_factors_are_those_of_the_gradients(lengths, entries, monkeypatch):
    monkeypatch.setattr("weightshare.sharing.products.ENTRIES", entries)
    rows = [Factors(vectors(n, 6, seed=n), vectors(n, 5, seed=n + 9)) for n in lengths]
    dense = torch.stack([factors.dense().flatten() for factors in rows])
    found = inner_products({"w": [rows[0], None, *rows[1:]]}, 2)["w"]
    assert torch.allclose(found[[0, 2, 3, 4]], dense @ dense[-2:].T, rtol=1e-12)
    assert not found[1].any()
