"""Numbers and times are written for a person."""

import pytest

from weightshare.report.wording import duration, show


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (134515008, "134,515,008"),
        (3.14159, "3.142"),
        (1234.56, "1,235"),
        (1.2e-05, "1.20×10⁻⁵"),
        (0.0, "0"),
        (-2.5, "-2.5"),
        (float("nan"), "NaN"),
        (float("-inf"), "-∞"),
    ],
)
def test_numbers_are_written_for_a_person(value, text):
    assert show(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (41.7, "42 s"),
        (59.7, "1 min 00 s"),
        (192, "3 min 12 s"),
        (18120, "5 h 02 min"),
    ],
)
def test_times_are_written_for_a_person(seconds, text):
    assert duration(seconds) == text
