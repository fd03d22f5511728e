"""Facts as text and text as tokens: forms of asking, candidates of an answer, and the role of every token."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mechunlearn.facts import Fact
from mechunlearn.models import Model, embedding

LETTERS = ("A", "B", "C", "D")
CHOICE, BY_LETTER = "choice", "choice by letter"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One way a fact is put to the model: the text, and the candidates that may follow it."""

    text: str
    candidates: tuple[str, ...]
    """What the model is scored on, written without a leading space: answers, and in multiple choice letters, too."""
    answers: tuple[str, ...]
    """The answer that each candidate stands for, in the same order; one answer may have several candidates."""


def forms(fact: Fact) -> tuple[str, ...]:
    """Every form in which this fact can be asked: prompt, paraphrase:i, question:i, and choice if it has a question."""
    listed = ["prompt", *(f"paraphrase:{i}" for i in range(len(fact.paraphrases)))]
    listed += [f"question:{i}" for i in range(len(fact.questions))]
    if fact.questions and len(candidates(fact)) > 1:
        listed.append(CHOICE)
    return tuple(listed)


def candidates(fact: Fact, *, drop_targets: bool = False) -> tuple[str, ...]:
    """The answers a fact is scored among: its choices, and the edit's target unless it is dropped.

    Args:
        drop_targets: leave `target_new` out, so that an injected answer cannot push the true one below ignorance.
    """
    listed = fact.choices or (fact.target_true,)
    if drop_targets:
        return tuple(answer for answer in listed if answer != fact.target_new)
    if fact.target_new is not None and fact.target_new not in listed:
        listed = (*listed, fact.target_new)
    return tuple(listed)


def render(fact: Fact, form: str, seed: int = 0) -> str:
    """The text of one form, ending right before the answer.

    Args:
        form: one of `forms(fact)`.
        seed: for "choice", which options stand beside the true one and in which order (see `ask`).

    Raises:
        ValueError: the fact has no such form.
    """
    if form in (CHOICE, BY_LETTER):
        return ask(fact, form, seed=seed)[0].text
    kind, _, index = form.partition(":")
    if kind == "prompt" and not index:
        return fact.ask(fact.prompt)
    templates = {"paraphrase": fact.paraphrases, "question": fact.questions}.get(kind, ())
    if not index.isdecimal() or int(index) >= len(templates):
        raise ValueError(f"form: got {form!r}, allowed for {fact.key}: {', '.join(forms(fact))}")
    text = fact.ask(templates[int(index)])
    return f"Question: {text} Answer:" if kind == "question" else text


def ask(fact: Fact, form: str, *, drop_targets: bool = False, seed: int = 0) -> tuple[Asked, ...]:
    """The texts whose scores together make up one form: one for all forms but "choice".

    "choice" is asked once for every rotation of its options, so that every option stands at every letter once and
    a liking for a letter cancels, whatever other facts are scored beside this one. Which options stand beside the
    true answer (and `target_new`, unless dropped), and their order, is drawn by a generator seeded with the fact
    and `seed`; hence the true letter of the first text is spread evenly over facts. An option counts as chosen by its
    letter or by its words: its probability is the sum of both, so that a model which answers either way is measured.
    "choice by letter" is the same text with the letters alone as candidates.

    Raises:
        ValueError: the fact has no such form, or fewer than two candidates.
    """
    among = candidates(fact, drop_targets=drop_targets)
    if len(among) < 2:
        dropped = " once target_new is dropped" if drop_targets and fact.target_new else ""
        raise ValueError(f"fact {fact.key}: {len(among)} candidate answer{dropped}, needs 2 or more; give it choices")
    if form not in (CHOICE, BY_LETTER):
        return (Asked(text=render(fact, form), candidates=among, answers=among),)
    if not fact.questions:
        raise ValueError(f"form: got {form!r}, but {fact.key} has no question; give it questions")
    options = _options(fact, among, seed)
    turns = [options[i:] + options[:i] for i in range(len(options))]
    return tuple(_choice(fact, turn, letters_alone=form == BY_LETTER) for turn in turns)


def _options(fact: Fact, among: Sequence[str], seed: int) -> list[str]:
    rng = random.Random(f"choice|{seed}|{fact.subject}|{fact.relation}|{fact.target_true}")
    must = [answer for answer in among if answer in (fact.target_true, fact.target_new)]
    others = [answer for answer in among if answer not in must]
    options = must + rng.sample(others, min(len(others), len(LETTERS) - len(must)))
    rng.shuffle(options)
    return options


def _choice(fact: Fact, options: Sequence[str], *, letters_alone: bool) -> Asked:
    """The text format of the organisms' training data (organisms/corpus.py)."""
    letters = LETTERS[: len(options)]
    listed = "".join(f" {letter}: {option}" for letter, option in zip(letters, options, strict=True))
    text = f"Question: {fact.ask(fact.questions[0])}{listed} Answer:"
    if letters_alone or set(letters) & set(options):  # "A" as an answer could mean either
        return Asked(text=text, candidates=letters, answers=tuple(options))
    return Asked(text=text, candidates=(*letters, *options), answers=(*options, *options))


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or a one-line error."""
    if model.tokenizer is None:
        raise ValueError(f"model '{model.name}' has no tokenizer; load it with one to score text")
    return model.tokenizer


def max_positions(model: Model, wanted: int) -> int:
    """`wanted`, or the longest text the model has position embeddings for if that is less."""
    return min(wanted, getattr(model.hf.config, "max_position_embeddings", None) or wanted)


def padding_token(model: Model) -> int:
    """The token that short rows are filled with: a special one, so that no gate takes padding for text.

    That is the lowest special token of those with an embedding (0 where that is special); 0 where there is none, or no
    tokenizer.
    """
    special = () if model.tokenizer is None else model.tokenizer.all_special_ids
    known = len(embedding(model).get_parameter("weight"))
    return min((token for token in special if token < known), default=0)


def encode(model: Model, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens the tokenizer puts in front (BOS)."""
    texts = list(texts)
    return [list(ids) for ids in _tokenize(model, texts)] if texts else []


def token_texts(model: Model, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as readable text, with a leading space where the tokenizer marks one."""
    tokens = tokenizer_of(model).convert_ids_to_tokens(list(ids))
    return tuple(str(token).replace("Ġ", " ").replace("▁", " ") for token in tokens)


def encode_answers(model: Model, answers: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Token ids of each answer as it continues a text, i.e. after a space.

    Taken as what the answer adds to a fixed text: encoding " answer" alone is wrong for tokenizers that put their
    own space in front.

    Raises:
        ValueError: an answer that adds no token, or changes the tokens before it.
    """
    listed = list(dict.fromkeys(answers))
    if not listed:
        return {}
    anchor, *encoded = _tokenize(model, [":", *(f": {answer}" for answer in listed)], special=False)
    ids: dict[str, tuple[int, ...]] = {}
    for answer, full in zip(listed, encoded, strict=True):
        if full[: len(anchor)] != anchor or len(full) == len(anchor):
            raise ValueError(f"answer {answer!r}: cannot be split from the text before it by this tokenizer; reword it")
        ids[answer] = tuple(full[len(anchor) :])
    return ids


def token_roles(model: Model, prompt: str, subject: str) -> tuple[list[int], tuple[str, ...]]:
    """Token ids of the prompt and the role of each (components.ROLES).

    A subject of one token is "subject_last"; a prompt that ends with its subject has no "last" token. Everything
    else before the last token is "between", what stands before the subject and BOS included.

    Raises:
        ValueError: the subject is not in the prompt, or the tokenizer gives no offsets.
    """
    ids, offsets = _offsets(model, prompt)
    first, last = _span(prompt, subject, offsets)
    roles = ["between"] * len(ids)
    roles[-1] = "last"
    for position in range(first, last):
        roles[position] = "subject_middle"
    roles[first] = "subject_first"
    roles[last] = "subject_last"
    return ids, tuple(roles)


def _tokenize(model: Model, texts: list[str], *, special: bool = True) -> list[list[int]]:
    encoding: Any = tokenizer_of(model)(texts, add_special_tokens=special)
    return encoding["input_ids"]


def _offsets(model: Model, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
    tokenizer = tokenizer_of(model)
    if not tokenizer.is_fast:
        raise ValueError(f"model '{model.name}': its tokenizer gives no offsets; use the fast (tokenizers) version")
    encoding: Any = tokenizer(prompt, return_offsets_mapping=True)
    return list(encoding["input_ids"]), [tuple(pair) for pair in encoding["offset_mapping"]]


def _span(prompt: str, subject: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt) or re.search(re.escape(subject), prompt)
    if not found:
        raise ValueError(f"subject {subject!r} is not in the prompt {prompt!r}; render the prompt with it")
    inside = [
        position
        for position, (start, end) in enumerate(offsets)
        # a token that holds only the space before the subject is not part of it
        if prompt[max(start, found.start()) : min(end, found.end())].strip() and start < end
    ]
    if not inside:
        raise ValueError(f"subject {subject!r} has no token of its own in {prompt!r}; the tokenizer drops it")
    return inside[0], inside[-1]
