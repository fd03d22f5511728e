"""Losses of editing and relearning on token batches, and the pools of tokens that the batches are drawn from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.edit.training import Forward
from mechunlearn.facts import Fact
from mechunlearn.metrics import pad_right
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import encode, encode_answers, max_positions, padding_token, render

Forms = Literal["prompt", "all"]
"""Which forms a fact is trained in: its prompt, or prompt and paraphrases in equal shares (questions never)."""

HARMBENCH_FLOOR = -5.0  # log p below which an answer counts as forgotten (HarmBench; mechanistic-unlearning)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Rows of tokens and which of them are to be predicted. Shapes: ids, is_target [row pos]; lengths [row]."""

    ids: Int[Tensor, "row pos"]
    is_target: Bool[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]
    """On the CPU, so that cutting a batch to its width waits for no GPU."""
    starts: Int[Tensor, " row"]
    """Position of each row's first target; on the CPU, at least 1."""
    filler: int = 0
    """The token that fills short rows on the right."""

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Int[Tensor, " chosen"]) -> "Tokens":
        """The chosen rows, cut to the longest of them."""
        lengths, on_device = self.lengths[rows], rows.to(self.ids.device)
        width = int(lengths.max())
        return replace(
            self,
            ids=self.ids[on_device, :width],
            is_target=self.is_target[on_device, :width],
            lengths=lengths,
            starts=self.starts[rows],
        )


def _tokens(model: Model, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Tokens:
    lengths, first = torch.tensor([len(row) for row in rows]), torch.tensor(starts)
    position = torch.arange(int(lengths.max()))
    is_target = (position >= first[:, None]) & (position < lengths[:, None])
    return Tokens(
        ids=pad_right(model, rows), is_target=is_target.to(model.device), lengths=lengths, starts=first,
        filler=padding_token(model),
    )  # fmt: skip


def answer_tokens(model: Model, pairs: Sequence[tuple[str, str]]) -> Tokens:
    """Tokenise (prompt, answer) pairs; the answer's tokens are the targets.

    Raises:
        ValueError: no pairs, or a prompt of no tokens.
    """
    if not pairs:
        raise ValueError("training: got no prompts with answers; give at least one fact")
    answers = encode_answers(model, (answer for _, answer in pairs))
    prompts = encode(model, (prompt for prompt, _ in pairs))
    if not all(prompts):
        raise ValueError("training: got an empty prompt; every prompt needs at least one token")
    rows = [[*ids, *answers[answer]] for ids, (_, answer) in zip(prompts, pairs, strict=True)]
    return _tokens(model, rows, [len(ids) for ids in prompts])


def fact_tokens(
    model: Model, facts: Sequence[Fact], *, answer: Literal["target_true", "target_new"] = "target_true",
    forms: Forms = "prompt",
) -> Tokens:  # fmt: skip
    """Tokenise facts with their true or their new answer, one row per fact and form.

    Raises:
        ValueError: a fact without `target_new` where that is the answer.
    """
    pairs: list[tuple[str, str]] = []
    for fact in facts:
        target = fact.target_true if answer == "target_true" else fact.target_new
        if target is None:
            raise ValueError(f"fact {fact.key} has no target_new to inject; draw one with facts.with_edit_targets")
        n_paraphrases = len(fact.paraphrases) if forms == "all" else 0
        asked = ("prompt", *(f"paraphrase:{i}" for i in range(n_paraphrases)))
        pairs += [(render(fact, form), target) for form in asked]
    return answer_tokens(model, pairs)


def text_tokens(model: Model, texts: Sequence[str], *, max_tokens: int = 128) -> Tokens:
    """Tokenise running text, cut at `max_tokens` or the model's last position; every token but the first is a target.

    Raises:
        ValueError: no text of two tokens or more.
    """
    width = max_positions(model, max_tokens)
    rows = [row[:width] for row in encode(model, texts) if len(row) > 1]
    if not rows:
        raise ValueError(f"training: got {len(texts)} texts, none of two tokens or more; give some text")
    return _tokens(model, rows, [1] * len(rows))


def batches(tokens: Tokens, size: int, *, seed: int) -> Iterator[Tokens]:
    """Endless batches: all rows in a new seeded order each epoch, without repeats in a batch.

    A pool of no more than `size` rows is one batch, always the same.
    """
    if len(tokens) <= size:
        whole = tokens.take(torch.arange(len(tokens)))
        while True:
            yield whole
    generator = torch.Generator().manual_seed(seed)
    left = torch.randperm(len(tokens), generator=generator)
    while True:
        if len(left) < size:  # an epoch's rest too small for a batch is dropped
            left = torch.randperm(len(tokens), generator=generator)
        yield tokens.take(left[:size])
        left = left[size:]


def joined(first: Iterator[Tokens], second: Iterator[Tokens]) -> Iterator[Tokens]:
    """Batches of two kinds as one: a single forward pass over both costs small models less than two."""
    for a, b in zip(first, second, strict=False):
        width = max(a.ids.shape[1], b.ids.shape[1])
        ids, is_target = (
            torch.cat([F.pad(getattr(t, name), (0, width - t.ids.shape[1]), value=value) for t in (a, b)])
            for name, value in (("ids", a.filler), ("is_target", False))
        )
        yield replace(
            a,
            ids=ids,
            is_target=is_target,
            lengths=torch.cat([a.lengths, b.lengths]),
            starts=torch.cat([a.starts, b.starts]),
        )


Objective = Callable[
    [Float[Tensor, "row kept d_vocab"], Int[Tensor, "row kept"], Bool[Tensor, "row kept"]], Float[Tensor, ""]
]
"""(logits, the token that each position should predict, whether it counts) -> loss."""


def answer_log_probs(
    logits: Float[Tensor, "row kept d_vocab"], tokens: Int[Tensor, "row kept"], counts: Bool[Tensor, "row kept"]
) -> Float[Tensor, " row"]:
    """Each row's log P(answer), summed over the answer's tokens. Nats, at most 0."""
    return (_token_log_probs(logits, tokens) * counts).sum(-1)


def answer_loss(
    logits: Float[Tensor, "row kept d_vocab"], tokens: Int[Tensor, "row kept"], counts: Bool[Tensor, "row kept"]
) -> Float[Tensor, ""]:
    """-log P(answer), summed over the answer's tokens, averaged over rows. Nats; 0 when every answer is certain."""
    return -answer_log_probs(logits, tokens, counts).mean()


def text_loss(
    logits: Float[Tensor, "row kept d_vocab"], tokens: Int[Tensor, "row kept"], counts: Bool[Tensor, "row kept"]
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood over all tokens that count, whatever their row. Nats per token."""
    return -(_token_log_probs(logits, tokens) * counts).sum() / counts.sum()


def log_1_minus_p(
    logits: Float[Tensor, "row kept d_vocab"], tokens: Int[Tensor, "row kept"], counts: Bool[Tensor, "row kept"]
) -> Float[Tensor, ""]:
    """-log(1 - P(answer)), averaged over rows; rows with log P(answer) < -5 count as forgotten and give 0.

    With p_i the probability of the answer's i-th token, 1 - prod p_i = sum_i (1 - p_i) prod_{j<i} p_j; each factor
    comes from a log-sum-exp, so loss and gradient stay finite when the model is certain of the answer.

    Sign and units: nats, at least 0; the mean is over all rows, those that count as forgotten included.

    Differs from the source: HarmBench averages over answer tokens, each on its own; the same for one token.
    Source: Mazeika et al. 2024, arXiv:2402.04249; as in Guo et al. 2024, arXiv:2410.12949.
    """
    log_p = _token_log_probs(logits, tokens) * counts
    others = logits.scatter(-1, tokens[..., None], -torch.inf).logsumexp(-1)
    log_not = (others - logits.logsumexp(-1)).masked_fill(~counts, -torch.inf)
    before = log_p.cumsum(-1) - log_p
    log_miss = (before + log_not).logsumexp(-1)
    return -(log_miss * (log_p.detach().sum(-1) >= HARMBENCH_FLOOR)).mean()


def _token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    # half the time of gather and logsumexp, whose gradients are two tensors as large as the logits
    return -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """One summand of a training loss."""

    weight: float
    objective: Objective
    batches: Iterator[Tokens]


def near_and_far(retain: Sequence[Fact], forget: Sequence[Fact]) -> tuple[Fact, ...]:
    """The retained facts with those of the forgotten relations repeated until they are about half.

    Other subjects' answers to the very question that is being changed are what an edit damages first; drawn evenly,
    they would hardly ever be in a batch.
    """
    relations = {fact.relation for fact in forget}
    near = [fact for fact in retain if fact.relation in relations]
    far = [fact for fact in retain if fact.relation not in relations]
    return (*far, *near * max(1, round(len(far) / len(near)) if near else 1))


def keeping_terms(
    model: Model, retain: Sequence[Fact], text: Sequence[str] | None, *,
    retain_weight: float, text_weight: float, batch_size: int, forms: Forms, seed: int, n_texts: int | None = None,
) -> list[Term]:  # fmt: skip
    """What every editor keeps the model by: true answers to the retained facts, and fluency on running text.

    Args:
        n_texts: passages a step; None is an eighth of `batch_size`: a passage is several times as long as a prompt, so
            they cost about half as much.

    Raises:
        ValueError: no facts to retain, unless `retain_weight` is 0.
    """
    terms: list[Term] = []
    if retain_weight:
        if not retain:
            raise ValueError("split: retain_train is empty; give it facts to keep, or set retain_weight to 0")
        kept = fact_tokens(model, retain, forms=forms)
        terms.append(
            Term(weight=retain_weight, objective=answer_loss, batches=batches(kept, batch_size, seed=seed + 1))
        )
    if text_weight:
        passages = text_tokens(model, neutral_text(64, seed=seed) if text is None else text)
        terms.append(
            Term(
                weight=text_weight,
                objective=text_loss,
                batches=batches(passages, n_texts or max(1, batch_size // 8), seed=seed + 2),
            )
        )
    return terms


Loss = Callable[[int, Forward], Float[Tensor, ""]]
"""(number of the call, forward pass) -> a scalar to minimise."""


def weighted_sum(terms: Sequence[Term]) -> Loss:
    """The loss sum over terms of weight * objective(next batch), for `train`; terms of weight 0 are left out.

    Each term has a forward pass of its own: answers are short and need few logits, text is long and needs all.

    Raises:
        ValueError: nothing is left.
    """
    used = [term for term in terms if term.weight]
    if not used:
        raise ValueError("training: every loss weight is 0; make one of them positive")

    def loss(_: int, forward: Forward) -> Tensor:
        values = [term.weight * term.objective(*predict(forward, next(term.batches))) for term in used]
        return torch.stack(values).sum()

    return loss


def summed(*losses: tuple[float, Loss]) -> Loss:
    """The loss sum over parts of weight * loss; parts of weight 0 are left out."""
    used = [(weight, loss) for weight, loss in losses if weight]
    return lambda step, forward: sum((w * loss(step, forward) for w, loss in used), start=torch.zeros(()))


def original_logits(model: Model, batch: Tokens) -> Float[Tensor, "row kept d_vocab"]:
    """What the unedited model says where `predict` looks; costs a forward pass without gradients.

    While a loss is being computed the model object itself holds the original weights: stand-ins live in `Forward`.
    """
    with torch.no_grad():
        return model.hf(batch.ids, use_cache=False, logits_to_keep=_kept(batch)).logits.float()


def log_ratios(model: Model, forward: Forward, batch: Tokens) -> Float[Tensor, " row"]:
    """Each row's log P(answer) - log P0(answer), P0 being the unedited model's. Nats; 0 before the first step."""
    logits, tokens, counts = predict(forward, batch)
    before = answer_log_probs(original_logits(model, batch), tokens, counts)
    return answer_log_probs(logits, tokens, counts) - before


def kl_loss(model: Model, rows: Iterator[Tokens]) -> Loss:
    """KL(original || edited) where the rows' targets are predicted, averaged over those tokens. Nats; at least 0."""

    def loss(_: int, forward: Forward) -> Tensor:
        batch = next(rows)
        logits, _tokens, counts = predict(forward, batch)
        before, after = original_logits(model, batch).log_softmax(-1), logits.log_softmax(-1)
        return ((before.exp() * (before - after)).sum(-1) * counts).sum() / counts.sum()

    return loss


def predict(forward: Forward, batch: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the positions that predict a target, with the tokens there and whether each counts."""
    first = int(batch.starts.min())
    return forward(batch.ids, _kept(batch)), batch.ids[:, first:], batch.is_target[:, first:]


def _kept(batch: Tokens) -> Int[Tensor, " kept"]:
    return torch.arange(int(batch.starts.min()) - 1, batch.ids.shape[1] - 1, device=batch.ids.device)
