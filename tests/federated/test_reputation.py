"""The arithmetic of reputation against closed forms, brute force and symmetry."""

import json
from dataclasses import replace
from math import ceil, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightshare.errors import UserError
from weightshare.federated import ReputationConfig, Standing, assess
from weightshare.federated.copies import copies_among
from weightshare.federated.reputation import smooth, trajectory
from weightshare.federated.standing import admit, missed
from weightshare.federated.vectors import BLOCK, combined, products, squared_norm, weighted_sum


def vectors(count, size=300, seed=0, agreement=0.7):
    draw = np.random.default_rng(seed)
    common = draw.standard_normal(size)
    return {
        f"p{i}": (agreement * common + draw.standard_normal(size)).astype(np.float32)
        for i in range(count)
    }


def run(updates, config, rounds=1, **options):
    standing = Standing.begin(updates, config, options.get("sizes"))
    judged = None
    for _ in range(rounds):
        standing, judged = assess(standing, updates, config, **options)
    return standing, judged


CONFIGS = [
    ReputationConfig(),
    ReputationConfig(normalisation="exact", leave_one_out=True),
    ReputationConfig(start="uniform", smooth_shares=True),
    ReputationConfig.cgsv(),
    replace(ReputationConfig.robust(), first_weights="uniform"),
]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(CONFIGS), st.integers(1, 7), st.integers(0, 9), st.integers(1, 14))
def test_reputations_are_shares_of_one_and_none_outside_the_live(config, count, seed, rounds):
    standing = Standing.begin([f"p{i}" for i in range(count)], config)
    for number in range(rounds):
        standing, judged = assess(
            standing, vectors(count, seed=seed + number, agreement=0.2), config
        )
        total = sum(standing.reputation.values())
        assert abs(total - 1) < 1e-9 or (judged.flag and total == 0 and not standing.expelled)
        assert all(value >= 0 for value in standing.reputation.values())
        assert abs(sum(judged.weights.values()) - 1) < 1e-9
        assert not standing.reputation.keys() & standing.expelled.keys()
        assert judged.quotas.keys() <= standing.reputation.keys()
        assert judged.flag or max(judged.quotas.values()) == 1


def test_equal_updates_get_equal_and_whole_rewards():
    row = vectors(1)["p0"]
    updates = {f"p{i}": row.copy() for i in range(5)}
    standing, judged = run(updates, ReputationConfig(), rounds=13)
    assert judged.cosines == pytest.approx(dict.fromkeys(updates, 1.0), abs=1e-6)
    assert len({round(r, 12) for r in standing.reputation.values()}) == 1
    assert judged.quotas == pytest.approx(dict.fromkeys(updates, 1.0), abs=1e-12)
    assert not standing.expelled
    scaled = row * (0.5 / np.linalg.norm(row))
    np.testing.assert_allclose(judged.aggregate, scaled, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.sampled_from(CONFIGS))
def test_arrival_order_changes_no_bit(order, config):
    updates = vectors(6)
    shuffled = {f"p{i}": updates[f"p{i}"] for i in order}
    one, first = run(updates, config, rounds=3)
    two, second = run(shuffled, config, rounds=3)
    assert one == two
    assert first.aggregate.tobytes() == second.aggregate.tobytes()


def test_names_are_labels_only():
    updates = vectors(5)
    names = dict(zip(updates, ["e", "c", "a", "d", "b"], strict=True))
    one, _ = run(updates, ReputationConfig(), rounds=3)
    two, _ = run({names[n]: u for n, u in updates.items()}, ReputationConfig(), rounds=3)
    assert {names[n]: r for n, r in one.reputation.items()} == pytest.approx(two.reputation)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-12, 1e12), min_size=4, max_size=4))
def test_lengths_of_exactly_normalised_updates_do_not_matter(factors):
    updates = vectors(4)
    longer = {n: u * np.float32(f) for (n, u), f in zip(updates.items(), factors, strict=True)}
    config = ReputationConfig(normalisation="exact")
    one, first = run(updates, config, rounds=2)
    two, second = run(longer, config, rounds=2)
    assert one.reputation == pytest.approx(two.reputation, abs=1e-6)
    np.testing.assert_allclose(first.aggregate, second.aggregate, atol=1e-6)


def test_clipped_updates_beyond_the_norm_do_not_matter_and_the_norm_itself_changes_no_cosine():
    updates = vectors(4)
    longer = {n: u * np.float32(i + 3) for i, (n, u) in enumerate(updates.items())}
    one, first = run(updates, ReputationConfig(), rounds=2)
    two, _ = run(longer, ReputationConfig(), rounds=2)
    three, third = run(updates, ReputationConfig(norm=2.0), rounds=2)
    assert one.reputation == pytest.approx(two.reputation, abs=1e-6)
    assert first.cosines == pytest.approx(third.cosines, abs=1e-6)
    assert one.reputation == pytest.approx(three.reputation, abs=1e-6)


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30])
def test_extreme_but_finite_updates_are_judged_by_their_direction(size):
    updates = vectors(4)
    peak = np.abs(updates["p1"]).max()
    updates["p1"] = (updates["p1"].astype(np.float64) / peak * size).astype(np.float32)
    plain = vectors(4)
    config = ReputationConfig(normalisation="exact")
    _, first = run(updates, config)
    _, second = run(plain, config)
    assert first.cosines == pytest.approx(second.cosines, abs=1e-5)
    np.testing.assert_allclose(first.aggregate, second.aggregate, atol=1e-6)
    sent = updates["p1"].astype(np.float64) * first.scales["p1"]
    assert np.linalg.norm(sent) == pytest.approx(0.5, rel=1e-5)


def spread(cosines, config, rounds, start=None):
    names = [f"p{i}" for i in range(len(cosines))]
    standing = Standing.begin(names, config)
    if start:
        standing = replace(standing, reputation=dict(zip(names, start, strict=True)))
    course = []
    for _ in range(rounds):
        live = {n: c for n, c in zip(names, cosines, strict=True) if n in standing.reputation}
        standing, _ = smooth(standing, live, config)
        course.append(standing)
    return course


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8), st.floats(0.05, 0.99))
def test_constant_cosines_follow_the_closed_form(cosines, smoothing):
    config = ReputationConfig(start="uniform", smoothing=smoothing, threshold=0, clamp=0)
    for number, standing in enumerate(spread(cosines, config, 12), 1):
        for i, cosine in enumerate(cosines):
            expected = trajectory(cosine, sum(cosines), 1 / len(cosines), smoothing, number)
            assert standing.reputation[f"p{i}"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("good", "bad", "cosine", "expelled"),
    [(10, 2, -1.0, 2), (10, 2, 0.0, 7), (10, 2, 0.2, None), (10, 11, 0.05, 18)],
)
def test_expulsion_comes_in_exactly_the_round_of_the_closed_form(good, bad, cosine, expelled):
    size = good + bad
    honest = 0.35 if bad == 2 else 0.3
    config = ReputationConfig(start="uniform", patience=0)
    course = spread([honest] * good + [cosine] * bad, config, 40)
    gone = next((s.round for s in course if s.expelled), None)
    if cosine < 0:
        # The closed form holds without the clamp at zero, which acts from the first round here.
        assert gone is not None and gone <= expelled
        return
    assert gone == expelled
    if expelled:
        total = good * honest + bad * cosine
        limit, edge, start = cosine / total, 1 / 3 / size, 1 / size
        memory = 0.95 / (0.95 + 0.05 * total)
        assert ceil(log((edge - limit) / (start - limit)) / log(memory)) == expelled
        assert len(course[expelled - 1].expelled) == bad


def test_defaults_withhold_at_once_and_remove_after_the_patience():
    config = ReputationConfig()
    course = spread([0.35] * 10 + [-0.2, 0.0], config, 12)
    for name in ("p10", "p11"):
        seen = [s.reputation[name] for s in course if name in s.reputation]
        assert seen == sorted(seen, reverse=True)
        assert course[-1].expelled[name]["round"] == 11
    _, judged = smooth(Standing.begin(course[0].reputation, config), {
        **{f"p{i}": 0.35 for i in range(10)}, "p10": -0.2, "p11": 0.0}, config)  # fmt: skip
    assert judged.quotas["p10"] == judged.quotas["p11"] == 0


def test_after_an_expulsion_the_closed_form_restarts():
    config = ReputationConfig(start="uniform", patience=0)
    course = spread([0.5, 0.3, 0.4, 0.0], config, 40)
    at = next(i for i, s in enumerate(course) if s.expelled)
    first = course[at]
    assert sum(first.reputation.values()) == pytest.approx(1, abs=1e-12)
    for more in range(1, 6):
        for name, cosine in (("p0", 0.5), ("p1", 0.3), ("p2", 0.4)):
            expected = trajectory(cosine, 1.2, first.reputation[name], 0.95, more)
            assert course[at + more].reputation[name] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.95])
def test_from_zero_the_first_round_is_the_share_of_the_cosine(smoothing):
    config = ReputationConfig(smoothing=smoothing, threshold=0)
    course = spread([0.2, 0.6, -0.3], config, 1)
    assert course[0].reputation == pytest.approx({"p0": 0.25, "p1": 0.75, "p2": 0})
    with pytest.raises(UserError, match="never move"):
        ReputationConfig(smoothing=1.0)


def test_one_participant_has_everything_and_the_last_is_never_removed():
    standing, judged = run(vectors(1), ReputationConfig(patience=0), rounds=3)
    assert standing.reputation == {"p0": 1.0} and judged.quotas == {"p0": 1.0}
    config = ReputationConfig(patience=0, threshold=1.0)
    standing, _ = run(vectors(4, agreement=0), config, rounds=6)
    assert len(standing.reputation) >= 1
    with pytest.raises(UserError, match="at least one participant"):
        Standing.begin([], config)
    with pytest.raises(UserError, match="No participant is left"):
        assess(Standing(), vectors(1), config)


def test_leaving_one_out_equals_doing_it():
    updates = vectors(6, agreement=0.3)
    config = ReputationConfig(leave_one_out=True, threshold=0)
    standing = Standing.begin(updates, config)
    standing, _ = assess(standing, updates, config)
    _, judged = assess(standing, updates, config)
    sent = {n: u * np.float64(judged.scales[n]) for n, u in updates.items()}
    for name in updates:
        others = sum(judged.weights[n] * sent[n] for n in updates if n != name)
        cosine = others @ sent[name] / np.linalg.norm(others) / np.linalg.norm(sent[name])
        assert judged.cosines[name] == pytest.approx(cosine, abs=1e-5)


def test_a_zero_update_has_cosine_zero():
    updates = vectors(3) | {"p3": np.zeros(300, np.float32)}
    standing, judged = run(updates, ReputationConfig(), rounds=12)
    assert judged.cosines.get("p3", 0) == 0
    assert "p3" in standing.expelled
    only = {f"p{i}": np.zeros(300, np.float32) for i in range(3)}
    standing, judged = run(only, ReputationConfig(start="uniform"))
    assert judged.flag == "" and sum(standing.reputation.values()) == pytest.approx(1)
    standing, judged = run(only, ReputationConfig())
    assert judged.flag and set(judged.quotas.values()) == {0.0}


def test_whoever_is_absent_keeps_the_reputation_and_gets_nothing():
    config = ReputationConfig()
    updates = vectors(4)
    standing, _ = run(updates, config, rounds=2)
    there = {n: u for n, u in updates.items() if n != "p2"}
    after, judged = assess(standing, there, config)
    assert "p2" in after.reputation and "p2" not in judged.quotas
    assert after.misses["p2"] == 1 and after.misses["p0"] == 0
    unweighted, _ = assess(replace(standing, reputation={
        n: r for n, r in standing.reputation.items() if n != "p2"}), there, config)  # fmt: skip
    others = {n: judged.cosines[n] for n in there}
    for _ in range(config.misses):
        after, _ = assess(after, there, config)
    assert "p2" in after.inactive and "p2" not in after.reputation
    assert sum(after.reputation.values()) == pytest.approx(1)
    back = admit(after, "p2", config)
    assert back.reputation["p2"] <= config.threshold / 4 + 1e-12 and "p2" not in back.inactive
    assert others and unweighted.round == 3


def test_a_round_without_answers_counts_as_missed_and_changes_no_reputation():
    config = ReputationConfig()
    standing, _ = run(vectors(3), config)
    after = missed(standing, config)
    assert after.reputation == standing.reputation and after.round == standing.round + 1
    with pytest.raises(ValueError):
        assess(standing, {}, config)


def test_budget_quorum_and_observation_hold_removals_back():
    cosines = [0.5] * 6 + [0.0] * 4
    free = spread(cosines, ReputationConfig(patience=0), 12)
    assert len(free[-1].expelled) == 4
    slow = spread(cosines, ReputationConfig(patience=0, budget=1, window=5), 12)
    rounds = sorted(e["round"] for e in slow[-1].expelled.values())
    assert len(rounds) >= 2 and min(np.diff(rounds)) >= 5
    many = spread(cosines, ReputationConfig(patience=0, quorum=9), 12)
    assert len(many[-1].expelled) == 1
    watched = spread(cosines, ReputationConfig(patience=0, observe=True), 12)
    assert not watched[-1].expelled and len(watched[-1].reputation) == 10


def test_copies_share_one_vote_and_one_credit():
    updates = vectors(6, size=9000)
    copy = updates["p5"]
    crowd = updates | {f"x{i}": copy * np.float32(i + 1) for i in range(4)}
    config = ReputationConfig(duplicates=0.98, normalisation="exact", threshold=0)
    _, alone = run(updates, config)
    _, together = run(crowd, config)
    assert together.copies == (("p5", "x0", "x1", "x2", "x3"),)
    assert sum(together.weights[n] for n in together.copies[0]) == pytest.approx(1 / 6)
    np.testing.assert_allclose(alone.aggregate, together.aggregate, atol=1e-6)
    assert together.cosines["x0"] == pytest.approx(alone.cosines["p5"] / 5, abs=1e-5)
    _, refused = run(crowd, replace(config, copies="none"))
    assert {refused.cosines[n] for n in together.copies[0]} == {0.0}
    assert refused.cosines["p1"] == together.cosines["p1"] != 0
    rows = list(updates.values())
    norms = [float(np.linalg.norm(row)) for row in rows]
    assert copies_among(list(updates), rows, norms, 0.98) == []


def test_a_reference_judges_before_the_aggregate_is_made():
    updates = vectors(3, agreement=2) | {
        f"x{i}": -vectors(9, agreement=2, seed=0)[f"p{i + 3}"] for i in range(6)
    }
    root = vectors(10, agreement=2)["p9"]
    _, judged = run(updates, ReputationConfig(), reference=root)
    assert all(judged.weights[f"x{i}"] == 0 for i in range(6))
    assert all(judged.cosines[f"p{i}"] > 0.5 for i in range(3))
    assert judged.aggregate @ root > 0
    _, lost = run(updates, ReputationConfig())
    assert lost.aggregate @ root < 0


def test_a_standing_survives_json_to_the_last_bit():
    standing, _ = run(vectors(12, agreement=0.1), ReputationConfig(patience=0), rounds=4)
    assert Standing.load(json.loads(json.dumps(standing.state()))) == standing


def test_attested_weights_are_asked_for_and_capped():
    updates = vectors(4)
    with pytest.raises(UserError, match="attested"):
        run(updates, ReputationConfig(first_weights="attested"))
    sizes = {"p0": 97, "p1": 1, "p2": 1, "p3": 1}
    _, judged = run(updates, ReputationConfig(first_weights="attested"), sizes=sizes)
    assert judged.weights["p0"] == pytest.approx(0.97)
    _, judged = run(updates, ReputationConfig(first_weights="capped"), sizes=sizes)
    assert judged.weights["p0"] == pytest.approx(50 / 53)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_block_by_block_equals_all_at_once(size):
    rows = list(vectors(3, size=size).values())
    dense = np.stack(rows).astype(np.float64)
    assert squared_norm(rows[0]) == pytest.approx(dense[0] @ dense[0], rel=1e-5)
    np.testing.assert_allclose(products(rows, rows[1]), dense @ dense[1], rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(
        weighted_sum(rows, [0.2, 0, -3]), [0.2, 0, -3] @ dense, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_norm_is_not_finite_exactly_where_the_vector_is_not(bad):
    row = vectors(1, size=BLOCK + 7)["p0"]
    row[BLOCK + 3] = bad
    assert not np.isfinite(squared_norm(row))
    row[BLOCK + 3] = 3e38
    assert np.isfinite(squared_norm(row))


@pytest.mark.parametrize("field", ["smoothing", "threshold", "norm", "patience", "quorum"])
def test_rules_out_of_range_are_refused(field):
    with pytest.raises(UserError, match=field):
        ReputationConfig(**{field: -1})


@pytest.mark.parametrize(
    ("field", "value"),
    [("normalisation", "none"), ("start", 0), ("reward", "tan"), ("smoothing", "0.9"),
     ("patience", 1.5), ("patience", True), ("observe", 1), ("threshold", None)],
)  # fmt: skip
def test_rules_of_another_kind_are_refused(field, value):
    with pytest.raises(UserError, match=f"{field} is"):
        ReputationConfig(**{field: value})


@pytest.mark.parametrize("bad", [{"a": 0, "b": 0}, {"a": -1, "b": 2}, {"a": np.nan, "b": 2}])
def test_sizes_that_are_none_are_refused(bad):
    with pytest.raises(UserError, match="attested sizes"):
        Standing.begin("ab", ReputationConfig(start="attested"), bad)


@pytest.mark.parametrize("row", [np.ones(4), np.ones((5, 1)), np.full(5, np.nan)])
def test_updates_that_are_no_vectors_are_refused(row):
    config = ReputationConfig()
    updates = {"a": np.ones(5, np.float32), "b": row.astype(np.float32)}
    with pytest.raises(UserError, match="update of 'b'"):
        assess(Standing.begin("ab", config), updates, config)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("size", [50, 3 * BLOCK + 17])
def test_blocks_and_one_dense_product_on_any_device_agree(device, size):
    torch = pytest.importorskip("torch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    updates = vectors(8, size) | {f"x{i}": -row for i, row in enumerate(vectors(2, size).values())}
    config = ReputationConfig(patience=0)
    after, judged = run(updates, config)
    names = sorted(updates)
    matrix = torch.from_numpy(np.stack([updates[n] for n in names])).to(device, torch.float64)
    clipped = matrix * (config.norm / matrix.norm(dim=1, keepdim=True)).clamp(max=1)
    aggregate = clipped.mean(0)
    cosines = clipped @ aggregate / (clipped.norm(dim=1) * aggregate.norm())
    found = np.array([judged.cosines[n] for n in names])
    np.testing.assert_allclose(found, cosines.cpu().numpy(), atol=1e-5)
    np.testing.assert_allclose(judged.aggregate, aggregate.cpu().numpy(), atol=1e-6)
    shares = cosines.clamp(min=0) / cosines.clamp(min=0).sum()
    assert after.live == [n for n, r in zip(names, shares, strict=True) if r >= 1 / 30]
    assert not {"x0", "x1"} & set(after.live)
    rows, weights = [updates[n] for n in names], [judged.weights[n] * 0.5 for n in names]
    total, inner = combined(rows, weights)
    assert total.tobytes() == weighted_sum(rows, weights).tobytes()
    np.testing.assert_array_equal(inner, products(rows, total))


def test_cosines_cannot_tell_flippers_from_the_flipped():
    rows = iter(vectors(21).values())
    updates = {f"p{i}": next(rows) for i in range(10)} | {f"x{i}": -next(rows) for i in range(11)}
    mirrored = {name: -row for name, row in updates.items()}
    config = replace(ReputationConfig.robust(), patience=0, duplicates=0.0)
    equal, less = dict.fromkeys(updates, 1.0), {n: 1.0 if n[0] == "p" else 0.5 for n in updates}
    one, _ = run(updates, config, 3, sizes=equal)
    other, _ = run(mirrored, config, 3, sizes=equal)
    # With as much data each, whoever is in the majority wins, whichever world it is.
    assert one.reputation == other.reputation and all(name[0] == "x" for name in one.live)
    attested, _ = run(updates, config, 3, sizes=less)
    assert all(name[0] == "p" for name in attested.live) and len(attested.live) == 10
