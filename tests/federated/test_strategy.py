"""The strategy over real messages: rewards, removal, absence, resync, survival."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from weightshare.errors import UserError
from weightshare.federated import LocalConfig, ReputationConfig, ReputationStrategy, wire
from weightshare.federated.grid import InProcessGrid, each_app
from weightshare.federated.participant import client_app
from weightshare.federated.reputation import trajectory
from weightshare.federated.roster import Roster, fingerprint
from weightshare.training import checkpoint

SIZE = 400
ROBUST = replace(ReputationConfig.robust(), first_weights="uniform")


def opposing(name, number):
    """Honest ones agree, x ones point away."""
    common = np.random.default_rng([7, number]).standard_normal(SIZE)
    own = np.random.default_rng([number, *name.encode()]).standard_normal(SIZE)
    sign = -1 if name.startswith("x") else 1
    return 0.1 * (sign * common + 0.6 * own)


def test_both_sides_have_the_same_model_to_the_last_bit(federation):
    here = federation(5).run(6)
    assert here.strategy.deliver(here.grid) == 5
    for name in here.names:
        mine, theirs = here.strategy.model_of(name), here.cohort.memories[name].model
        assert mine.tobytes() == theirs.tobytes()
    models = {here.strategy.model_of(n).tobytes() for n in here.names}
    assert len(models) == 5, "everyone has earned another model"


def test_a_model_is_the_first_plus_own_updates_plus_rewards(federation):
    here = federation(3)
    total = {n: here.initial.astype(np.float64) for n in here.names}
    for _ in range(4):
        here.run()
        judged = here.strategy.last
        for name in here.names:
            update = here.cohort.memories[name].sent
            reward = here.strategy._payout.rewards.dense(name)
            total[name] = total[name] + judged.scales[name] * update + reward
    for name in here.names:
        np.testing.assert_allclose(here.strategy.model_of(name), total[name], atol=1e-5)


def test_arrival_order_changes_nothing(federation):
    one, two = federation(6), federation(6)
    answer = two.grid.answer
    two.grid.answer = lambda d: random.sample(list(answer(random.sample(list(d), len(d)))), len(d))
    assert one.run(4).outcome() == two.run(4).outcome()


def test_the_closed_form_through_messages_and_removal_in_its_very_round(federation):
    root = np.zeros(SIZE, np.float32)
    root[0] = 1
    cosines = {**{f"p{i}": 0.35 for i in range(10)}, "q0": 0.0, "q1": 0.0}

    def update(name, number):
        # A vector whose cosine with the root is the wanted one in every round.
        result = np.random.default_rng([number, *name.encode()]).standard_normal(SIZE)
        result[0] = 0
        result *= np.sqrt(1 - cosines[name] ** 2) / np.linalg.norm(result)
        result[0] = cosines[name]
        return result

    config = ReputationConfig(start="uniform", patience=0)
    here = federation(list(cosines), config, update, root=lambda weights, number: root)
    for number in range(1, 7):
        here.run()
        for name, cosine in cosines.items():
            expected = trajectory(cosine, 3.5, 1 / 12, 0.95, number)
            assert here.strategy.standing.reputation[name] == pytest.approx(expected, abs=1e-6)
    here.run()
    assert set(here.strategy.standing.expelled) == {"q0", "q1"}
    here.run()
    assert "q0" not in here.asked and len(here.asked) == 10


def test_the_expelled_get_nothing_ever_again(federation):
    names = [f"p{i}" for i in range(5)] + ["x0"]
    here = federation(names, ReputationConfig(patience=2), opposing).run(3)
    assert set(here.strategy.standing.expelled) == {"x0"}
    before = here.strategy.model_of("x0")
    for _ in range(3):
        here.run()
        assert "x0" not in here.asked and "x0" not in here.strategy.last.weights
    assert here.strategy.model_of("x0").tobytes() == before.tobytes()
    here.strategy.deliver(here.grid)
    rows = here.strategy.log.rows("expelled")
    assert [(r["name"], r["round"]) for r in rows] == [("x0", 3)] and rows[0]["reputation"] < 1 / 18


def test_a_removed_participant_can_be_readmitted_at_the_threshold(federation):
    names = [f"p{i}" for i in range(5)] + ["x0"]
    here = federation(names, ReputationConfig(patience=2), opposing).run(3)
    here.strategy.readmit("x0")
    assert here.strategy.standing.reputation["x0"] == pytest.approx(1 / 3 / 6)
    here.run()
    assert "x0" in here.asked and "x0" in here.strategy.last.cosines
    with pytest.raises(UserError, match="not in the roster"):
        here.strategy.readmit("nobody")
    with pytest.raises(UserError, match="takes part already"):
        here.strategy.readmit("p1")


def test_the_readmitted_begin_with_a_clean_sheet(federation):
    here = federation(4)
    while "p2" not in here.strategy.conduct.suspended:
        here.cohort.memories.pop("p2", None)
        here.run(1)
    here.strategy.readmit("p2")
    here.run(1)
    here.cohort.memories.pop("p2")
    here.run(2)
    assert "p2" in here.asked and "p2" not in here.strategy.conduct.suspended


def test_strangers_have_no_model_and_no_statement(federation):
    strategy = federation(3).run(1).strategy
    for asked in (strategy.model_of, strategy.reward_of, strategy.statement):
        with pytest.raises(UserError, match="not in the roster"):
            asked("p9")


def test_observing_removes_nobody_and_says_who_would_be(federation):
    names = [f"p{i}" for i in range(5)] + ["x0"]
    config = ReputationConfig(patience=2, observe=True)
    here = federation(names, config, opposing).run(4)
    assert not here.strategy.standing.expelled
    assert {r["name"] for r in here.strategy.log.rows("would_expel")} == {"x0"}


def test_the_statement_of_a_participant_adds_up(federation):
    here = federation(4).run(5)
    rows = here.strategy.statement("p2")
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(0 <= row["quota"] <= 1 and row["entries"] <= SIZE for row in rows)
    best = max(here.strategy.statement(n)[-1]["quota"] for n in here.names)
    assert best == 1 and here.metrics["bytes-sent"] > 0

    def unlike(name, number):
        draws = (np.random.default_rng([number, *key.encode()]) for key in ("all", name))
        common, own = (draw.standard_normal(SIZE) for draw in draws)
        return 0.1 * ((0.15 + int(name[1]) / 3) * common + own)

    here = federation(6, update=unlike).run(5)
    shares = set()
    for name in here.names:
        row = here.strategy.statement(name)[-1]
        order = here.strategy._payout.order(wire.Ticket(name, 6, 0))
        arrays = len(order["reward"]) if "reward" in order else 0
        assert row["bytes"] == wire.payload(order) - 128 * arrays  # beside each array's header
        shares.add(arrays)
    assert shares >= {1, 2}  # whole vectors and parts


def test_without_own_updates_size_weights_and_full_quota_it_is_federated_averaging(federation):
    sizes = {"p0": 10, "p1": 30, "p2": 60}
    config = ReputationConfig(
        norm=float("inf"), start="attested", first_weights="attested", smoothing=1.0,
        threshold=0.0, reward="full", keep_own=False,
    )  # fmt: skip
    here = federation(3, config, sizes=sizes).run(5)
    weights = here.initial.astype(np.float64)
    for number in range(1, 6):
        updates = {n: here.cohort.training.update(n, number) for n in here.names}
        weights = weights + sum(sizes[n] / 100 * updates[n].astype(np.float64) for n in here.names)
    for name in here.names:
        np.testing.assert_allclose(here.strategy.model_of(name), weights, atol=1e-6)
    np.testing.assert_allclose(here.strategy.server, weights, atol=1e-6)


def test_own_share_can_be_taken_out_of_the_reward(federation):
    config = ReputationConfig(keep_own=False, subtract_own=True)
    here = federation(3, config).run(1)
    judged = here.strategy.last
    best = max(judged.quotas, key=judged.quotas.get)
    assert judged.quotas[best] == 1
    rest = sum(
        judged.weights[n] * judged.scales[n] * here.cohort.memories[n].sent.astype(np.float64)
        for n in here.names
        if n != best
    )
    got = here.strategy.model_of(best) - here.initial
    np.testing.assert_allclose(got, rest, atol=1e-6)
    here.run(2)
    here.strategy.deliver(here.grid)
    for name in here.names:
        assert here.strategy.model_of(name).tobytes() == here.cohort.memories[name].model.tobytes()


def test_an_absent_participant_changes_nothing_for_the_others_and_comes_back_exact(federation):
    here = federation(5).run(2)
    here.grid.offline = {"p3"}
    kept = here.strategy.model_of("p3")
    here.run(2)
    assert here.strategy.model_of("p3").tobytes() == kept.tobytes()
    here.grid.offline = set()
    here.run(2)
    here.strategy.deliver(here.grid)
    assert here.strategy.model_of("p3").tobytes() == here.cohort.memories["p3"].model.tobytes()
    assert not here.strategy.conduct.resyncs


def test_a_reply_that_is_lost_on_the_way_leaves_both_sides_alike(federation):
    here = federation(4).run(2)
    answer = here.grid.answer
    here.grid.answer = lambda d: [(n, r) for n, r in answer(d) if n != "p1"]
    here.run(2)
    here.grid.answer = answer
    here.run(2)
    here.strategy.deliver(here.grid)
    for name in here.names:
        assert here.strategy.model_of(name).tobytes() == here.cohort.memories[name].model.tobytes()


def test_after_long_silence_a_participant_is_inactive_and_returns_at_the_threshold(federation):
    here = federation(4, ReputationConfig(misses=2)).run(2)
    here.grid.offline = {"p0"}
    here.run(2)
    assert set(here.strategy.standing.inactive) == {"p0"}
    assert sum(here.strategy.standing.reputation.values()) == pytest.approx(1)
    here.grid.offline = set()
    here.run(1)
    assert here.strategy.standing.reputation["p0"] <= 1 / 3 / 4 + 1e-9
    here.run(1)
    assert "p0" in here.strategy.last.cosines


def test_a_participant_that_lost_its_model_is_sent_exactly_that(federation):
    here = federation(4).run(3)
    here.cohort.memories["p2"].model = None
    model = here.strategy.model_of("p2")
    here.run(1)
    assert here.strategy.conduct.resyncs == {"p2": 1}
    assert here.strategy.model_of("p2").tobytes() == model.tobytes()
    here.run(1)
    assert here.cohort.memories["p2"].model.tobytes() == model.tobytes()
    assert here.strategy.server.tobytes() != model.tobytes()


def test_losing_the_model_every_round_gains_nothing(federation):
    plain, forgetful = federation(4), federation(4)
    for _ in range(12):
        plain.run(1)
        forgetful.cohort.memories.pop("p2", None)
        forgetful.run(1)
    assert "p2" in forgetful.strategy.conduct.suspended
    gained = [len(s.strategy.statement("p2")) for s in (plain, forgetful)]
    assert gained[0] == 12 and gained[1] <= 4
    assert {"resync", "suspended"} <= {r["event"] for r in forgetful.strategy.log.rows()}


@pytest.mark.parametrize("config", [ReputationConfig(patience=3), ROBUST])
def test_save_restore_continue_is_the_uninterrupted_run(federation, tmp_path, config):
    names = [f"p{i}" for i in range(5)] + ["x0", "x1"]
    whole = federation(names, config, opposing).run(14)
    first = federation(names, config, opposing, folder=tmp_path / "one").run(8)
    first.strategy.save(tmp_path / "checkpoints")
    second = federation(names, config, opposing, folder=tmp_path / "two")
    assert second.strategy.restore(tmp_path / "checkpoints") == 8
    second.run(6)
    assert second.outcome() == whole.outcome()
    assert second.strategy.standing == whole.strategy.standing
    assert second.strategy.standing.expelled


def test_a_checkpoint_of_something_else_is_refused(federation, tmp_path):
    federation(3).run(1).strategy.save(tmp_path)
    other = federation(3, ReputationConfig(smoothing=0.5))
    with pytest.raises(UserError, match="other rules"):
        other.strategy.restore(tmp_path)
    short = ReputationStrategy(np.zeros(7, np.float32))
    with pytest.raises(UserError, match="another model"):
        short.restore(tmp_path)
    more = federation(4)
    more.strategy.restore(tmp_path)
    with pytest.raises(UserError, match="the participants p0, p1, p2"):
        more.run()
    watching = federation(3, replace(ReputationConfig(), observe=True))
    assert watching.strategy.restore(tmp_path) == 1
    checkpoint.save(tmp_path, 2, {"weights": torch.zeros(3)}, {})
    with pytest.raises(UserError, match="schema None"):
        federation(3).strategy.restore(tmp_path)


class Foreign(Grid):
    """A grid that is not ours, with nodes under chosen keys."""

    def __init__(self, keys, appear=0):
        from weightshare.federated import flower

        self.nodes = [flower.node_info(i + 5, key) for i, key in enumerate(keys)]
        self.appear, self.looks = appear, 0

    def get_nodes(self):
        self.looks += 1
        return self.nodes if self.looks > self.appear else []

    def get_node_ids(self):
        return [node.node_id for node in self.get_nodes()]

    set_run = run = create_message = push_messages = pull_messages = send_and_receive = None


def test_outside_the_process_a_roster_is_required_and_only_its_keys_count():
    strategy = ReputationStrategy(np.zeros(8, np.float32))
    with pytest.raises(UserError, match="roster"):
        strategy.configure_train(1, None, None, Foreign([b"a"]))
    roster = Roster.of_keys({"ann": b"a", "bob": b"b"})
    strategy = ReputationStrategy(np.zeros(8, np.float32), roster=roster)
    messages = strategy.configure_train(1, None, None, Foreign([b"z", b"b", b"a", b"b"]))
    assert [m.metadata.dst_node_id for m in messages] == [7, 6]


def test_it_waits_for_nodes_until_the_deadline():
    roster = Roster.of_keys({"ann": b"a", "bob": b"b"})
    naps = []
    strategy = ReputationStrategy(
        np.zeros(8, np.float32), roster=roster, minimum=2, wait=60, sleep=naps.append
    )
    assert len(strategy.configure_train(1, None, None, Foreign([b"a", b"b"], appear=3))) == 2
    assert len(naps) == 3
    strategy.wait = 0
    assert strategy.configure_train(1, None, None, Foreign([b"a", b"b"], appear=99)) == []


def test_rosters_are_read_and_checked(tmp_path):
    good = {"ann": fingerprint(b"a"), "bob": fingerprint(b"b\n")}
    path = tmp_path / "roster.json"
    import json

    path.write_text(json.dumps(good))
    assert Roster.load(path).name_of(b"b") == "bob" and Roster.load(path).name_of(b"c") is None
    for bad, said in (({}, "empty"), ({"a": "x"}, "64"), ({"a": "a" * 64, "b": "a" * 64}, "same")):
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=said):
            Roster.load(path)
    path.write_text("[")
    with pytest.raises(UserError, match="not a roster"):
        Roster.load(path)


def test_client_apps_over_flowers_own_start_are_the_same_federation(federation, tmp_path):
    here = federation(3).run(4)
    apps = {
        name: client_app(name, here.cohort.training, SIZE, 1, tmp_path / name)
        for name in here.names
    }
    grid = InProcessGrid(here.names, each_app(apps))
    strategy = ReputationStrategy(here.initial)
    from flwr.app import ArrayRecord

    strategy.start(grid, ArrayRecord(), num_rounds=4)
    strategy.deliver(grid)
    assert strategy.server.tobytes() == here.strategy.server.tobytes()
    # A restarted node has nothing but its disk.
    for name in here.names:
        again = client_app(name, here.cohort.training, SIZE, 1, tmp_path / name)
        context = Context(1, 2, {}, RecordDict(), {})
        messages = list(strategy.configure_train(5, None, None, grid))
        message = next(m for m in messages if m.metadata.dst_node_id == grid._ids[name])
        reply = again(message, context)
        assert isinstance(reply, Message) and "update" in reply.content


def test_an_app_that_fails_costs_nobody_else_the_round(federation):
    here = federation(3)
    apps = {n: client_app(n, here.cohort.training, SIZE, 1) for n in here.names}
    del apps["p1"]._registered_funcs["train.personal"]
    grid = InProcessGrid(here.names, each_app(apps))
    strategy = ReputationStrategy(here.initial)
    replies = grid.send_and_receive(strategy.configure_train(1, None, None, grid))
    strategy.aggregate_train(1, replies)
    assert sorted(strategy.last.cosines) == ["p0", "p2"] and strategy.conduct.strikes == {"p1": 1}


def test_bad_models_are_refused_at_the_door():
    for bad in (np.zeros(4), [0.0] * 4, np.zeros((2, 2), np.float32)):
        with pytest.raises(UserError, match="float32"):
            ReputationStrategy(bad)
    with pytest.raises(UserError, match="not finite"):
        ReputationStrategy(np.full(4, np.nan, np.float32))
    with pytest.raises(UserError, match="layers"):
        ReputationStrategy(np.zeros(4, np.float32), ReputationConfig(quota="layer"), layers=[3])
    assert LocalConfig().decay == 0.977
    for bad in ({"epochs": 0}, {"batch_size": 0}, {"learning_rate": -1.0}, {"decay": 2.0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            LocalConfig(**bad)
