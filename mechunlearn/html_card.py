"""How a noun shows itself in a notebook: a title, a few lines and a short table, all escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_LONGEST = 160


def html_card(title: str, lines: Mapping[str, object], table: Iterable[Sequence[object]] = ()) -> str:
    """HTML that Jupyter shows in place of the object's repr.

    Args:
        lines: label -> value; what is None or empty is left out, what is long is cut.
        table: its head, then its rows; floats are shown with three decimals.
    """
    shown = [f"<div><b>{escape(name)}</b>: {_text(v)}</div>" for name, v in lines.items() if v not in (None, "", ())]
    head, *rows = [list(row) for row in table] or [[]]
    cells = [_row("th", head)] if head else []
    cells += [_row("td", row) for row in rows]
    below = f"<table>{''.join(cells)}</table>" if cells else ""
    return f'<div><div style="font-size:1.1em"><b>{_text(title)}</b></div>{"".join(shown)}{below}</div>'


def _row(tag: str, cells: Sequence[object]) -> str:
    inner = "".join(f'<{tag} style="text-align:left">{_text(cell)}</{tag}>' for cell in cells)
    return f"<tr>{inner}</tr>"


def _text(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return escape(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")
