"""What commands print: lines and tables."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def is_first() -> bool:
    """Whether this is the process that prints, of those that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """One line on standard output, as it is."""
    from rich.console import Console

    if not is_first():
        return
    Console(soft_wrap=True).print(line, markup=False, highlight=False)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """A line that moves while something long is done; yields what changes its text.

    Only on a terminal: nothing is left behind.
    """
    from rich.console import Console

    with Console(quiet=not is_first()).status(what) as status:
        yield status.update


def show_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of rows with the same keys, numbers to the right.

    Where the terminal is too narrow for it, each row becomes a block of lines instead.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not is_first():
        return
    console = Console()
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in rows[0]:
        numeric = all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        table.add_column(str(name), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in rows[0]))
    unbounded = console.options.update(max_width=10_000)
    if console.measure(table, options=unbounded).maximum <= console.width:
        console.print(table)
        return
    console.print(title, markup=False, highlight=False)
    for row in rows:
        first, *rest = rows[0]
        block = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        block.add_row(_cell(row.get(first)), style="bold")
        for name in rest:
            block.add_row(f"  {name}", _cell(row.get(name)))
        console.print(block)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value))
