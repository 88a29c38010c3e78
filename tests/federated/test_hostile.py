"""Whatever a participant sends, the round is the one without it, bit for bit, and goes on."""

import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightshare.federated import ReputationConfig, flower, wire

SIZE = 400
GOOD = np.linspace(-1, 1, SIZE).astype(np.float32)


def npy(values, **header):
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    data = buffer.getvalue()
    if header:
        facts = {"descr": "<f4", "fortran_order": False, "shape": (SIZE,), **header}
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, facts)
        data = head.getvalue() + data[-4 * SIZE :]
    return data


def packed(dtype="float32", shape=(SIZE,), stype="numpy.ndarray", data=None):
    return Array(dtype, shape, stype, npy(GOOD) if data is None else data)


def content(message, array=None, **changes):
    facts = message.content["round"]
    records = {
        "update": ArrayRecord({"update": array or packed()}),
        "report": ConfigRecord({"round": facts["round"], "checksum": facts["checksum"]}),
    }
    records |= changes
    return RecordDict({k: v for k, v in records.items() if v is not None})


def with_value(value):
    vector = GOOD.copy()
    vector[17] = value
    return vector


def report(message, **changes):
    facts = message.content["round"]
    return ConfigRecord({"round": facts["round"], "checksum": facts["checksum"], **changes})


HOSTILE = {
    "nothing": lambda m: RecordDict(),
    "an extra array": lambda m: content(
        m, update=ArrayRecord({"update": packed(), "more": packed()})
    ),
    "a missing array": lambda m: content(m, update=ArrayRecord({})),
    "another name": lambda m: content(m, update=ArrayRecord({"weights": packed()})),
    "an extra record": lambda m: content(m, metrics=MetricRecord({"num-examples": 10**9})),
    "no report": lambda m: content(m, report=None),
    "a report that is arrays": lambda m: content(m, report=ArrayRecord({})),
    "an update that is numbers": lambda m: content(m, update=MetricRecord({"update": 1.0})),
    "a claimed count": lambda m: content(m, report=report(m, examples=10**6)),
    "a claimed identity": lambda m: content(m, report=report(m, name="p0")),
    "another round": lambda m: content(m, report=report(m, round=m.content["round"]["round"] - 1)),
    "a round that is true": lambda m: content(m, report=report(m, round=True)),
    "another model": lambda m: content(m, report=report(m, checksum=1)),
    "declared float64": lambda m: content(m, packed(dtype="float64")),
    "declared shape": lambda m: content(m, packed(shape=(20, 20))),
    "embedded float64": lambda m: content(m, packed(data=npy(GOOD.astype(np.float64)))),
    "embedded shape": lambda m: content(m, packed(data=npy(GOOD, shape=(20, 20)))),
    "embedded int32": lambda m: content(m, packed(data=npy(GOOD, descr="<i4"))),
    "a header of ten billion": lambda m: content(m, packed(data=npy(GOOD, shape=(10**10,)))),
    "an object array": lambda m: content(m, packed(data=npy(GOOD, descr="|O"))),
    "another serialisation": lambda m: content(m, packed(stype="pickle")),
    "too short": lambda m: content(m, packed(data=npy(GOOD)[:-4])),
    "too long": lambda m: content(m, packed(data=npy(GOOD) + b"\0" * 10**6)),
    "empty": lambda m: content(m, packed(data=b"")),
    "not a number": lambda m: content(m, packed(data=npy(with_value(np.nan)))),
    "infinite": lambda m: content(m, packed(data=npy(with_value(-np.inf)))),
    "lost and more": lambda m: content(m, report=report(m, lost=True)),
}


def without(federation, rounds=3, **options):
    """The federation in which p3 never answers."""
    here = federation(5, **options)
    answer = here.grid.answer
    here.grid.answer = lambda d: [(n, r) for n, r in answer(d) if n != "p3"]
    return here.run(rounds)


def with_replies(federation, make, rounds=3, **options):
    """The federation in which p3 answers ``make(message)``."""
    here = federation(5, **options)
    answer = here.grid.answer

    def changed(deliveries):
        messages = dict(deliveries)
        for name, reply in answer(deliveries):
            yield (name, make(messages[name], reply)) if name == "p3" else (name, reply)

    here.grid.answer = changed
    return here.run(rounds)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_reply_is_as_if_it_had_not_come(federation, name):
    hostile = with_replies(
        federation, lambda m, r: Message(HOSTILE[name](m), reply_to=m), strikes=99
    )
    assert hostile.outcome(["p3"]) == without(federation, strikes=99).outcome(["p3"])
    assert hostile.strategy.conduct.strikes["p3"] == 3
    assert all(row["reason"] for row in hostile.strategy.log.rows("rejected"))


def forged(message, field, value):
    reply = Message(content(message), reply_to=message)
    reply.metadata.__dict__[field] = value
    return flower.to_bytes(reply)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_src_node_id", 77),
        ("_reply_to_message_id", "0" * 64),
        ("_group_id", "1000"),
        ("_run_id", 9),
        ("_dst_node_id", 5),
        ("_message_type", "query"),
    ],
)
def test_a_forged_envelope_never_reaches_the_strategy(federation, field, value):
    hostile = with_replies(federation, lambda m, r: forged(m, field, value))
    assert hostile.outcome(["p3"]) == without(federation).outcome(["p3"])
    assert hostile.grid.dropped == 3 and not hostile.strategy.conduct.strikes


def test_nobody_answers_in_the_name_of_another(federation):
    here = federation(5)
    answer = here.grid.answer

    def changed(deliveries):
        messages = dict(deliveries)
        stolen = Message(content(messages["p0"]), reply_to=messages["p0"])
        yield "p3", stolen
        yield from ((n, r) for n, r in answer(deliveries) if n != "p3")

    here.grid.answer = changed
    here.run(3)
    assert here.outcome(["p3"]) == without(federation).outcome(["p3"])


def test_a_second_reply_is_dropped(federation):
    plain, twice = federation(4), federation(4)
    answer = twice.grid.answer
    twice.grid.answer = lambda d: [pair for pair in answer(d) for _ in range(2)]
    assert plain.run(3).outcome() == twice.run(3).outcome()
    assert twice.grid.dropped == 12


def test_yesterdays_bytes_are_refused_today(federation):
    kept = []

    def replay(message, reply):
        kept.append(reply.content)
        return Message(kept[0], reply_to=message)

    hostile = with_replies(federation, replay)
    assert [r["reason"] for r in hostile.strategy.log.rows("rejected")] == [
        "answer to another round"
    ] * 2
    assert len(hostile.strategy.statement("p3")) == 1


def test_the_same_update_under_todays_date_is_noted(federation):
    kept = []

    def again(message, reply):
        kept.append(reply.content["update"]["update"])
        return Message(content(message, kept[0]), reply_to=message)

    hostile = with_replies(federation, again, rounds=2)
    assert {r["name"] for r in hostile.strategy.log.rows("repeats")} == {"p3"}


def test_a_reward_that_is_sent_back_is_noted(federation):
    def echo(message, reply):
        reward = wire.reward_in(message.content, SIZE)
        update = reply.content["update"]["update"] if reward is None else wire.array(reward)
        return Message(content(message, update), reply_to=message)

    hostile = with_replies(federation, echo, rounds=2)
    assert [(r["name"], r["what"]) for r in hostile.strategy.log.rows("repeats")] == [
        ("p3", "its last reward")
    ]


def test_huge_but_finite_entries_do_not_poison_the_rest(federation):
    huge = np.full(SIZE, 3e38, np.float32)
    hostile = with_replies(
        federation, lambda m, r: Message(content(m, packed(data=npy(huge))), reply_to=m)
    )
    assert np.isfinite(hostile.strategy.models).all()
    assert np.linalg.norm(hostile.strategy.last.aggregate) <= 0.5 + 1e-6
    assert not hostile.strategy.conduct.strikes


def test_a_reply_that_is_implausibly_long_is_a_strike(federation):
    def update(name, number):
        own = np.random.default_rng([number, *name.encode()]).standard_normal(400)
        return (1 + own) * (1e3 if name == "p3" and number == 2 else 0.1)

    config = ReputationConfig(longest=1e3)
    here = federation(4, config, update).run(3)
    (row,) = here.strategy.log.rows("rejected")
    assert (row["name"], row["round"], row["reason"]) == ("p3", 2, "implausibly long")
    assert not federation(4, ReputationConfig(), update).run(3).strategy.log.rows("rejected")


def test_three_invalid_replies_and_no_more_messages_come(federation):
    hostile = with_replies(federation, lambda m, r: Message(RecordDict(), reply_to=m), rounds=5)
    assert "p3" in hostile.strategy.conduct.suspended and "p3" not in hostile.asked
    assert sum(hostile.strategy.standing.reputation.values()) == pytest.approx(1)
    hostile.strategy.readmit("p3")
    hostile.run()
    assert "p3" in hostile.asked


def test_errors_and_crashes_cost_only_their_sender(federation):
    hostile = with_replies(federation, lambda m, r: Message(Error(1, "no"), reply_to=m), strikes=99)
    assert hostile.outcome(["p3"]) == without(federation, strikes=99).outcome(["p3"])


def test_a_round_in_which_all_fail_is_void_and_the_next_goes_on(federation):
    here = federation(3)
    answer, here.grid.answer = here.grid.answer, lambda d: []
    here.run(1)
    assert here.strategy.last is None and here.strategy.standing.round == 1
    here.grid.answer = answer
    here.run(2)
    assert len(here.strategy.last.cosines) == 3


VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.text(max_size=9),
    st.binary(max_size=30),
)  # fmt: skip
ARRAYS = st.builds(
    lambda dtype, shape, stype, data: Array(dtype, tuple(shape), stype, data),
    st.sampled_from(["float32", "float64", "object", ""]),
    st.lists(st.integers(-1, 2**31 - 1), max_size=3) | st.just([SIZE]),
    st.sampled_from(["numpy.ndarray", "pickle"]),
    st.binary(max_size=200)
    | st.just(npy(GOOD))
    | st.binary(max_size=80).map(lambda b: npy(GOOD)[:128] + b),
)
NAMES = st.sampled_from(["update", "report", "round", "checksum", "lost", "x"])
RECORDS = st.one_of(
    st.dictionaries(NAMES, ARRAYS, max_size=2).map(ArrayRecord),
    st.dictionaries(NAMES, VALUES, max_size=3).map(ConfigRecord),
    st.dictionaries(NAMES, st.integers(-9, 9), max_size=2).map(MetricRecord),
)


@pytest.fixture(scope="module")
def arena():
    return {}


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(NAMES, RECORDS, max_size=3), st.binary(max_size=20), st.integers(0, 3))
def test_a_thousand_random_replies_crash_nothing(federation, arena, records, noise, how):
    if "here" not in arena:
        arena["here"] = federation(3, strikes=10**9)
        arena["here"].run(1)
    here = arena["here"]
    messages = list(here.strategy.configure_train(0, None, None, here.grid))
    delivered = []
    here.grid.answer = lambda d: delivered.extend(d) or []
    list(here.grid.send_and_receive(messages))
    message = dict(delivered)["p1"]
    if how == 0:
        kept = records
    else:
        kept = {**records, "report": report(message)} if how == 1 else content(message, **records)
    data = flower.to_bytes(Message(RecordDict(dict(kept)), reply_to=message))
    if how == 3:
        place = len(data) // 3
        data = data[:place] + noise + data[place + len(noise) :]
    here.grid.answer = lambda d: [("p1", data)]
    reply = here.grid._received(data, "p1", message.metadata)
    before = here.strategy.server.tobytes()
    found = here.strategy._updates([reply] if reply is not None else [])
    assert here.strategy.server.tobytes() == before
    assert all(np.isfinite(update).all() and len(update) == SIZE for update, _ in found.values())
