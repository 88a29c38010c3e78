"""What commands print: lines, tables, and the device they run on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightshare.errors import UserError

if TYPE_CHECKING:
    import torch


def say(line: str) -> None:
    """One line on standard output, as it is."""
    from rich.console import Console

    Console(soft_wrap=True).print(line, markup=False, highlight=False)


def show_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of rows with the same keys; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        numeric = all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        table.add_column(str(name), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in rows[0]))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def device_of(name: str) -> "torch.device":
    """The torch device that ``--device`` names; ``auto`` is a GPU where there is one.

    Raises:
        UserError: the device does not exist here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is {name!r}, but torch sees no CUDA device; use cpu.")
    return device
