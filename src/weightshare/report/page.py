"""The HTML page of a run, and one page for several: self-contained, no script, no network."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

import weightshare
from weightshare.report import figures, store
from weightshare.report.redaction import redact
from weightshare.report.svg import scoped, svg
from weightshare.report.wording import duration, is_number, short, show, tell, words

_STANDARD = {"command", "version", "seed", "seconds", "device", "finished", "stopped_by"}
_MOST_KEYS, _MOST_CURVES, _MOST_ROWS = 6, 8, 500


def write_report(path: Path) -> Path:
    """Write ``path / "report.html"`` from what the run directory ``path`` holds."""
    store.write_text(path / "report.html", render(path))
    return path / "report.html"


def render(path: Path) -> str:
    """Return the page of the run directory ``path``."""
    run = _section(path, "")
    return _page("run.html", title=run["title"], run=run)


def index(
    runs: Mapping[str, str | Path] | Sequence[str | Path],
    path: str | Path,
    *,
    title: str = "weightshare",
    text: str = "",
    rows: Sequence[Mapping[str, Any]] = (),
    caption: str = "",
) -> Path:
    """Write one page to ``path`` that shows several run directories, a section each.

    ``runs`` maps section titles to run directories, or lists directories (titled by command). Above
    the sections stand ``text`` (Markdown) and a table: ``rows``, or by default one line a run with
    its state, key figures and time. A directory without a run is listed as not run.
    """
    named = runs if isinstance(runs, Mapping) else {str(Path(run)): run for run in runs}
    sections = [
        _section(Path(run), f"r{number}-", title=name if isinstance(runs, Mapping) else "")
        for number, (name, run) in enumerate(named.items(), 1)
        if (Path(run) / "summary.json").exists()
    ]
    done = {section["folder"] for section in sections}
    missing = [name for name, run in named.items() if str(Path(run)) not in done]
    lines = [dict(row) for row in rows] or [_line(section) for section in sections]
    page = _page(
        "index.html",
        title=title,
        text=_markdown(redact(text)),
        table=_table(redact(store.plain(lines)), caption),
        sections=sections,
        missing=missing,
    )
    store.write_text(Path(path), page)
    return Path(path)


def _page(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("weightshare.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = tell
    page = environment.get_template(template).render(version=weightshare.__version__, **values)
    return page.rstrip() + "\n"


def _section(path: Path, prefix: str, title: str = "") -> dict[str, Any]:
    """Gather everything a page says about one run; ``prefix`` keeps identifiers apart."""
    summary = store.read_json(path / "summary.json")
    contents = store.read_json(path / "contents.json") if (path / "contents.json").exists() else []
    environment = path / "environment.json"
    machine = store.read_json(environment) if environment.exists() else {}
    config = path / "config.yaml"
    return {
        "id": prefix.rstrip("-") or "run",
        "title": title or f"weightshare {summary['command']}",
        "folder": str(path),
        "summary": summary,
        "seconds": duration(summary["seconds"]["total"]),
        "keys": _keys(contents, summary),
        "blocks": [_block(path, entry, prefix) for entry in contents if entry["kind"] != "key"],
        "curves": _curves(store.read_lines(path / "metrics.jsonl"), prefix),
        "values": _flat({k: v for k, v in summary.items() if k not in _STANDARD}),
        "config": config.read_text(encoding="utf-8") if config.exists() else "",
        "command_line": shlex.join(machine.pop("command_line", [])),
        "environment": _flat(machine),
    }


def _keys(
    contents: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[dict[str, Any]]:
    chosen = [
        {"label": entry["name"], "value": entry["value"], "note": entry["note"]}
        for entry in contents
        if entry["kind"] == "key"
    ]
    if not chosen:
        results = {name: value for name, value in summary.items() if name not in _STANDARD}
        chosen = _pairs(results)[:_MOST_KEYS]
    for key in chosen:
        number = is_number(key["value"])
        key["exact"] = show(key["value"]) if number else ""
        key["value"] = short(key["value"]) if number else tell(key["value"])
    return chosen


def _pairs(values: Mapping[str, Any], name: str = "") -> list[dict[str, Any]]:
    """Numbers of a summary as key figures; an "after" stands with its "before"."""
    found: list[dict[str, Any]] = []
    for part, value in values.items():
        label = f"{name} {words(part)}".strip()
        if isinstance(value, Mapping):
            found += _pairs(value, label)
        elif is_number(value) and not (part == "before" and "after" in values):
            if part == "after" and is_number(values.get("before")):
                note = f"{short(values['before'])} before"
                found.append({"label": name, "value": value, "note": note})
            else:
                found.append({"label": label, "value": value, "note": ""})
    return found


def _block(path: Path, entry: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    kind, name = entry["kind"], entry["name"]
    if kind == "figure":
        drawing = (path / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        return {
            "kind": "figure",
            "svg": Markup(scoped(drawing, f"{prefix}{name}-", entry["caption"])),
            "caption": entry["caption"],
            "wide": entry["wide"],
        }
    if kind == "table":
        table = store.read_json(path / "tables" / f"{name}.json")
        return {"kind": "table", **_table(table["rows"], table["caption"] or words(name))}
    text = store.read_json(path / "texts" / f"{name}.json")
    content = text["content"]
    samples = content if isinstance(content, list) else []
    prose = _markdown(content) if isinstance(content, str) else Markup()
    return {"kind": "text", "title": text["title"], "prose": prose, "samples": samples}


def _table(rows: Sequence[Mapping[str, Any]], caption: str) -> dict[str, Any]:
    shown = rows[:_MOST_ROWS]
    names = list(dict.fromkeys(name for row in shown for name in row))
    cells = {name: _column([row.get(name, "") for row in shown]) for name in names}
    return {
        "caption": caption,
        "columns": [{"name": words(name), "kind": _kind(*cells[name])} for name in names],
        "rows": [[cells[name][0][number] for name in names] for number in range(len(shown))],
        "left_out": len(rows) - len(shown),
    }


def _column(values: Sequence[Any]) -> tuple[list[str], bool]:
    """Format a column: numbers get the same count of decimals, so that they line up."""
    numbers = [v for v in values if is_number(v)]
    blank = [v for v in values if v is None or v in ("", "NaN", "Infinity", "-Infinity")]
    if not numbers or len(numbers) + len(blank) < len(values):
        return [tell(value) for value in values], False
    sizes = [abs(v) for v in numbers if v]
    spread = max(sizes) / min(sizes) if sizes else 1.0
    if all(isinstance(v, int) for v in numbers) or spread > 1e5 or max(sizes, default=1) < 1e-3:
        return [tell(value) for value in values], True
    decimals = min(max(3 - math.floor(math.log10(max(sizes, default=1))), 0), 6)
    return [f"{value:,.{decimals}f}" if is_number(value) else tell(value) for value in values], True


def _kind(cells: Sequence[str], number: bool) -> str:
    """Say how a column sets its cells: numbers to the right, short words unbroken, prose roomy."""
    longest = max(map(len, cells), default=0)
    return "number" if number else "short" if longest <= 20 else "long" if longest > 40 else ""


def _curves(metrics: Sequence[Mapping[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Draw each logged scalar over the steps."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name != "step" and is_number(value):
                xs, ys = series.setdefault(name, ([], []))
                xs.append(row["step"])
                ys.append(value)
    drawn: list[dict[str, Any]] = []
    for name, (xs, ys) in series.items():
        if len(xs) > 2 and len(drawn) < _MOST_CURVES:
            figure = figures.lines({name: (xs, ys)}, x="step", size=(5.6, 2.7))
            drawing = scoped(svg(figure), f"{prefix}curve{len(drawn)}-", name)
            drawn.append({"name": words(name), "svg": Markup(drawing)})
    return drawn


def _line(section: Mapping[str, Any]) -> dict[str, Any]:
    summary = section["summary"]
    keys = "; ".join(f"{key['label']} {key['value']}" for key in section["keys"])
    state = "finished" if summary["finished"] else "unfinished"
    return {"run": section["title"], "state": state, "result": keys, "time": section["seconds"]}


def _markdown(text: str) -> Markup:
    # Raw HTML stays text; images are off because the page must not reach for the network.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    return Markup(parser.render(text))


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [
            pair
            for key, item in value.items()
            for pair in _flat(item, f"{name}.{key}" if name else str(key))
        ]
    return [(name, tell(value))] if name else []
