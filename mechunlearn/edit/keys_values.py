"""Texts that name the subjects of facts, and what MLPs' output projections read and write at the subjects' last tokens.

A subject has one key and one value: several facts of one subject share both, or they would overwrite each other.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechunlearn.activations import Place, hooked
from mechunlearn.edit.losses import Forms
from mechunlearn.facts import Fact
from mechunlearn.metrics import pad_right
from mechunlearn.models import Model, mlp_neurons
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import encode_answers, max_positions, render, token_roles


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text that names a subject: a prompt with its new answer, or one after which nothing should change."""

    subject: int
    """Number of the subject among those that are edited."""
    ids: tuple[int, ...]
    """All that is fed: of an answer of several tokens all but the last."""
    at: int
    """Position of the subject's last token."""
    targets: tuple[int, ...] = ()
    """The new answer, which the last of the ids and those before it should predict; empty: the text is to be kept."""


def rows_of(
    model: Model, facts: Sequence[Fact], retain: Sequence[Fact] = (), *,
    forms: Forms = "prompt", prefixes: int | Sequence[str] = 0, essence: Sequence[str] = (), seed: int = 0,
) -> list[Row]:  # fmt: skip
    """Texts of every subject: each fact bare and after each prefix, with `target_new`; and texts that are to be kept.

    Kept are the essence prompts of every subject, and the prompts of those facts of `retain` that are about a subject.

    Args:
        prefixes: texts, or so many sentences of neutral text, drawn with `seed`; those that make a text longer than the
            model's positions are passed over.
        essence: templates that hold the subject as one {}, such as "{} is a".

    Raises:
        ValueError: no facts, one without `target_new`, or an essence prompt without exactly one {}.
    """
    if not facts:
        raise ValueError("edit: got no facts to forget; give a split with some")
    if odd := [template for template in essence if template.count("{}") != 1]:
        raise ValueError(f"option 'essence': got {odd[0]!r}, allowed: exactly one '{{}}' for the subject")
    answers = encode_answers(model, map(_target, facts))
    numbers = {subject: i for i, subject in enumerate(dict.fromkeys(fact.subject for fact in facts))}
    before = ("", *(neutral_text(prefixes, seed, sentences=1) if isinstance(prefixes, int) else prefixes))
    longest = max_positions(model, 1 << 30)
    rows: list[Row] = []
    for fact in facts:
        answer, n_paraphrases = answers[_target(fact)], len(fact.paraphrases) if forms == "all" else 0
        for form in ("prompt", *(f"paraphrase:{i}" for i in range(n_paraphrases))):
            for prefix in before:
                row = _row(model, f"{prefix} {render(fact, form)}".strip(), fact.subject, numbers, answer)
                if not prefix or len(row.ids) < longest:
                    rows.append(row)
    rows += [_row(model, text.replace("{}", subject), subject, numbers) for subject in numbers for text in essence]
    return rows + [_row(model, render(f, "prompt"), f.subject, numbers) for f in retain if f.subject in numbers]


def _row(model: Model, text: str, subject: str, numbers: dict[str, int], answer: tuple[int, ...] = ()) -> Row:
    ids, roles = token_roles(model, text, subject)
    return Row(subject=numbers[subject], ids=(*ids, *answer[:-1]), at=roles.index("subject_last"), targets=answer)


def _target(fact: Fact) -> str:
    if fact.target_new is None:
        raise ValueError(f"fact {fact.key} has no target_new to inject; draw one with facts.with_edit_targets")
    return fact.target_new


def row_tensors(model: Model, rows: Sequence[Row]) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "2 row"]]:
    """Token ids padded on the right; and of each row its subject's last position and its subject's number."""
    where = torch.tensor([(row.at, row.subject) for row in rows], device=model.device)
    return pad_right(model, [row.ids for row in rows]), where.T


@contextmanager
def added_at_subjects(
    model: Model, layer: int, at: Int[Tensor, " row"], delta: Float[Tensor, "row d_model"]
) -> Iterator[None]:
    """Inside, `delta` is added to the output of a layer's MLP output projection at each row's position `at`."""

    def add(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[torch.arange(len(at), device=at.device), at] += delta.to(output.dtype)
        return changed

    handle = mlp_neurons(model, layer).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def means_at_subjects(
    model: Model, rows: Sequence[Row], places: Sequence[Place], *, batch_size: int,
    layer: int = 0, delta: Float[Tensor, "subject d_model"] | None = None,
) -> dict[Place, Float[Tensor, "subject width"]]:  # fmt: skip
    """Activations at each subject's last token, averaged over its texts with targets; in float64.

    Args:
        batch_size: texts in a forward pass.
        layer, delta: what is meanwhile added to the output of this layer's projection, if anything.
    """
    rows = sorted((row for row in rows if row.targets), key=lambda row: len(row.ids))  # little padding
    n_subjects = max(row.subject for row in rows) + 1
    count = torch.zeros(n_subjects, dtype=torch.float64, device=model.device)
    sums: dict[Place, Tensor] = {}
    with hooked(model, record=places) as seen:
        for start in range(0, len(rows), batch_size):
            ids, (at, subject) = row_tensors(model, rows[start : start + batch_size])
            with ExitStack() as stack:
                if delta is not None:
                    stack.enter_context(added_at_subjects(model, layer, at, delta[subject]))
                model.hf.base_model(ids, use_cache=False)  # no logits
            count.index_add_(0, subject, torch.ones_like(subject, dtype=torch.float64))
            for place in places:
                here = seen[place][torch.arange(len(at), device=at.device), at].double()
                empty = here.new_zeros(n_subjects, here.shape[1])
                sums[place] = sums.get(place, empty).index_add(0, subject, here)
    return {place: total / count[:, None] for place, total in sums.items()}
