"""One self-contained report.html of a run: the verdict first, then what it rests on, the record last."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mechunlearn.files import whole_file
from mechunlearn.report import figures, tables
from mechunlearn.report.maps import SUBLAYERS
from mechunlearn.runs import Cell, Run
from mechunlearn.statistics import Interval

EXPECTED = {
    "original": ("hidden", "The unedited model: nothing was forgotten, so the attacks must find it."),
    "suppressed": ("hidden", "The positive control: knowledge hidden on purpose, which the attacks must bring back."),
    "twin": ("removed", "The negative control: another model that never knew, in which there is nothing to find."),
}
"""What each control must come out as, and what it is for."""

HEADINGS = {
    "D": "D of the strongest attack",
    "P(true) before": "P(true), hidden facts",
    "twin before": "same, twin",
    "P(true) after": "P(true), attacked",
    "twin after": "same, twin attacked",
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table ready to print: every entry is (number or word, its interval and n or nothing)."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, str], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One cell's answer in words."""

    name: str
    label: str
    word: str
    purpose: str
    reason: str
    settle: str
    caveats: tuple[str, ...]
    as_expected: bool | None


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report of a run as one HTML file that needs nothing else, all or nothing.

    Everything that comes from models, settings and files is escaped; only plotly's own output is not.
    """
    text = render(run)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def render(run: Run) -> str:
    """The report as text."""
    # select_autoescape() would skip a name that ends in .j2
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("mechunlearn.report").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    arms, attacks = tables.arms_table(run), tables.attack_table(run)
    manifest = {key: value for key, value in run.manifest.items() if key not in ("settings", "summary")}
    return environment.from_string(source).render(
        plotly_js=Markup(get_plotlyjs()),
        name=str(run.manifest.get("name", "run")),
        lead=_lead(run),
        cards=[_card(cell) for cell in run.cells],
        delta=run.cells[0].verdict.delta if run.cells else 0.1,
        verdicts=_verdicts(run),
        attacks=_attacks(attacks),
        arms=_arms(arms),
        agreement=_plain("Localizers compared, by the components both score", run.agreement),
        evaluation=_evaluation(run),
        summary=[str(line) for line in run.manifest.get("summary", ())],
        pictures=_pictures(run),
        settings=_json(run.manifest.get("settings", {})),
        manifest=_json(manifest),
        options=_json(_options(run)),
        notes=_json({cell.name: dict(cell.notes) for cell in run.cells}),
    )


def _lead(run: Run) -> str:
    """Model, facts and date in one line."""
    manifest, parts = run.manifest, []
    for key in ("model", "twin", "facts"):
        value = manifest.get(key)
        name = value.get("name") if isinstance(value, Mapping) else value
        if name:
            parts.append(f"{key} {name}")
    facts = manifest.get("facts")
    sizes = facts.get("parts") if isinstance(facts, Mapping) else None
    if isinstance(sizes, Mapping) and "forget_hidden" in sizes:
        parts.append(f"{sizes['forget_hidden']} hidden facts")
    if "finished" in manifest:
        parts.append(str(manifest["finished"]))
    return " · ".join(parts)


def _card(cell: Cell) -> Card:
    verdict = cell.verdict
    expected, purpose = EXPECTED.get(cell.role, (None, ""))
    if cell.role == "arm":
        where = f"{len(cell.components)} parts, {100 * cell.share:.1f}% of the MLP and attention weights"
        purpose = f"An edit: {cell.editor or 'unknown editor'} where {cell.localizer or 'unknown'} points ({where})."
    return Card(
        name=cell.name,
        label=verdict.label,
        word=str(verdict),
        purpose=purpose,
        reason=verdict.reason,
        settle=verdict.settle or "",
        caveats=verdict.caveats,
        as_expected=None if expected is None else verdict.label == expected,
    )


def _pictures(run: Run) -> dict[str, list[Markup]]:
    """Every figure of the report by section, as plotly's own HTML; figures without data are left out."""
    makers: dict[str, list[Callable[[], go.Figure]]] = {
        "verdict": [lambda: figures.shares(run)],
        "arms": [lambda: figures.damage(run), lambda: figures.weight_changes(run)],
        "where": [lambda: figures.localizer_profiles(run), lambda: figures.localizer_agreement(run)],
        "scores": list(_score_figures(run)),
        "curves": [lambda c=c: figures.relearning_curves(c) for c in run.cells],
        "probes": [lambda c=c: figures.probe_by_layer(c) for c in run.cells],
    }
    return {
        section: [picture for i, make in enumerate(made) if (picture := _picture(make, f"{section}-{i}"))]
        for section, made in makers.items()
    }


def _score_figures(run: Run) -> Iterator[Callable[[], go.Figure]]:
    for scores in run.scores.values():
        if "curve" in scores.notes:
            yield lambda scores=scores: figures.probe_curve(scores.notes)
        if len(scores.roles) > 1 and any(c.kind in SUBLAYERS for c in scores.components):
            yield lambda scores=scores: figures.component_by_role(scores)
        if any(c.kind == "head" for c in scores.components):
            yield lambda scores=scores: figures.layer_by_head(scores)


def _picture(make: Callable[[], go.Figure], name: str) -> Markup | None:
    """Plotly's HTML of one figure; None where the run holds no data for it (figures say so by ValueError)."""
    try:
        figure = make()
    except ValueError:
        return None
    config = {
        "responsive": True,
        "displaylogo": False,
        "modeBarButtons": [["toImage", "resetScale2d"]],
    }
    inner = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config=config,
        div_id=f"figure-{name}",
        default_height=f"{figure.layout.height}px",  # pyright: ignore[reportAttributeAccessIssue] - plotly's fields are made at run time
    )
    title = figure.layout.title.text  # pyright: ignore[reportAttributeAccessIssue]
    # the title went through `theme.label`; jinja2 must not escape it a second time
    return Markup('<figure role="group" aria-label="{}">{}</figure>').format(Markup(title).striptags(), Markup(inner))


def _verdicts(run: Run) -> Table:
    frame = tables.verdict_table(run).rename(columns=HEADINGS).drop(columns="edited share", errors="ignore")
    frame["health"] = [_failed(cell) for cell in run.cells]  # why is said in the cards
    return _plain(
        "Every cell: verdict, strongest attack, and what was kept. In brackets 95% bounds over facts, n facts", frame
    )


def _failed(cell: Cell) -> str:
    return ", ".join(f"{row.name} failed" for row in cell.verdict.rows if not row.healthy) or tables.health(cell)


def _attacks(frame: pd.DataFrame) -> Table:
    columns = (
        "cell",
        "attack",
        "D",
        "P(true) before",
        "after",
        "twin before",
        "twin after",
        "chosen setting",
        "counts",
    )
    rows = []
    for row in frame.to_dict("records"):
        numbers = [
            _spread(row, key, n=row["n_facts"])
            for key in ("edited_before", "edited_after", "twin_before", "twin_after")
        ]
        share = _entry(Interval(value=row["D"], lower=row["lower"], upper=row["upper"], n=row["n_facts"]))
        setting = (row["setting"] or tables.MISSING, f"step {row['step']}" if row["step"] else "")
        counts = (row["note"] or "yes", f"access: {row['access']}" if row["access"] else "")
        rows.append(((row["cell"], ""), (row["attack"], ""), share, *numbers, setting, counts))
    caption = "Every attack: share D brought back, and mean P(true | candidates) on the hidden facts with 95% bounds"
    return Table(caption=caption, columns=columns, rows=tuple(rows))


def _arms(frame: pd.DataFrame) -> Table:
    asked = {"forgotten": "forgotten facts", "retained": "facts about others", "same_subject": "same subjects"}
    columns = (
        "cell",
        "localizer",
        "edited parts",
        "weights",
        *asked.values(),
        "edit succeeds",
        "KL, text (nats/token)",
    )
    rows = []
    for row in frame.to_dict("records"):
        numbers = [_spread(row, key, n=row[f"{key}_n"]) for key in (*asked, "edit_success")]
        weights = (
            (f"{row['n_selected']:,}", f"{100 * row['share']:.1f}%") if row["n_selected"] else (tables.MISSING, "")
        )
        start = (row["cell"], row["role"]), (row["localizer"] or tables.MISSING, row["editor"])
        rows.append((*start, (row["components"] or tables.MISSING, ""), weights, *numbers, _entry(row["kl_text"])))
    caption = "What was edited, and accuracy when just asked, with exact 95% bounds; arms stand beside their controls"
    return Table(caption=caption, columns=columns, rows=tuple(rows))


def _evaluation(run: Run) -> Table:
    rows = []
    for row in tables.evaluation_table(run).to_dict("records"):
        words = [(str(row[key]) or tables.MISSING, "") for key in ("cell", "part", "form", "metric")]
        rows.append((*words, _spread(row, "mean", lower="lower", upper="upper", n=row["n"])))
    return Table(
        caption="Every measured mean with its 95% interval over facts",
        columns=("cell", "part", "form", "metric", "mean"),
        rows=tuple(rows),
    )


def _plain(caption: str, frame: pd.DataFrame) -> Table:
    rows = tuple(tuple(_entry(value) for value in row) for row in frame.itertuples(index=False))
    return Table(caption=caption, columns=tuple(str(c).replace("_", " ") for c in frame.columns), rows=rows)


def _spread(row: Mapping[Any, Any], key: str, *, lower: str = "", upper: str = "", n: int) -> tuple[str, str]:
    bounds = row[lower or f"{key}_lower"], row[upper or f"{key}_upper"]
    return _entry(Interval(value=row[key], lower=bounds[0], upper=bounds[1], n=n))


def _entry(value: object) -> tuple[str, str]:
    """A table entry as (what it says, how sure): two digits for numbers, bounds and n in small print."""
    if isinstance(value, Interval):
        if math.isnan(value.value):
            return tables.MISSING, ""
        bounds = "" if math.isnan(value.lower) else f"[{_digits(value.lower)}, {_digits(value.upper)}] n={value.n}"
        return _digits(value.value), bounds
    if isinstance(value, float):
        return (tables.MISSING if math.isnan(value) else f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"), ""
    return str(value), ""


def _digits(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # never -0.00


def _options(run: Run) -> dict[str, Any]:
    """Options of every localizer and attack, as they were recorded with the results."""
    attacks = {result.attack: {**result.options, "seed": result.seed} for cell in run.cells for result in cell.edited}
    return {"localize": {name: dict(scores.options) for name, scores in run.scores.items()}, "attack": attacks}


def _json(data: object) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, default=str)
