import pytest

from weightshare.errors import UserError
from weightshare.language import decode_speed


def test_speed_is_the_median_of_the_repeats_and_more_work_is_slower(model, tokenizer, monkeypatch):
    ticks = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0, 30.0, 31.0])  # warm-up, then 1, 4 and 1 s
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    calls = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    speed = decode_speed(model, tokenizer, new_tokens=8, batch=2, repeats=3)
    assert speed.repeats == (16.0, 4.0, 16.0)
    assert speed.median == 16.0
    prompt = (2, speed.prompt_tokens)
    assert calls == ([prompt] + [(2, 1)] * 8) * 4


def test_real_seconds_are_positive(model):
    speed = decode_speed(model, [5, 6, 7], new_tokens=4, repeats=2)
    assert speed.median > 0
    assert speed.prompt_tokens == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"new_tokens": 0}, "new_tokens"),
        ({"batch": 0}, "batch"),
        ({"new_tokens": 500}, "positions"),
    ],
)
def test_impossible_measurements_are_refused(model, options, says):
    with pytest.raises(UserError, match=says):
        decode_speed(model, [5, 6, 7], **options)
