"""Numbers, times and names as a person reads them."""

import json
import math
from collections.abc import Mapping
from typing import Any


def show(value: float) -> str:
    """Write a number for a person: four significant digits, thousands separated."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3:
        return f"{value:.4g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits}×10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def short(value: float) -> str:
    """Write a number in at most five characters and a unit: ``134.5 M``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}\N{NO-BREAK SPACE}{unit}"
    return show(value)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def tell(value: Any) -> str:
    """Write any JSON value for a person."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return show(value)
    if isinstance(value, list):
        return ", ".join(map(tell, value)) if value else "none"
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def words(name: str) -> str:
    """Write a field's name as words."""
    return name.replace("_", " ").strip()


def duration(seconds: float) -> str:
    """Write a time for a person: ``0.8 s``, ``42 s``, ``3 min 12 s``, ``5 h 02 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"
