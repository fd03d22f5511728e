"""The experiments on guards, one function each: a `Ground` in, (arm, x, what was measured) out."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from mechunlearn.bench.guard_ground import GATED, Found, Ground
from mechunlearn.bench.guard_relearning import relearned
from mechunlearn.edit.edits import Edit, applied
from mechunlearn.evaluate.generation import generated
from mechunlearn.facts import FactSplit
from mechunlearn.features.gate import TooFewTexts
from mechunlearn.features.guard import Guard, without_clamp
from mechunlearn.features.selection import NothingFound
from mechunlearn.metrics import perplexity
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import encode, max_positions, tokenizer_of

# pandas has no complete types
# pyright: standard


def clamp_strength(ground: Ground) -> Found:
    """Forget against retain, for every arm: x is the clamp's strength, in mean residual norms."""
    yield "removed", 0.0, ground.measured(None)
    for arm in ("static", *GATED, "random"):
        guard = ground.guard(arm)
        assert guard.clamp is not None
        for strength in (0.03, 0.1, 0.2, 0.3, 0.5, 1.0):
            yield arm, strength, ground.measured(replace(guard, clamp=replace(guard.clamp, strength=strength)))


def number_of_features(ground: Ground) -> Found:
    """x: how many features are clamped."""
    for arm in ("static", "dsg", "share", "random"):
        for n in (1, 2, 5, 10, 20, 50):
            yield arm, n, ground.measured(ground.guard(arm, n_features=n))


def feature_rule(ground: Ground) -> Found:
    """The static clamp with the features of every rule; x is how many it found, of 20 at most."""
    rules = {"dsg": {}, "dsg, squared mean": {"importance": "squared_mean"}, "retain_sparsity": {},
             "count_difference": {}, "chi_squared": {}}  # fmt: skip
    for name, options in rules.items():
        try:
            guard = ground.guard("static", rule=name.partition(",")[0], rule_options=options)
        except NothingFound:
            continue
        yield name, len(guard.features), ground.measured(guard)


def gate_threshold(ground: Ground) -> Found:
    """x: share of texts to retain on which the gate may open; where it does open, and what is then left.

    achieved: the share of other such texts on which it opened, and that of each kind of them: statements near to the
    facts to forget, statements far from them, other text. "gate alone" opens and clamps nothing: the unedited model,
    bit for bit.
    """
    for arm in GATED:
        for rate in (0.01, 0.05, 0.1, 0.2, 0.4):
            try:
                guard = ground.guard(arm, false_positive_rate=rate)
            except TooFewTexts:
                continue
            yield arm, rate, {**achieved(guard), **ground.opened(guard), **ground.measured(guard)}
    yield "gate alone", 0.05, ground.measured(without_clamp(ground.guard("dsg")))


def achieved(guard: Guard) -> dict[str, float]:
    """The rates that a guard's calibration noted."""
    assert guard.gate is not None
    assert guard.gate.achieved_rate is not None  # for a quarter of the texts is kept for it
    said = "opens on text to retain, "
    kinds = {f"achieved {name.removeprefix(said)}": rate for name, rate in guard.notes.items() if name.startswith(said)}
    return {"achieved": guard.gate.achieved_rate, **kinds}


def dilution(ground: Ground) -> Found:
    """x: tokens of neutral text before each prompt; "removed" says what the model itself knows then."""
    guards = {"removed": None, **{arm: ground.guard(arm) for arm in ("static", *GATED)}}
    room = max_positions(ground.model, 10**6) - 40
    for n in [0, *(n for n in (4, 8, 16, 32, 64, 128, 256, 512, 1024) if n <= room)]:
        facts = [replace(fact, prompt=filler(ground.model, n, i) + fact.prompt)
                 for i, fact in enumerate(ground.parts["forget"])]  # fmt: skip
        for arm, guard in guards.items():
            with ground.inside(guard):
                yield arm, n, {"forget": ground.p_true(facts)}


def filler(model: Model, n_tokens: int, seed: int) -> str:
    """About so many tokens of neutral text, ended by a blank; "" for none."""
    if n_tokens == 0:
        return ""
    text, passages = "", neutral_text(1 + n_tokens // 8, seed)
    for passage in passages:
        text += passage + " "
        ids = encode(model, [text])[0]
        if len(ids) >= n_tokens:
            return str(tokenizer_of(model).decode(ids[:n_tokens], skip_special_tokens=True)).strip() + " "
    return text


def generation(ground: Ground) -> Found:
    """What the model writes on from each prompt, 24 tokens: how often the true answer is in it; x is 0.

    fluency: perplexity of what was written on prompts to forget, to the unguarded model, over that of what the
    unguarded model writes itself.
    """
    hf, tokenizer = ground.model.hf, tokenizer_of(ground.model)
    guards: dict[str, Edit | None] = {"removed": None}
    guards |= {arm: ground.guard(arm) for arm in ("static", "dsg", "share", "cusum", "random")}
    plain = 0.0
    for arm, guard in guards.items():
        found: dict[str, float] = {}
        for part, facts in ground.parts.items():
            prompts = [fact.ask(fact.prompt) for fact in facts]
            with ground.inside(guard):
                texts = generated(hf, tokenizer, prompts, max_new_tokens=24)
            named = [fact.target_true.lower() in text.lower() for fact, text in zip(facts, texts, strict=True)]
            found[f"{part} named"] = float(np.mean(named))
            if part == "forget":
                whole = [f"{prompt} {text}" for prompt, text in zip(prompts, texts, strict=True)]
                own = perplexity(ground.model, whole)
                plain = own if guard is None else plain
                found["fluency"] = own / plain
        yield arm, 0.0, found


def sequential(ground: Ground) -> Found:
    """Four requests, one guard each, made on the model without any and put on one after another; x is how many are on.

    The requests are the facts of four answers: of the one to forget, and of the three that most facts near to them
    have. "request 1" to "request 4" say what is known of each block, near and far of all others.
    """
    asked = requests(ground.split)
    if len(asked) < 4:
        return
    for arm in ("static", "dsg", "share"):
        made = [ground.guard(arm, split=split) for split in asked]
        with ExitStack() as guards:
            yield arm, 0, known_of_requests(ground, asked)
            for x, guard in enumerate(made, start=1):
                guards.enter_context(applied(ground.model, guard))
                yield arm, x, known_of_requests(ground, asked)


def requests(split: FactSplit, n: int = 4) -> list[FactSplit]:
    """A split of each request: the facts to forget, then those of the commonest other answers of their relation.

    None of them retains what another one is to forget.
    """
    relation, answers = split.forget[0].relation, {fact.target_true for fact in split.forget}
    same = [fact for fact in split.retain_train if fact.relation == relation and fact.target_true not in answers]
    others = [answer for answer, _ in Counter(fact.target_true for fact in same).most_common(n - 1)]
    blocks = [split.forget, *(tuple(fact for fact in same if fact.target_true == answer) for answer in others)]
    asked = {fact.key for block in blocks for fact in block}
    kept = tuple(fact for fact in split.retain_train if fact.key not in asked)
    return [replace(split, forget_shown=block, forget_hidden=(), attack_dev=(), retain_train=kept) for block in blocks]


def known_of_requests(ground: Ground, asked: Sequence[FactSplit]) -> dict[str, float]:
    """P(true) of each request's facts, of facts near to them that none asks for, and of those far from them."""
    gone = {fact.target_true for split in asked for fact in split.forget}
    near = [fact for fact in ground.parts.get("near", []) if fact.target_true not in gone]
    found = {f"request {i}": ground.p_true(ground.drawn(split.forget)) for i, split in enumerate(asked, start=1)}
    found |= {"near": ground.p_true(near)} if near else {}
    return found | ({"far": ground.p_true(ground.parts["far"])} if "far" in ground.parts else {})


def data_share(ground: Ground) -> Found:
    """x: share of the statements to forget and to retain that the guard is made on; none where that is too little."""
    for arm in ("static", "dsg", "share"):
        for share in (0.1, 0.25, 0.5, 1.0):
            try:
                guard = ground.guard(arm, data_share=share)
            except (TooFewTexts, NothingFound):
                continue
            yield arm, share, ground.measured(guard)


def zero_shot(ground: Ground) -> Found:
    """Features chosen by their descriptions alone, beside those of the rule; x is how many."""
    if ground.topic is None:
        return
    for arm in ("static", "dsg"):
        for n in (5, 20):
            for name, topic in (("described", ground.topic), ("counted", None)):
                try:
                    guard = ground.guard(arm, n_features=n, topic=topic)
                except NothingFound:
                    continue
                yield f"{arm}, {name}", n, ground.measured(guard)


EXPERIMENTS: dict[str, Callable[[Ground], Found]] = {
    function.__name__: function
    for function in (clamp_strength, number_of_features, feature_rule, gate_threshold, dilution, generation, sequential,
                     data_share, zero_shot, relearned)
}  # fmt: skip


def names_of(wanted: Sequence[str], allowed: Mapping[str, object] = EXPERIMENTS) -> tuple[str, ...]:
    """The experiments asked for, all if none is.

    Raises:
        ValueError: an unknown one.
    """
    if unknown := [name for name in wanted if name not in allowed]:
        raise ValueError(f"experiment: got {unknown[0]!r}, allowed: {', '.join(allowed)}")
    return tuple(wanted) or tuple(allowed)
