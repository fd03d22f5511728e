"""A run made readable: pandas tables, plotly figures, and one self-contained report.html. Loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechunlearn.report import figures, tables
    from mechunlearn.report.html import write_report

__all__ = ["figures", "tables", "write_report"]


def __getattr__(name: str) -> object:
    """Import plotly and jinja2 only when a report is made (PEP 562)."""
    if name in ("figures", "tables"):
        return import_module(f"{__name__}.{name}")
    if name == "write_report":
        return import_module(f"{__name__}.html").write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
