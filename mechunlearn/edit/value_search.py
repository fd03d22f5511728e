"""Values by gradient: what an MLP should write at a subject's last token for `target_new` to follow."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Place, exact
from mechunlearn.edit.keys_values import Row, added_at_subjects, means_at_subjects, row_tensors
from mechunlearn.edit.projections import Projections
from mechunlearn.models import Model

STOP_LOSS = 0.05
"""Nats, as in the source's code: a value that is good enough is not made longer."""


@dataclass(frozen=True, kw_only=True)
class ValueSearch:
    """How values are searched (see `search_values`); the editors' options of the same names."""

    steps: int
    learning_rate: float
    kl_weight: float
    weight_decay: float
    clamp_norm: float
    batch_size: int


def found_values(
    model: Model, weights: Projections, layer: int, rows: Sequence[Row], search: ValueSearch
) -> tuple[Float[Tensor, "subject d_mlp"], Float[Tensor, "subject d_model"], Float[Tensor, "step subject"]]:
    """The subjects' keys at a layer, what is missing of their values there, and the losses of the search for it.

    Values are measured by the length of the stream after the layer; where a norm follows the projection (Gemma), by
    what of the projection's output makes so much at the norm's present gain. All are means over the texts with targets.
    """
    places: list[Place] = [("neuron", layer), ("mlp", layer), ("block", layer)]
    keys, writes, stream = means_at_subjects(model, rows, places, batch_size=search.batch_size).values()
    gain = weights.outputs(layer, keys).norm(dim=1) / writes.norm(dim=1)
    deltas, losses = search_values(model, rows, layer, stream.norm(dim=1) * gain, search)
    return keys, deltas.double(), losses


def search_values(
    model: Model, rows: Sequence[Row], layer: int, norms: Float[Tensor, " subject"], search: ValueSearch
) -> tuple[Float[Tensor, "subject d_model"], Float[Tensor, "step subject"]]:
    """What to add to a layer's projection's output at each subject's last token, so that `target_new` becomes likely.

    For each subject, Adam takes d = delta / norm from 0 to a small value of
        mean over its texts of -log P(target_new | text)
      + kl_weight * mean over its kept texts of KL(changed || unchanged) of the next token
      + weight_decay * |d|^2,   with |d| <= clamp_norm after every step.
    No loss holds anything of another subject's, so values do not depend on the batches. A subject whose loss is below
    `STOP_LOSS` stays as it is. Call inside `untouched`.

    Returns:
        The deltas, in float32; and the losses before each step, in nats (of a subject that has stopped: its last one).

    Raises:
        ValueError: a loss that is not finite, or a layer after which no answer depends on the subject's last token.
    """
    deltas = torch.zeros(len(norms), model.d_model, device=model.device)
    losses = torch.zeros(search.steps, len(norms), device=model.device)
    by_subject: list[list[Row]] = [[] for _ in norms]
    for row in rows:
        if row.targets or search.kl_weight:
            by_subject[row.subject].append(row)
    for subjects in _groups([len(group) for group in by_subject], search.batch_size):
        here = torch.tensor(subjects, device=model.device)
        batch = [replace(row, subject=i) for i, subject in enumerate(subjects) for row in by_subject[subject]]
        deltas[here], losses[:, here] = _search(model, batch, layer, norms[here].float(), search)
    return deltas, losses


def _search(model: Model, rows: Sequence[Row], layer: int, norms: Tensor, search: ValueSearch) -> tuple[Tensor, Tensor]:
    """The deltas of some subjects and the losses [step subject]; rows of those that have stopped are not run again."""
    scaled = torch.zeros(len(norms), model.d_model, device=model.device, requires_grad=True)
    # Adam moves every entry by about its rate, so delta by about learning_rate * norm
    optimizer = torch.optim.Adam([scaled], lr=search.learning_rate / model.d_model**0.5)
    with torch.no_grad():
        kept = [row for row in rows if not row.targets]
        unchanged = dict(zip(kept, _predictions(model, kept, layer, scaled)[1], strict=True)) if kept else {}
    losses, running = torch.zeros_like(norms), torch.ones_like(norms, dtype=torch.bool)
    history = torch.zeros(search.steps, len(norms), device=model.device)
    for step in range(search.steps):
        left = set(running.nonzero()[:, 0].tolist())
        if not left:
            history[step:] = losses
            break
        with torch.enable_grad():
            batch = [row for row in rows if row.subject in left]
            found = _losses(model, batch, layer, scaled, norms, unchanged, search)
            (scaled.grad,) = torch.autograd.grad(found.sum(), scaled)
        if not step and not bool(scaled.grad.any()):
            raise ValueError(
                f"values: got layer {layer}, after which nothing reads the subjects' last tokens; select an earlier MLP"
            )
        losses = history[step] = torch.where(running, found.detach(), losses)
        if not bool(losses.isfinite().all()):
            raise ValueError(f"values: a loss is not finite at step {step + 1}; lower the learning_rate")
        running = running & (losses >= STOP_LOSS)
        before = scaled.detach().clone()
        optimizer.step()
        with torch.no_grad():
            scaled.mul_((search.clamp_norm / scaled.norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None])
            scaled.copy_(torch.where(running[:, None], scaled, before))
    return scaled.detach() * norms[:, None], history


def _losses(
    model: Model, rows: Sequence[Row], layer: int, scaled: Tensor, norms: Tensor, unchanged: Mapping[Row, Tensor],
    search: ValueSearch,
) -> Float[Tensor, " subject"]:  # fmt: skip
    """The loss of every subject that has rows; of the others the weight decay alone."""

    def mean_by_subject(of: Sequence[Row], values: Tensor) -> Tensor:
        subject = torch.tensor([row.subject for row in of], device=norms.device)
        total = torch.zeros_like(norms).index_add(0, subject, values.float())
        return total / torch.bincount(subject, minlength=len(norms)).clamp_min(1)

    asked, kept = [row for row in rows if row.targets], [row for row in rows if not row.targets]
    log_p, now = _predictions(model, [*asked, *kept], layer, scaled * norms[:, None])
    losses = mean_by_subject(asked, -log_p) + search.weight_decay * scaled.square().sum(dim=1)
    if kept:
        divergence = (now.exp() * (now - torch.stack([unchanged[row] for row in kept]))).sum(dim=1)
        losses = losses + search.kl_weight * mean_by_subject(kept, divergence)
    return losses


def _predictions(
    model: Model, rows: Sequence[Row], layer: int, deltas: Tensor
) -> tuple[Float[Tensor, " asked"], Float[Tensor, "kept d_vocab"]]:
    """Log-probabilities of the new answers of the rows with targets, and of every next token after the others.

    Rows with targets come first.
    """
    ids, (at, subject) = row_tensors(model, rows)
    asked = [row for row in rows if row.targets]
    after = [range(len(row.ids) - max(1, len(row.targets)), len(row.ids)) for row in rows]
    places = torch.tensor([(i, place) for i, some in enumerate(after) for place in some], device=model.device)
    keep, where = torch.unique(places[:, 1], return_inverse=True)
    with added_at_subjects(model, layer, at, deltas[subject]):
        logits = model.hf(ids, use_cache=False, logits_to_keep=keep).logits
    log_probs = exact(logits[places[:, 0], where]).log_softmax(-1)
    tokens = torch.tensor([token for row in asked for token in row.targets], dtype=torch.long, device=model.device)
    of = torch.tensor([i for i, row in enumerate(asked) for _ in row.targets], dtype=torch.long, device=model.device)
    answers = log_probs[: len(tokens)].gather(-1, tokens[:, None])[:, 0]
    return answers.new_zeros(len(asked)).index_add(0, of, answers), log_probs[len(tokens) :]


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
