"""Write the figures of benchmarks/results/ into README.md and docs/ (``make tables``).

A page marks a place, and what stands between the marks is replaced:

    <!-- table: folding_rankings summary mean half_width regret -->
    <!-- end -->

The words are a results file, the object in it whose entries become rows, and the figures that
become columns (all of the first row where none is named). ``--check`` changes nothing and fails
if a page is out of date.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main() -> int:
    check, stale = "--check" in sys.argv, []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]:
        text = page.read_text(encoding="utf-8")
        new = MARK.sub(lambda m: m.group(1) + table(*m.group(2).split()) + m.group(4), text)
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


def table(name: str, part: str, *columns: str) -> str:
    """One results file as a Markdown table."""
    content = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text("utf-8"))
    rows: dict[str, dict[str, Any]] = content[part]
    if isinstance(rows, list):
        rows = {str(row.pop(next(iter(row)))): row for row in rows}
    columns = columns or tuple(next(iter(rows.values())))
    titles = [column.replace("_", " ") for column in columns]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(columns)]
    for row, figures in rows.items():
        lines.append(f"| {row} | " + " | ".join(cell(figures.get(c)) for c in columns) + " |")
    where = f"{content.get('device', '?')}, torch {content.get('torch', '?')}"
    return "\n".join([*lines, "", f"*`{content.get('command', '?')}` on {where}*", ""])


def cell(value: Any) -> str:
    """A figure as a person reads it: four digits, thousands separated."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
