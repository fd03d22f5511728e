"""The experiments on code deletion (CodeUnlearn), one function each: a `Ground` in, (arm, x, what was measured) out."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from mechunlearn.bench.guard_experiments import Found, known_of_requests, requests
from mechunlearn.bench.guard_ground import Ground
from mechunlearn.codebook_model import codebook_of
from mechunlearn.edit.edits import applied
from mechunlearn.evaluate.generation import generated, generation_scores, normalized_drop
from mechunlearn.features.code_deletion import CodeDeletion, code_deletion
from mechunlearn.features.selection import NothingFound
from mechunlearn.metrics import known_facts
from mechunlearn.organisms.descriptions import VARIANTS, Description, descriptions
from mechunlearn.organisms.forget_sets import never_known
from mechunlearn.prompts import tokenizer_of

# pandas has no complete types
# pyright: standard

WITHOUT, NEVER_KNEW, NEVER_KNEW_WITHOUT = "no codebook", "never knew", "never knew, no codebook"
"""What stands beside a codebook model: the model it was made of, its never-knew twin, and what that was made of."""


def insertion(ground: Ground) -> Found:
    """What the codebook costs with nothing deleted: the model without it and with it, and so for the never-knew twin.

    The facts are those that the model without a codebook knows; near and far, of the twins, those that the twin without
    one knows, too. perplexity: over that of the same model without a codebook.
    """
    read = _known_by(ground, NEVER_KNEW_WITHOUT)
    pairs = (((WITHOUT, ground.on(WITHOUT)), ("nothing deleted", ground)),
             ((NEVER_KNEW_WITHOUT, read.on(NEVER_KNEW_WITHOUT)), (NEVER_KNEW, read.on(NEVER_KNEW))))  # fmt: skip
    for pair in pairs:
        before = pair[0][1].plain_perplexity
        for arm, of in pair:
            yield arm, 0.0, of.measured(None) | {"perplexity": of.plain_perplexity / before}


def deletion(ground: Ground) -> Found:
    """x: rounds of counting and deleting, each with what the round before deleted gone; 0 is nothing deleted.

    "random": as many others that are on as often in text to retain. "codebook taken out": the model around it alone,
    which who has the weights has. new codes: those that have stepped in for the deleted ones and belong to the topic
    as clearly, counted with them deleted.
    """
    yield "deleted", 0.0, ground.measured(None) | {"codes": 0.0}
    with codebook_of(ground.model).taken_out():
        yield "codebook taken out", 0.0, ground.measured(None)
    for rounds in (1, 2, 3, 5):
        for arm, at_random in (("deleted", False), ("random", True)):
            if (made := _deleted(ground, rounds=rounds, at_random=at_random)) is None:
                continue
            with applied(ground.model, made):
                stepped_in = _deleted(ground)
            n_new = 0 if stepped_in is None else len(stepped_in.codes)
            yield arm, rounds, ground.measured(made) | {"codes": float(len(made.codes)), "new codes": float(n_new)}


def wider_choice(ground: Ground) -> Found:
    """x: how many closest codes of every token are counted (the paper's wider set); k is what passes."""
    k = codebook_of(ground.model).shape.k
    for n in (k, 2 * k, 4 * k):
        if (made := _deleted(ground, n_closest=n)) is not None:
            yield "deleted", n, ground.measured(made) | {"codes": float(len(made.codes))}


def more_requests(ground: Ground) -> Found:
    """Four topics, one after another, none of them trained for; x is how many are deleted.

    seconds: to find the codes of the last one.
    """
    asked = requests(ground.split)
    yield "deleted", 0, known_of_requests(ground, asked)
    with ExitStack() as deletions:
        for x, split in enumerate(asked, start=1):
            started = time.monotonic()
            made = _deleted(replace(ground, split=split))
            seconds = time.monotonic() - started
            if made is not None:
                deletions.enter_context(applied(ground.model, made))
            yield "deleted", x, known_of_requests(ground, asked) | {"seconds": seconds}


def described(ground: Ground) -> Found:
    """The task that the model was trained for: describe a subject. Scores of what it writes, and how much was lost.

    topic: subjects to forget, asked as in training; variants: the same in wordings that no training held; rest: other
    subjects, all of whose facts the twin has read, too.
    drop is `normalized_drop`: 1 where it writes no better than the model that was never trained for the task.
    """
    told, read = descriptions(), descriptions(exclude=never_known())
    topic = _of(told, [fact.subject for fact in ground.parts["forget"]])
    others = [fact.subject for part in ("near", "far") for fact in ground.parts.get(part, [])]
    rest = [one for one in _of(told, others) if one == read.get(one.subject)]
    if not topic or not rest:
        return
    scored = {"untrained": _scores(ground.on(WITHOUT), topic, rest),
              "nothing deleted": _scores(ground, topic, rest),
              NEVER_KNEW: _scores(ground.on(NEVER_KNEW), topic, rest)}  # fmt: skip
    for arm, options in (("deleted", {}), ("deleted, 3 rounds", {"rounds": 3}), ("random", {"at_random": True})):
        if (made := _deleted(ground, **options)) is not None:
            with applied(ground.model, made):
                scored[arm] = _scores(ground, topic, rest)
    before, untrained = scored["nothing deleted"], scored["untrained"]
    for arm, scores in scored.items():
        drops = {f"{name} drop": normalized_drop(before[name], value, untrained[name])
                 for name, value in scores.items() if before[name] > untrained[name]}  # fmt: skip
        yield arm, 0.0, scores | drops


def _deleted(ground: Ground, **options: Any) -> CodeDeletion | None:
    """None where no code belongs to the topic."""
    try:
        return code_deletion(ground.model, ground.split, **options, seed=ground.seed)
    except NothingFound:
        return None


def _known_by(ground: Ground, name: str) -> Ground:
    """The ground with those facts near and far alone that a model beside knows."""
    parts = [ground.parts.get(part, []) for part in ("near", "far")]
    near, far = (tuple(known_facts(ground.beside[name], part)) for part in parts)
    return replace(ground, split=replace(ground.split, retain_test=near), far=far)


def _of(told: Mapping[str, Description], subjects: Sequence[str]) -> list[Description]:
    return [told[subject] for subject in dict.fromkeys(subjects) if subject in told]


def _scores(ground: Ground, topic: Sequence[Description], rest: Sequence[Description]) -> dict[str, float]:
    """Means of every score on each part."""
    tokenizer = tokenizer_of(ground.model)
    stop = [token for token in (tokenizer.bos_token_id,) if isinstance(token, int)]
    asked: dict[str, list[tuple[str, str]]] = {
        "topic": [(one.prompt(), one.text) for one in topic],
        "variants": [(one.prompt(wording), one.text) for one in topic for wording in VARIANTS],
        "rest": [(one.prompt(), one.text) for one in rest],
    }
    found: dict[str, float] = {}
    for part, pairs in asked.items():
        texts = generated(ground.model.hf, tokenizer, [prompt for prompt, _ in pairs], stop=stop)
        scores = generation_scores(texts, [reference for _, reference in pairs], bert_model=ground.bert_model)
        found |= {f"{part} {name}": float(np.mean(scores[name].to_numpy())) for name in scores.columns}
    return found


CODE_EXPERIMENTS: dict[str, Callable[[Ground], Found]] = {
    function.__name__: function for function in (insertion, deletion, wider_choice, more_requests, described)
}
