import pytest

from weightshare.errors import UserError
from weightshare.training import LoopConfig, schedule


def test_warm_up_rises_linearly_to_the_peak_and_cosine_falls_to_the_final_share():
    factor = schedule(LoopConfig(steps=100, warmup_fraction=0.1, final_fraction=0.2))
    assert [factor(t) for t in range(10)] == pytest.approx([(t + 1) / 11 for t in range(10)])
    assert factor(10) == 1
    assert factor(55) == pytest.approx(0.6)
    assert factor(100) == factor(1000) == pytest.approx(0.2)


def test_linear_and_constant():
    linear = schedule(LoopConfig(steps=10, schedule="linear", warmup_fraction=0))
    assert [linear(t) for t in range(11)] == pytest.approx([1 - t / 10 for t in range(11)])
    constant = schedule(LoopConfig(steps=10, schedule="constant", warmup_fraction=0))
    assert {constant(t) for t in range(12)} == {1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("accumulate", 0),
        ("log_every", 0),
        ("keep_checkpoints", 0),
        ("warmup_fraction", 1.5),
        ("learning_rate", float("nan")),
        ("clip", 0),
        ("ema_decay", 1),
        ("patience", 0),
        ("precision", "fp16"),
        ("schedule", "step"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=name):
        LoopConfig(**{name: value})
