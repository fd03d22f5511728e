"""The answer in words: one card a cell, and the line that says what was run."""

from collections.abc import Mapping
from dataclasses import dataclass

from mechunlearn.report.numbers import null_name
from mechunlearn.runs import Cell, Run

EXPECTED = {
    "original": ("hidden", "The unedited model: nothing was forgotten, so the attacks must find it."),
    "suppressed": ("hidden", "A positive control: knowledge hidden on purpose, which the attacks must bring back."),
    "twin": ("removed", "The negative control: another model that never knew, in which there is nothing to find."),
}
"""What each control must come out as, and what it is for."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One cell's answer in words."""

    name: str
    label: str
    word: str
    purpose: str
    reason: str
    settle: str
    null: str
    """What the cell was compared with."""
    caveats: tuple[str, ...]
    as_expected: bool | None


def card_of(cell: Cell) -> Card:
    """A cell's verdict, what the cell is for, and whether a control came out as it should."""
    verdict = cell.verdict
    expected, purpose = EXPECTED.get(cell.role, (None, ""))
    if cell.role == "arm" and cell.editor and not cell.n_selected:
        off = ", and comes off whole" if cell.notes.get("comes_off") else ""
        purpose = f"A change of activations: {cell.editor}; it edits no weight{off}."
    elif cell.role == "arm" and cell.editor:
        where = f"{len(cell.components)} parts, {100 * cell.share:.1f}% of the MLP and attention weights"
        how = f"where {cell.localizer} points" if cell.localizer else "of chosen parts"
        purpose = f"An edit: {cell.editor} {how} ({where})."
    elif cell.role == "arm":
        purpose = f"A checkpoint as another tool left it; {len(cell.components)} parts differ from the original."
    if cell.role == "suppressed" and (refused := _refused(cell)):
        expected, purpose = None, f"Refused as a positive control ({refused}): it shows no attack's power."
    return Card(
        name=cell.name,
        label=verdict.label,
        word=str(verdict),
        purpose=purpose,
        reason=verdict.reason,
        settle=verdict.settle or "",
        null=null_words(cell),
        caveats=verdict.caveats,
        as_expected=_as_expected(cell, expected),
    )


def _as_expected(cell: Cell, expected: str | None) -> bool | None:
    """None where nothing is expected, or where a model that never knew is only not proven to be one."""
    label = cell.verdict.label
    if expected is None or (expected == "removed" and label == "inconclusive"):
        return None
    return label == expected


def _refused(cell: Cell) -> str:
    """Why a suppressed model was not accepted; empty if it was, or if a run kept no word of it."""
    acceptance, control = cell.notes.get("acceptance", {}), cell.notes.get("control", {})
    if control.get("accepted", True):
        return ""
    return acceptance.get("reason") or "not suppressed, and only suppressed, under every seed"


def null_words(cell: Cell) -> str:
    """What a cell was compared with, in words."""
    treated = {"suppressed": "suppressed and ", "arm": "edited and " if cell.editor else ""}
    how = f"{treated.get(cell.role, '')}attacked alike"
    if null_name(cell) == "twin":
        return f"the {'other ' if cell.role == 'twin' else ''}twin, {how}"
    return f"made-up facts that nobody can know, asked of the same model, {how}; no twin"


def lead(run: Run) -> str:
    """Model, facts, seeds and date in one line."""
    manifest, parts = run.manifest, []
    for key in ("model", "twin", "facts"):
        value = manifest.get(key)
        name = value.get("name") if isinstance(value, Mapping) else value
        if name:
            parts.append(f"{key} {name}")
    facts = manifest.get("facts")
    if isinstance(facts, Mapping):
        hidden = facts.get("hidden", facts.get("parts", {}).get("forget_hidden"))  # the first part alone, once
        parts += [] if hidden is None else [f"{hidden} hidden facts"]
    settings = manifest.get("settings")
    seeds = settings.get("seeds", 1) if isinstance(settings, Mapping) else 1
    parts += [f"{seeds} seeds"] if seeds > 1 else []
    if "finished" in manifest:
        parts.append(str(manifest["finished"]))
    return " · ".join(parts)
