"""What a model says about facts and text: P(answer), accuracy, perplexity, KL. Changes nothing, needs no gradient."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.facts import Fact
from mechunlearn.models import Model
from mechunlearn.prompts import Asked, ask, encode, encode_answers, forms, max_positions, padding_token

Ids = tuple[int, ...]


def candidate_log_probs(
    model: Model, prompts: Sequence[str], candidates: Sequence[Sequence[str]], *, batch_size: int = 64
) -> list[Float[Tensor, " candidate"]]:
    """Log-probability of each candidate as the continuation of its prompt, summed over the candidate's tokens.

    log P(c | x) = sum over i of log P(c_i | x, c_<i), in float32 from the model's logits.

    Candidates share forward rows wherever one is a beginning of another: one-token candidates cost one row a
    prompt, however many they are. Rows are padded on the right, where causal attention never looks, and
    batched by length, so a value depends on its own prompt and candidate alone.

    Args:
        candidates: for each prompt its candidates, without leading space.
        batch_size: rows a forward pass.

    Returns:
        For each prompt one float32 tensor on the CPU, in nats, at most 0.
    """
    ids = encode_answers(model, (candidate for group in candidates for candidate in group))
    heads = encode(model, prompts)
    rows: list[tuple[int, Ids]] = []  # (prompt, tokens after it that are fed)
    where: list[list[int]] = []  # for each prompt and candidate its row
    for i, group in enumerate(candidates):
        fed = _maximal({ids[candidate][:-1] for candidate in group})
        cover = [next(r for r, row in enumerate(fed) if row[: len(c) - 1] == c[:-1]) for c in (ids[c] for c in group)]
        where.append([len(rows) + r for r in cover])
        rows += [(i, row) for row in fed]
    wanted: list[list[tuple[int, int, Ids]]] = [[] for _ in rows]
    for i, group in enumerate(candidates):
        for j, candidate in enumerate(group):
            wanted[where[i][j]].append((i, j, ids[candidate]))
    scores = [torch.zeros(len(group)) for group in candidates]
    _score_rows(model, [(heads[i], fed) for i, fed in rows], wanted, scores, batch_size)
    return scores


def _maximal(sequences: set[Ids]) -> list[Ids]:
    """The sequences that are no beginning of another one, in a fixed order."""
    ordered = sorted(sequences)
    # in sorted order a sequence is followed by those it begins
    return [a for a, b in zip(ordered, [*ordered[1:], None], strict=True) if b is None or b[: len(a)] != a]


def _score_rows(
    model: Model,
    rows: Sequence[tuple[list[int], Ids]],
    wanted: Sequence[Sequence[tuple[int, int, Ids]]],
    scores: Sequence[Tensor],
    batch_size: int,
) -> None:
    order = sorted(range(len(rows)), key=lambda r: (len(rows[r][0]) + len(rows[r][1]), len(rows[r][0]), r))
    for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        first = min(len(rows[r][0]) for r in batch) - 1
        log_probs = _log_probs(model, [[*rows[r][0], *rows[r][1]] for r in batch], first=first)
        at = [
            (b, len(rows[r][0]) - 1 + k - first, token)
            for b, r in enumerate(batch)
            for *_, tokens in wanted[r]
            for k, token in enumerate(tokens)
        ]
        row, position, token = torch.tensor(at, device=log_probs.device).T
        picked = iter(log_probs[row, position, token].tolist())
        for r in batch:
            for i, j, tokens in wanted[r]:
                scores[i][j] = sum(next(picked) for _ in tokens)


def pad_right(model: Model, rows: Sequence[Sequence[int]]) -> Int[Tensor, "row pos"]:
    """Token rows as one tensor on the model's device; short ones are filled with a special token.

    Causal attention keeps that out of the rest, and what looks at a whole text, such as a guard, knows it from text.
    """
    width, filled = max(map(len, rows)), padding_token(model)
    return torch.tensor([[*row, *[filled] * (width - len(row))] for row in rows], device=model.device)


@torch.no_grad()
def _log_probs(model: Model, rows: Sequence[Sequence[int]], *, first: int = 0) -> Float[Tensor, "row pos d_vocab"]:
    """Log-softmax in float32 at positions `first` and later."""
    ids = pad_right(model, rows)
    keep = torch.arange(first, ids.shape[1], device=ids.device)
    # no attention mask: with padding on the right it would change nothing but the (slower) attention kernel
    return model.hf(ids, use_cache=False, logits_to_keep=keep).logits.float().log_softmax(-1)


def score_facts(
    model: Model,
    facts: Sequence[Fact],
    form: str = "prompt",
    *,
    drop_targets: bool = False,
    batch_size: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """P(true answer | candidates) of each fact asked in one form.

    p_true = softmax over the fact's candidates of log P(candidate | prompt), at the true answer; "choice" averages it
    over the rotations of its options.

    Sign and units: p_true is in [0, 1]; 1 is full knowledge, `chance` (1 / number of candidates) is ignorance, less
        than chance is a preference for wrong answers. `correct`: the true answer beats every other (a tie does not).

    Args:
        form: "prompt", "paraphrase:i", "question:i" or "choice".
        drop_targets: leave each fact's `target_new` out of its candidates.
        seed: draws the options of "choice".

    Returns:
        One row per fact, in their order: subject, relation, form, p_true, p_new (of `target_new`; NaN where that is no
        candidate), correct, chance, top (the best candidate).

    Raises:
        ValueError: a fact lacks the form or has fewer than two candidates.
    """
    return _score(model, [(fact, form) for fact in facts], drop_targets=drop_targets, batch_size=batch_size, seed=seed)


def _score(
    model: Model, pairs: Sequence[tuple[Fact, str]], *, drop_targets: bool, batch_size: int, seed: int
) -> pd.DataFrame:
    asked = [ask(fact, form, drop_targets=drop_targets, seed=seed) for fact, form in pairs]
    texts = [one for group in asked for one in group]
    scored = iter(
        candidate_log_probs(model, [t.text for t in texts], [t.candidates for t in texts], batch_size=batch_size)
    )
    rows = []
    for (fact, form), group in zip(pairs, asked, strict=True):
        p = _mean_probabilities([(one, next(scored)) for one in group])
        p_new = p.get(fact.target_new or "", float("nan"))
        p_true = p.pop(fact.target_true)
        best = max(p, key=lambda answer: p[answer])
        correct = p_true > p[best]
        top = fact.target_true if correct else best
        rows.append((fact.subject, fact.relation, form, p_true, p_new, correct, 1 / (len(p) + 1), top))
    columns = ["subject", "relation", "form", "p_true", "p_new", "correct", "chance", "top"]
    frame = pd.DataFrame(rows, columns=pd.Index(columns))
    return frame.astype({"p_true": np.float64, "p_new": np.float64, "correct": bool, "chance": np.float64})


def _mean_probabilities(scored: Sequence[tuple[Asked, Tensor]]) -> dict[str, float]:
    """Probability of each answer among the candidates, averaged over the texts of one form."""
    total = dict.fromkeys(scored[0][0].answers, 0.0)
    for asked, log_probs in scored:
        for answer, p in zip(asked.answers, log_probs.double().softmax(-1).tolist(), strict=True):
            total[answer] += p / len(scored)
    return total


def known_facts(
    model: Model,
    facts: Sequence[Fact],
    *,
    forms: Sequence[str] = ("prompt",),
    threshold: float = 0.5,
    batch_size: int = 64,
) -> tuple[Fact, ...]:
    """The facts whose true answer has more than `threshold` of the probability in every one of the forms.

    Args:
        forms: as in `score_facts`; a bare "paraphrase" or "question" stands for all of a fact's own.
        threshold: in [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: got {threshold}, allowed: from 0 to below 1")
    pairs = [(i, form) for i, fact in enumerate(facts) for form in _expand(fact, forms)]
    frame = _score(model, [(facts[i], form) for i, form in pairs], drop_targets=False, batch_size=batch_size, seed=0)
    lowest = np.ones(len(facts)) * np.inf
    np.minimum.at(lowest, [i for i, _ in pairs], frame["p_true"].to_numpy())
    return tuple(fact for fact, p in zip(facts, lowest, strict=True) if p > threshold)


def _expand(fact: Fact, wanted: Sequence[str]) -> Iterator[str]:
    for form in wanted:
        if form in ("paraphrase", "question"):
            yield from (own for own in forms(fact) if own.startswith(f"{form}:"))
        else:
            yield form


def perplexity(model: Model, texts: Sequence[str], *, max_tokens: int = 256, batch_size: int = 16) -> float:
    """Exponential of the mean negative log-likelihood per predicted token, all tokens of all texts weighted alike.

    Sign and units: at least 1; d_vocab for a model that knows nothing. Smaller is more fluent.

    Args:
        max_tokens: each text is cut there, or at the model's last position.

    Raises:
        ValueError: no text has two tokens.
    """
    total, count = 0.0, 0
    for batch in _text_batches(model, texts, max_tokens, batch_size):
        picked = _log_probs(model, batch)[:, :-1].gather(-1, pad_right(model, batch)[:, 1:, None])[..., 0]
        real = _is_predicted(batch, model.device)
        total -= float(picked[real].double().sum())
        count += int(real.sum())
    return math.exp(total / count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What a model predicts at every token of some texts, to compare later states of it with."""

    batches: tuple[tuple[tuple[int, ...], ...], ...]
    log_probs: tuple[Float[Tensor, "token d_vocab"], ...]
    """One float32 tensor per batch on the CPU: 4 bytes * tokens * d_vocab, so give few texts at large vocabularies."""


def reference_of(model: Model, texts: Sequence[str], *, max_tokens: int = 256, batch_size: int = 16) -> Reference:
    """Store the model's next-token log-probabilities at every token of the texts, for `kl_from`."""
    batches = [tuple(map(tuple, batch)) for batch in _text_batches(model, texts, max_tokens, batch_size)]
    return Reference(batches=tuple(batches), log_probs=tuple(_predictions(model, batch).to("cpu") for batch in batches))


def kl_from(model: Model, reference: Reference) -> float:
    """Mean over tokens of KL(reference || model).

    Sign and units: nats per token, at least 0; exactly 0 for the model that the reference was taken from.
    """
    total, count = 0.0, 0
    for batch, stored in zip(reference.batches, reference.log_probs, strict=True):
        before, after = stored.to(model.device), _predictions(model, batch)
        total += float((before.exp() * (before - after)).sum(-1).double().sum())
        count += len(before)
    return total / count


def _predictions(model: Model, batch: Sequence[Sequence[int]]) -> Float[Tensor, "token d_vocab"]:
    return _log_probs(model, batch)[:, :-1][_is_predicted(batch, model.device)]


def _is_predicted(batch: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Which of the positions 1.. of a padded batch hold a real token."""
    lengths = torch.tensor([len(row) for row in batch], device=device)
    return torch.arange(1, max(map(len, batch)), device=device) < lengths[:, None]


def _text_batches(model: Model, texts: Sequence[str], max_tokens: int, batch_size: int) -> list[list[list[int]]]:
    width = max_positions(model, max_tokens)
    rows = sorted((row[:width] for row in encode(model, texts) if len(row) > 1), key=len)
    if not rows:
        raise ValueError(f"texts: got {len(texts)}, none of two tokens or more; give some text")
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
