"""Clean and corrupt runs: a fact's prompt beside the same template about another subject with another answer."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.activations import Place, Tokens, hooked, last_logits, pad
from mechunlearn.components import ROLES
from mechunlearn.facts import Fact
from mechunlearn.models import Model
from mechunlearn.prompts import candidates, encode_answers, token_roles, tokenizer_of

Donors = Literal["other_answer", "same_answer"]
"""Whose run is the corrupt one: subjects with another answer, or with the same (a null distribution)."""
SUBJECT_ROLES = ("subject_first", "subject_middle", "subject_last")
_MOST_TRIED = 64  # donors tokenised per fact while looking for one with as many subject tokens


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One fact's prompt (clean) and the same template about a donor (corrupt), as token ids."""

    fact: int
    """Index of the fact."""
    donor: str | None
    """The donor subject; None where the subject was replaced by random tokens."""
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    """First token of the true answer that the counterfactual answer does not share."""
    counterfactual: int
    candidates: tuple[int, ...]
    """Tokens the answer competes with at that place, itself among them."""
    subject: tuple[int, ...]
    """Positions of all subject tokens on the clean run."""
    end: int
    """Position of the prompt's last token on the clean run; the answers' shared tokens may follow."""
    aligned: tuple[tuple[int, int, int], ...]
    """(clean position, corrupt position, role index) of the tokens both prompts have."""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Pairs as padded tensors; `aligned` is the number of tokens that both prompts of a pair have."""

    pairs: tuple[Pair, ...]
    clean: Tokens
    corrupt: Tokens
    answer: Int[Tensor, " batch"]
    counterfactual: Int[Tensor, " batch"]
    clean_positions: Int[Tensor, "batch aligned"]
    corrupt_positions: Int[Tensor, "batch aligned"]
    roles: Float[Tensor, "batch aligned role"]
    """One-hot; all zero where a pair has fewer aligned tokens than the batch."""

    def logit_diff(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """Logit of the true minus logit of the counterfactual answer."""
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, self.answer] - logits[rows, self.counterfactual]

    def chosen(self, logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        """The candidate with the highest logit."""
        rows = zip((list(pair.candidates) for pair in self.pairs), logits, strict=True)
        best = [candidates[int(row[candidates].argmax())] for candidates, row in rows]
        return torch.tensor(best, device=logits.device)

    def take(self, activation: Tensor, positions: Int[Tensor, "batch aligned"]) -> Tensor:
        """The activation's rows at the given positions, [batch aligned ...]."""
        return activation[torch.arange(len(positions), device=positions.device)[:, None], positions]

    def put(self, base: Tensor, donor: Tensor, roles: Sequence[str]) -> Tensor:
        """The clean run's activation with the corrupt run's values at the aligned tokens of these roles."""
        selected = self.roles[:, :, [ROLES.index(role) for role in roles]].any(dim=2)
        row, place = selected.nonzero(as_tuple=True)
        changed = base.clone()
        changed[row, self.clean_positions[row, place]] = donor[row, self.corrupt_positions[row, place]]
        return changed


def build_pairs(
    model: Model,
    facts: Sequence[Fact],
    *,
    pairs_per_fact: int = 1,
    donors: Donors = "other_answer",
    seed: int = 0,
) -> tuple[Pair, ...]:
    """Give every fact up to `pairs_per_fact` corrupt runs.

    A donor is another subject of the same relation with another answer, asked with the fact's own template. Donors
    with as many subject tokens come first, then the closest lengths. Which donor a fact gets depends on the seed, the
    fact and the set of facts, not on their order. Tokens are aligned from the start before the subject, from the end in
    it and after it; tokens without a partner count as unchanged. Where the two answers begin with the same
    tokens, these are appended to both prompts. A fact without any donor (a single fact) is corrupted by random tokens
    in the subject's place, with a wrong candidate as counterfactual.

    Args:
        donors: "same_answer" takes donors that share the fact's answer: nothing that tells the answers apart changes
            between the two runs. The counterfactual is then a wrong candidate (without candidates, another answer of
            the relation), drawn for each pair with the seed.

    Raises:
        ValueError: no facts; a fact without donor that has no wrong candidate; answers that cannot be told apart; with
            "same_answer" a fact whose answer no other subject has.
    """
    if not facts:
        raise ValueError("localizer: got no facts, allowed: at least one")
    relations: dict[str, dict[tuple[str, str, str], Fact]] = {}
    for fact in facts:
        relations.setdefault(fact.relation, {})[fact.key] = fact
    pools = {relation: [by_key[key] for key in sorted(by_key)] for relation, by_key in relations.items()}
    builder = _Builder(model, facts)
    pairs: list[Pair] = []
    for index, fact in enumerate(facts):
        pool, rng = pools[fact.relation], random.Random(f"{seed} {fact.key}")
        alike = {other.subject for other in pool if other.target_true == fact.target_true} - {fact.subject}
        if donors == "same_answer":
            pairs += builder.from_donors(index, fact, builder.same_answer(fact, alike, pool, rng), pairs_per_fact)
            continue
        too = alike | {fact.subject}
        others = [(other.subject, other.target_true) for other in pool if other.subject not in too]
        rng.shuffle(others)
        found = builder.from_donors(index, fact, others, pairs_per_fact)
        pairs += found or [builder.from_random_tokens(index, fact, rng) for _ in range(pairs_per_fact)]
    return tuple(pairs)


def batches(model: Model, pairs: Sequence[Pair], batch_size: int) -> Iterator[PairBatch]:
    """The pairs in padded batches, shortest first, so that little is padded."""
    ordered = sorted(pairs, key=lambda pair: (len(pair.clean), len(pair.corrupt)))
    for start in range(0, len(ordered), batch_size):
        yield to_batch(model, ordered[start : start + batch_size])


def to_batch(model: Model, pairs: Sequence[Pair]) -> PairBatch:
    """Pad the pairs into one batch."""
    width = max(len(pair.aligned) for pair in pairs)
    padded = [[*pair.aligned, *[(0, 0, -1)] * (width - len(pair.aligned))] for pair in pairs]
    table = torch.tensor(padded, device=model.device)
    return PairBatch(
        pairs=tuple(pairs),
        clean=pad(model, [pair.clean for pair in pairs]),
        corrupt=pad(model, [pair.corrupt for pair in pairs]),
        answer=torch.tensor([pair.answer for pair in pairs], device=model.device),
        counterfactual=torch.tensor([pair.counterfactual for pair in pairs], device=model.device),
        clean_positions=table[..., 0],
        corrupt_positions=table[..., 1],
        roles=(table[..., 2:] == torch.arange(len(ROLES), device=model.device)).float(),
    )


def fact_means(
    n_facts: int, scored: Iterable[tuple[PairBatch, Float[Tensor, "batch ..."]]]
) -> Float[np.ndarray, "fact ..."]:
    """Scores of batches of pairs, averaged over each fact's pairs."""
    total, count = np.zeros(()), np.zeros(n_facts)
    for batch, scores in scored:
        facts, found = [pair.fact for pair in batch.pairs], scores.double().cpu().numpy()
        total = total if total.shape else np.zeros((n_facts, *found.shape[1:]))
        np.add.at(total, facts, found)
        np.add.at(count, facts, 1)
    return total / count.reshape(-1, *[1] * (total.ndim - 1))


def record_donor(model: Model, batch: PairBatch, places: Sequence[Place]) -> dict[Place, Tensor]:
    """What the places hold on the corrupt run."""
    with torch.no_grad(), hooked(model, record=places) as seen:
        last_logits(model, batch.corrupt)
    return seen


class _Builder:
    """Tokenises every answer and every (template, subject) once."""

    def __init__(self, model: Model, facts: Sequence[Fact]) -> None:
        self.model = model
        self.answers = encode_answers(model, (a for fact in facts for a in (fact.target_true, *candidates(fact))))
        self.prompts: dict[tuple[str, str], tuple[tuple[int, ...], tuple[str, ...]]] = {}

    def prompt(self, fact: Fact, subject: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Token ids and roles of the fact's prompt about a subject."""
        key = (fact.prompt, subject)
        if key not in self.prompts:
            ids, roles = token_roles(self.model, fact.prompt.replace("{}", subject), subject)
            self.prompts[key] = (tuple(ids), roles)
        return self.prompts[key]

    def from_donors(self, index: int, fact: Fact, donors: Sequence[tuple[str, str]], n: int) -> list[Pair]:
        """Up to n pairs with these (subject, counterfactual answer), closest subject lengths first."""
        length = len(self.prompt(fact, fact.subject)[0])
        usable = list(islice((d for d in donors if self.differ(fact, d[1])), max(n, _MOST_TRIED)))
        usable.sort(key=lambda donor: abs(len(self.prompt(fact, donor[0])[0]) - length))
        return [self.pair(index, fact, donor, answer, *self.prompt(fact, donor)) for donor, answer in usable[:n]]

    def same_answer(
        self, fact: Fact, alike: set[str], pool: Sequence[Fact], rng: random.Random
    ) -> list[tuple[str, str]]:
        """The subjects that share the fact's answer in a drawn order, each with a wrong answer drawn for it."""
        wrong = self.wrong(fact) or [
            other for other in sorted({f.target_true for f in pool} - {fact.target_true}) if self.differ(fact, other)
        ]
        if not alike or not wrong:
            lacks = f"other answer than {fact.target_true!r}" if alike else f"other subject with {fact.target_true!r}"
            raise ValueError(f"pairs with the same answer: fact {fact.key} has no {lacks}; give more facts of "
                             "this relation, or leave this one out")  # fmt: skip
        subjects = sorted(alike)
        rng.shuffle(subjects)
        return [(subject, rng.choice(wrong)) for subject in subjects]

    def wrong(self, fact: Fact) -> list[str]:
        """The candidates that can be told from the true answer."""
        return [answer for answer in candidates(fact) if answer != fact.target_true and self.differ(fact, answer)]

    def from_random_tokens(self, index: int, fact: Fact, rng: random.Random) -> Pair:
        """The fact against its own prompt with random tokens as subject."""
        wrong = self.wrong(fact)
        if not wrong:
            raise ValueError(
                f"localizer: fact {fact.key} has no donor (same relation, another subject and answer) and no wrong "
                "candidate to compare with; give more facts of this relation, or choices"
            )
        ids, roles = self.prompt(fact, fact.subject)
        tokenizer = tokenizer_of(self.model)
        special = set(tokenizer.all_special_ids)
        ordinary = [i for i in range(min(len(tokenizer), self.model.hf.config.vocab_size)) if i not in special]
        noisy = tuple(rng.choice(ordinary) if r in SUBJECT_ROLES else i for i, r in zip(ids, roles, strict=True))
        return self.pair(index, fact, None, rng.choice(wrong), noisy, roles)

    def differ(self, fact: Fact, counterfactual: str) -> tuple[tuple[int, ...], int, int] | None:
        """Shared first tokens of the two answers and the first that differ; None if one begins with the other."""
        true, false = self.answers[fact.target_true], self.answers[counterfactual]
        for i, (a, b) in enumerate(zip(true, false, strict=False)):
            if a != b:
                return true[:i], a, b
        return None

    def pair(
        self, index: int, fact: Fact, donor: str | None, other: str, ids: tuple[int, ...], roles: tuple[str, ...]
    ) -> Pair:
        """Put one pair together."""
        found = self.differ(fact, other)
        assert found is not None  # checked by both callers
        shared, answer, counterfactual = found
        rivals = [self.answers[choice] for choice in candidates(fact)]
        rivals = [r[len(shared)] for r in rivals if len(r) > len(shared) and r[: len(shared)] == shared]
        clean, clean_roles = _extend(*self.prompt(fact, fact.subject), shared)
        corrupt, corrupt_roles = _extend(ids, roles, shared)
        return Pair(
            fact=index,
            donor=donor,
            clean=clean,
            corrupt=corrupt,
            answer=answer,
            counterfactual=counterfactual,
            # the best candidate is the first of equals: a tie is no success, neither for the answer nor for the donor's
            candidates=(*dict.fromkeys(r for r in rivals if r not in (answer, counterfactual)), counterfactual, answer),
            subject=tuple(i for i, role in enumerate(clean_roles) if role in SUBJECT_ROLES),
            end=len(clean) - 1 - len(shared),
            aligned=tuple((c, k, ROLES.index(clean_roles[c])) for c, k in align(clean_roles, corrupt_roles)),
        )


def _extend(
    ids: tuple[int, ...], roles: tuple[str, ...], shared: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Append the answers' shared tokens; only the very last token is "last"."""
    if not shared:
        return ids, roles
    middle = roles[-1] if roles[-1] in SUBJECT_ROLES else "between"
    return (*ids, *shared), (*roles[:-1], middle, *["between"] * (len(shared) - 1), "last")


def align(clean: Sequence[str], corrupt: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of the two role sequences that belong together.

    Before the subject they are paired from the start, within the subject and after it from the end; what is left over
    has no partner.
    """
    (first_c, last_c), (first_k, last_k) = _subject(clean), _subject(corrupt)
    before = [(i, i) for i in range(min(first_c, first_k))]
    subject = [(last_c - i, last_k - i) for i in range(min(last_c - first_c, last_k - first_k) + 1)]
    n_after = min(len(clean) - 1 - last_c, len(corrupt) - 1 - last_k)
    after = [(len(clean) - 1 - i, len(corrupt) - 1 - i) for i in range(n_after)]
    return sorted(before + subject + after)


def _subject(roles: Sequence[str]) -> tuple[int, int]:
    positions = [i for i, role in enumerate(roles) if role in SUBJECT_ROLES]
    return positions[0], positions[-1]


def describe_pairs(pairs: Sequence[Pair]) -> dict[str, float | int]:
    """What a result should tell about its pairs."""
    return {
        "n_pairs": len(pairs),
        "share_same_length": sum(len(pair.clean) == len(pair.corrupt) for pair in pairs) / len(pairs),
        "share_random_subject": sum(pair.donor is None for pair in pairs) / len(pairs),
    }
