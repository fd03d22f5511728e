"""Keys and values of facts at their subjects' last tokens: what an MLP's output projection reads there, and should write.

A *subject* has one key and one value: several facts of one subject share them, or they would overwrite each other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechunlearn.activations import Place, exact, hooked
from mechunlearn.edit.losses import Forms
from mechunlearn.facts import Fact
from mechunlearn.metrics import pad_right
from mechunlearn.models import Model, mlp_neurons
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import encode_answers, max_positions, render, token_roles


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text that names a subject, and the positions after which the model's predictions matter."""

    subject: int
    """Number of the subject among those to be edited."""
    ids: tuple[int, ...]
    at: int
    """Position of the subject's last token."""
    targets: tuple[tuple[int, int], ...] = ()
    """(position, token that should follow it); empty for a text that is to be kept."""
    kept: int | None = None
    """The position after which nothing should change."""


@dataclass(frozen=True, kw_only=True)
class ValueSearch:
    """How a value is searched; the editors' options of these names say what each is."""

    steps: int
    learning_rate: float
    kl_weight: float
    weight_decay: float
    clamp_norm: float
    stop_loss: float
    batch_size: int


def prefixes_of(prefixes: int | Sequence[str], seed: int) -> tuple[str, ...]:
    """What is put before a prompt: nothing, and then the given texts, or so many sentences of neutral text."""
    drawn = neutral_text(prefixes, seed, sentences=1) if isinstance(prefixes, int) else prefixes
    return ("", *drawn)


def rows_of(
    model: Model, facts: Sequence[Fact], retain: Sequence[Fact] = (), *,
    prefixes: Sequence[str] = ("",), forms: Forms = "prompt", essence: Sequence[str] = (),
) -> list[Row]:  # fmt: skip
    """Texts of every subject: each fact in its prompt after each prefix, with `target_new`; and what is to be kept.

    Kept are the essence prompts of each subject, and the prompts of those facts of `retain` that are about one of the
    subjects. Texts longer than the model's positions are left out, unless there is no prefix.

    Raises:
        ValueError: no facts, or one without `target_new`, or an essence prompt without exactly one {}.
    """
    if not facts:
        raise ValueError("edit: got no facts to forget; give a split with some")
    if odd := [template for template in essence if template.count("{}") != 1]:
        raise ValueError(f"option 'essence': got {odd[0]!r}, allowed: exactly one '{{}}' for the subject")
    answers = encode_answers(model, (_target(fact) for fact in facts))
    numbers = {subject: i for i, subject in enumerate(dict.fromkeys(fact.subject for fact in facts))}
    longest = max_positions(model, 1 << 30)
    rows: list[Row] = []
    for fact in facts:
        answer, n_paraphrases = answers[_target(fact)], len(fact.paraphrases) if forms == "all" else 0
        for form in ("prompt", *(f"paraphrase:{i}" for i in range(n_paraphrases))):
            for prefix in prefixes:
                ids, at = _tokens(model, f"{prefix} {render(fact, form)}".strip(), fact.subject)
                if prefix and len(ids) + len(answer) > longest:
                    continue
                targets = tuple((len(ids) - 1 + i, token) for i, token in enumerate(answer))
                rows.append(Row(subject=numbers[fact.subject], ids=(*ids, *answer[:-1]), at=at, targets=targets))
    texts = [(subject, template.replace("{}", subject)) for subject in numbers for template in essence]
    texts += [(fact.subject, render(fact, "prompt")) for fact in retain if fact.subject in numbers]
    for subject, text in texts:
        ids, at = _tokens(model, text, subject)
        rows.append(Row(subject=numbers[subject], ids=ids, at=at, kept=len(ids) - 1))
    return rows


def _target(fact: Fact) -> str:
    if fact.target_new is None:
        raise ValueError(f"fact {fact.key} has no target_new to inject; draw one with facts.with_edit_targets")
    return fact.target_new


def _tokens(model: Model, text: str, subject: str) -> tuple[tuple[int, ...], int]:
    ids, roles = token_roles(model, text, subject)
    return tuple(ids), roles.index("subject_last")


@contextmanager
def added_at_subjects(
    model: Model, layer: int, at: Int[Tensor, " row"], delta: Float[Tensor, "row d_model"]
) -> Iterator[None]:
    """Inside, the output of a layer's MLP output projection has `delta` added at each row's position `at`."""

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
    """Activations at the subjects' last tokens, averaged over the rows with targets of each subject; in float64.

    Args:
        layer, delta: what is added to the output of this layer's projection at these tokens, if anything.
    """
    rows = [row for row in rows if row.targets]
    n_subjects = max(row.subject for row in rows) + 1
    count = torch.bincount(torch.tensor([row.subject for row in rows]), minlength=n_subjects).to(model.device)
    sums: dict[Place, Tensor] = {}
    with hooked(model, record=places) as seen:
        for batch in _chunks(rows, batch_size):
            ids, at, subject = _tensors(model, batch)
            with ExitStack() as stack:
                if delta is not None:
                    stack.enter_context(added_at_subjects(model, layer, at, delta[subject]))
                model.hf.base_model(ids, use_cache=False)
            for place in places:
                here = seen[place][torch.arange(len(at), device=at.device), at].double()
                empty = here.new_zeros(n_subjects, here.shape[1])
                sums[place] = sums.get(place, empty).index_add(0, subject, here)
    return {place: total / count[:, None] for place, total in sums.items()}


def search_values(
    model: Model, rows: Sequence[Row], layer: int, norms: Float[Tensor, " subject"], search: ValueSearch
) -> tuple[Float[Tensor, "subject d_model"], Float[Tensor, "step subject"]]:
    """What to add to the output of a layer's projection at each subject's last token, to make `target_new` likely.

    Minimises for each subject, by Adam from 0, over its delta (its own rows only, so that batches change nothing):
        mean over its texts of -log P(target_new | text)
      + kl_weight * mean over its kept texts of KL(changed || unchanged) of the next token
      + weight_decay * (|delta| / norm)^2,   with |delta| <= clamp_norm * norm after each step.

    A subject whose loss has fallen below `stop_loss` stays as it is. Call inside `untouched`.

    Returns:
        The deltas, in float32, and the loss before each step, nats; of a subject that has stopped the last one.

    Raises:
        ValueError: a loss that is not finite.
    """
    delta = torch.zeros(len(norms), model.d_model, device=model.device)
    losses = torch.zeros(search.steps, len(norms), device=model.device)
    of: list[list[Row]] = [[] for _ in norms]
    for row in rows:
        of[row.subject].append(row)
    for subjects in _groups([len(group) for group in of], search.batch_size):
        chosen = torch.tensor(subjects, device=model.device)
        here = [(number, row) for number, subject in enumerate(subjects) for row in of[subject]]
        delta[chosen], losses[:, chosen] = _search(model, here, layer, norms[chosen].float(), search)
    return delta, losses


def _search(
    model: Model, rows: Sequence[tuple[int, Row]], layer: int, norms: Tensor, search: ValueSearch
) -> tuple[Tensor, Tensor]:
    loss_of = _losses(model, rows, layer, norms, search)
    delta = torch.zeros(len(norms), model.d_model, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=search.learning_rate / model.d_model**0.5)
    history: list[Tensor] = []
    for step in range(search.steps):
        with torch.enable_grad():
            losses = loss_of(delta * norms[:, None])
            (delta.grad,) = torch.autograd.grad(losses.sum(), delta)
        losses = losses.detach()
        if not bool(losses.isfinite().all()):
            raise ValueError(f"values: the loss is not finite at step {step + 1}; lower the learning_rate")
        history.append(losses)
        before, done = delta.detach().clone(), losses < search.stop_loss
        optimizer.step()
        with torch.no_grad():
            delta.mul_((search.clamp_norm / delta.norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None])
            delta.copy_(torch.where(done[:, None], before, delta))
        if bool(done.all()):
            break
    history += history[-1:] * (search.steps - len(history))
    return delta.detach() * norms[:, None], torch.stack(history) if history else norms.new_zeros(0, len(norms))


def _losses(
    model: Model, rows: Sequence[tuple[int, Row]], layer: int, norms: Tensor, search: ValueSearch
) -> Callable[[Tensor], Tensor]:
    """The loss of every subject as a function of the deltas; all rows are one forward pass."""
    ids, at, _ = _tensors(model, [row for _, row in rows])
    subject = torch.tensor([number for number, _ in rows], device=model.device)
    asked = [(i, *target) for i, (_, row) in enumerate(rows) for target in row.targets]
    kept = [(i, row.kept) for i, (_, row) in enumerate(rows) if row.kept is not None]
    row, place, token = torch.tensor(asked, device=model.device).T
    kept_row, kept_place = torch.tensor(kept, dtype=torch.long, device=model.device).reshape(-1, 2).T
    keep = torch.unique(torch.cat([place, kept_place]))
    where, kept_where = torch.searchsorted(keep, place.contiguous()), torch.searchsorted(keep, kept_place.contiguous())

    def per_subject(values: Tensor, of: Tensor, n: Tensor) -> Tensor:
        return torch.zeros_like(norms).index_add(0, of, values) / n.clamp_min(1)

    def log_probs(delta: Tensor) -> tuple[Tensor, Tensor]:
        with added_at_subjects(model, layer, at, delta[subject]):
            logits = model.hf(ids, use_cache=False, logits_to_keep=keep).logits
        asks, keeps = logits[row, where], logits[kept_row, kept_where]
        return exact(asks).log_softmax(-1).gather(-1, token[:, None])[:, 0], exact(keeps).log_softmax(-1)

    n_asked = torch.bincount(subject[torch.unique(row)], minlength=len(norms))
    n_kept = torch.bincount(subject[kept_row], minlength=len(norms))
    with torch.no_grad():
        _, unchanged = log_probs(norms.new_zeros(len(norms), model.d_model))

    def losses(delta: Tensor) -> Tensor:
        answers, now = log_probs(delta)
        divergence = (now.exp() * (now - unchanged)).sum(-1)
        size = (delta.square().sum(1) / norms.square().clamp_min(1e-30))
        return (
            per_subject(-answers.float(), subject[row], n_asked)
            + search.kl_weight * per_subject(divergence.float(), subject[kept_row], n_kept)
            + search.weight_decay * size
        )  # fmt: skip

    return losses


def _tensors(model: Model, rows: Sequence[Row]) -> tuple[Int[Tensor, "row pos"], Int[Tensor, " row"], Tensor]:
    """Token ids padded on the right, positions of the subjects' last tokens, numbers of the subjects."""
    at, subject = torch.tensor([(row.at, row.subject) for row in rows], device=model.device).T
    return pad_right([row.ids for row in rows], model.device), at, subject


def _chunks(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    ordered = sorted(rows, key=lambda row: len(row.ids))  # little padding
    return (ordered[i : i + size] for i in range(0, len(ordered), size))


def _groups(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Consecutive numbers whose sizes add up to the limit at most; one alone may exceed it."""
    group: list[int] = []
    for number, size in enumerate(sizes):
        if group and sum(sizes[i] for i in group) + size > limit:
            yield group
            group = []
        group.append(number)
    if group:
        yield group
