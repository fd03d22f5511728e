"""One self-contained report.html of a run: the verdict first, then what it rests on, the record last."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mechunlearn.files import whole_file
from mechunlearn.report import figures, sections, tables
from mechunlearn.report.cards import card_of, lead
from mechunlearn.report.comparisons import arm_comparison, recovery_table
from mechunlearn.report.facts import fact_data
from mechunlearn.report.maps import SUBLAYERS
from mechunlearn.report.numbers import null_name
from mechunlearn.report.printed import plain
from mechunlearn.runs import Run


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
    environment = Environment(
        loader=PackageLoader("mechunlearn.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    manifest = {key: value for key, value in run.manifest.items() if key not in ("settings", "summary")}
    facts = fact_data(tables.fact_table(run))
    return environment.get_template("report.html.j2").render(
        plotly_js=Markup(get_plotlyjs()),
        name=str(run.manifest.get("name", "run")),
        lead=lead(run),
        null=null_name(run),
        cards=[card_of(cell) for cell in run.cells],
        delta=run.cells[0].verdict.delta if run.cells else 0.1,
        verdicts=sections.verdicts(run),
        power=sections.power(run),
        attacks=sections.attacks(run),
        compression=sections.compression(run),
        recovery=plain(
            "Relearning step by step: recovered share along log steps (nAURC), and steps until facts are back",
            recovery_table(run),
        ),
        comparison=plain(
            "Arms compared by D of their strongest attack over the same facts; p corrected by Holm", arm_comparison(run)
        ),
        planned=plain(
            "Power with the hidden facts there were, in the worst case that was planned with: both models guess",
            pd.DataFrame(run.manifest.get("power", [])),
        ),
        arms=sections.arms(run),
        weights=sections.weights(run),
        agreement=sections.agreement(run),
        evaluation=sections.evaluation(run),
        summary=[str(line) for line in run.manifest.get("summary", ())],
        pictures=_pictures(run),
        facts=htmlsafe_json_dumps(facts, ensure_ascii=False, separators=(",", ":")) if facts["facts"] else "",
        facts_js=Markup(environment.loader.get_source(environment, "facts.js")[0]),  # pyright: ignore[reportOptionalMemberAccess]
        settings=_json(run.manifest.get("settings", {})),
        manifest=_json(manifest),
        options=_json(_options(run)),
        notes=_json({cell.name: dict(cell.notes) for cell in run.cells}),
    )


def _pictures(run: Run) -> dict[str, list[Markup]]:
    """Every figure of the report by section, as plotly's own HTML; figures without data are left out."""
    makers: dict[str, list[Callable[[], go.Figure]]] = {
        "verdict": [lambda: figures.shares(run)],
        "arms": [lambda: figures.damage(run), lambda: figures.weight_changes(run)],
        "where": [
            lambda: figures.localizer_profiles(run.scores, edited=_edited(run)),
            lambda: figures.localizer_agreement(run),
        ],
        "scores": list(_score_figures(run)),
        "curves": [lambda c=c: figures.relearning_curves(c) for c in run.cells],
        "probes": [
            lambda c=c, name=name: figures.probe_by_layer(c, attack=name)
            for c in run.cells
            for name in ("probing", "logit_lens")
        ],
    }
    return {
        section: [picture for i, make in enumerate(made) if (picture := _picture(make, f"{section}-{i}"))]
        for section, made in makers.items()
    }


def _edited(run: Run) -> dict[str, list[str]]:
    """What was edited on the word of each localizer."""
    found: dict[str, list[str]] = {}
    for cell in run.cells:
        if cell.localizer is not None:
            found.setdefault(cell.localizer, []).extend(cell.components)
    return found


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


def _options(run: Run) -> dict[str, Any]:
    """Options of every localizer and attack, as they were recorded with the results.

    An attack's options differ between cells (injected answers are dropped or not): each set of them is listed once,
    with the seeds, hidden parts and cells that it was used for.
    """
    attacks: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in run.cells:
        for result in cell.edited:
            options = dict(result.options)
            used = attacks.setdefault(result.attack, {}).setdefault(
                json.dumps(options, sort_keys=True, default=str),
                {"options": options, "seeds": [], "hidden parts": [], "cells": []},
            )
            for key, value in (("seeds", result.seed), ("hidden parts", result.fold), ("cells", cell.name)):
                if value not in used[key]:
                    used[key].append(value)
    return {
        "localize": {name: dict(scores.options) for name, scores in run.scores.items()},
        "attack": {name: list(sets.values()) for name, sets in attacks.items()},
    }


def _json(data: object) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, default=str)
