"""Tables are whole at any width, and only the first of several processes prints."""

import pytest

from weightshare.cli.console import say, show_table

ROWS = [
    {"model": "dense", "parameters": 2_440_320, "loss": 2.8654, "note": "as it [came]"},
    {"model": "last dropped", "parameters": 1_169_792, "loss": None, "note": "the plain way"},
]


@pytest.mark.parametrize("width", [30, 80, 200])
def test_no_cell_is_cut_at_any_width(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    show_table("held-out text", ROWS)
    shown = capsys.readouterr().out
    assert "…" not in shown
    for text in ("dense", "last dropped", "2,440,320", "2.8654", "as it [came]", "the plain way"):
        assert text in shown


def test_processes_behind_the_first_print_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    say("a line")
    show_table("held-out text", ROWS)
    assert capsys.readouterr().out == ""
