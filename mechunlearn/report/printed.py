"""Tables ready to print: each entry as words or a number, with its interval and n beside it in small print."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mechunlearn.report.numbers import MISSING
from mechunlearn.statistics import Interval


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table ready to print: every entry is (number or word, its interval and n or nothing)."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, str], ...], ...]


def plain(caption: str, frame: pd.DataFrame) -> Table:
    """A frame as it is."""
    rows = tuple(tuple(entry(value) for value in row) for row in frame.itertuples(index=False))
    return Table(caption=caption, columns=tuple(str(c).replace("_", " ") for c in frame.columns), rows=rows)


def spread(row: Mapping[Any, Any], key: str, *, lower: str = "", upper: str = "", n: int) -> tuple[str, str]:
    """A number of a row and its bounds, which stand beside it under `<key>_lower` and `<key>_upper` unless told."""
    bounds = row[lower or f"{key}_lower"], row[upper or f"{key}_upper"]
    return entry(Interval(value=row[key], lower=bounds[0], upper=bounds[1], n=n))


def entry(value: object) -> tuple[str, str]:
    """A table entry as (what it says, how sure): two digits for numbers, bounds and n in small print."""
    if isinstance(value, Interval):
        if math.isnan(value.value):
            return MISSING, ""
        bounds = "" if math.isnan(value.lower) else f"[{digits(value.lower)}, {digits(value.upper)}] n={value.n}"
        return digits(value.value), bounds
    if isinstance(value, float):
        return (MISSING if math.isnan(value) else f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"), ""
    return str(value), ""


def digits(value: float) -> str:
    """Two digits, and never -0.00."""
    return f"{round(value, 2) + 0.0:.2f}"


def percent(value: float) -> str:
    """A share in percent; a dash for NaN."""
    return MISSING if math.isnan(value) else f"{100 * value:.1f}%" if 0 < value < 0.1 else f"{100 * value:.0f}%"
