"""The page is self-contained, safe, and says what was measured."""

import re
from html.parser import HTMLParser

import pytest

from weightshare.report import Run, figures, index, render
from weightshare.report.page import _column

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}"


class Page(HTMLParser):
    """Tags with their attributes, and the check that every tag is closed by its own."""

    VOID = {"meta", "link", "br", "hr", "img", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def fill(run: Run, word: str = "plain") -> None:
    for step in range(4):
        run.log(step, loss=1 / (step + 1), skipped=float("nan"))
    run.figure("curve", figures.lines({word: ([0, 1], [1, 2])}), caption=word)
    run.figure("other", figures.lines({word: ([0, 1], [1, 2])}), caption=word)
    run.rows("people", [{"who": word, "share": 0.25, "count": 1234567}], caption=word)
    run.text("claim", word, f"{word} **bold** [x](javascript:alert(1)) ![y](http://e.org/p.png)")
    run.text("samples", word, [{"prompt": word, "before": "\n  two\n", "after": word}])
    run.key(word, word, note=word)
    run.summary(note=word, nested={word: 1})


def make(path, word="plain", command="fold") -> str:
    with Run.open(path, {"note": word, "seed": 1}, command=command) as run:
        fill(run, word)
    return (path / "report.html").read_text(encoding="utf-8")


def test_hostile_text_stays_text_everywhere(tmp_path):
    page = Page(make(tmp_path, HOSTILE))
    assert {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "link"} == set()
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not [a for _, a in page.tags if "javascript" in (a.get("href") or "")]
    assert page.text.count("{{ 7*7 }}") > 8


def test_the_page_reaches_for_nothing_outside(tmp_path):
    text = make(tmp_path)
    page = Page(text)
    for tag, attrs in page.tags:
        if tag != "a":  # a link waits for a click
            for name in ("src", "href", "xlink:href"):
                assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert any("default-src 'none'" in (attrs.get("content") or "") for _, attrs in page.tags)


def test_identifiers_are_unique_on_a_page_of_several_runs(tmp_path):
    for name in ("a", "b"):
        make(tmp_path / name)
    index({"A": tmp_path / "a", "B": tmp_path / "b"}, tmp_path / "all.html")
    page = Page((tmp_path / "all.html").read_text(encoding="utf-8"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 2
    targets = [a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"].startswith("#")]
    assert targets == ["r1", "r2"]
    assert set(targets) <= set(ids)


def test_an_index_lists_missing_and_unfinished_runs_as_such(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(ValueError), Run.open(tmp_path / "b", {}, command="tune"):
        raise ValueError
    path = index([tmp_path / "a", tmp_path / "b", tmp_path / "c"], tmp_path / "all.html")
    text = Page(path.read_text(encoding="utf-8")).text
    assert f"{tmp_path / 'c'} (not run)" in text
    assert "stopped by ValueError" in text
    assert "weightshare tune" in text


def test_an_index_shows_the_rows_it_is_given_and_escapes_them(tmp_path):
    make(tmp_path / "a")
    rows = [{"system": HOSTILE, "saved": 0.36}]
    path = index({HOSTILE: tmp_path / "a"}, tmp_path / "x.html", title=HOSTILE, rows=rows)
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "0.3600" in page.text


def test_the_page_is_the_same_each_time_but_for_the_time(tmp_path):
    texts = {re.sub(r"\d+\.\d s\b", "T", make(tmp_path / name)) for name in ("a", "b")}
    assert len(texts) == 1
    assert render(tmp_path / "a") == (tmp_path / "a" / "report.html").read_text(encoding="utf-8")


def test_numbers_stand_right_and_line_up(tmp_path):
    text = make(tmp_path)
    assert '<th scope="col" class="number">share</th>' in text
    assert '<td class="number">1,234,567</td>' in text
    assert _column([0.5, 12.25, None, "NaN"]) == (["0.50", "12.25", "–", "NaN"], True)
    assert _column([1e-7, 1.0]) == (["1.00×10⁻⁷", "1"], True)
    assert _column([3, 1200]) == (["3", "1,200"], True)
    assert _column(["a", 1]) == (["a", "1"], False)
    assert _column([True, False]) == (["yes", "no"], False)


def test_key_figures_come_from_the_summary_when_none_are_chosen(tmp_path):
    with Run.open(tmp_path, {}) as run:
        run.summary(parameters={"before": 134515008, "after": 86400000}, loss=2.5, name="x")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<dd title="86,400,000">86.4\N{NO-BREAK SPACE}M</dd>' in text
    assert "134.5\N{NO-BREAK SPACE}M before" in text
    assert text.count("<dt>parameters</dt>") == 1


def test_a_piece_shown_again_keeps_its_place(tmp_path):
    with Run.open(tmp_path, {}) as run:
        run.rows("a", [{"x": "old"}])
        run.rows("b", [{"x": "between"}])
        run.rows("a", [{"x": "new"}])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "old" not in text
    assert text.index("new") < text.index("between")


def test_very_long_tables_say_what_they_leave_out(tmp_path):
    with Run.open(tmp_path, {}) as run:
        run.rows("a", [{"x": i} for i in range(1700)])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1,200 more rows" in text


def test_metrics_become_curves_and_those_without_numbers_do_not(tmp_path):
    text = make(tmp_path)
    assert "Metrics by step" in text
    assert 'aria-label="loss"' in text
    assert 'aria-label="skipped"' not in text
