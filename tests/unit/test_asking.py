from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mechunlearn.attack import asking
from mechunlearn.facts import FactSplit
from mechunlearn.metrics import candidate_log_probs, score_facts
from mechunlearn.prompts import candidates, encode

PARTS = {"few_shot:shown": "forget_shown", "few_shot:retained": "retain_train"}


@pytest.fixture(scope="module")
def split(tiny_split) -> FactSplit:
    """A short one: few-shot rows are long."""
    return replace(tiny_split, forget_hidden=tiny_split.forget_hidden[:5], attack_dev=tiny_split.attack_dev[:2])


@pytest.fixture
def asked(monkeypatch):
    """The facts as they were put to the model, in order."""
    seen = []

    def spy(model, facts, form="prompt", **options):
        seen.extend((fact, form) for fact in facts)
        return score_facts(model, facts, form, **options)

    monkeypatch.setitem(asking.__globals__, "scores_in_form", spy)
    return seen


def few_shot_texts(asked, fact):
    """The few-shot texts of one fact."""
    return [f.ask(f.prompt) for f, form in asked if f.subject == fact.subject and f.prompt != fact.prompt]


def said(fact, other):
    """What a demonstration of another fact says in this fact's words."""
    return f"{other.ask(fact.prompt)} {other.target_true}."


def test_few_shot_shows_true_statements_that_the_attacker_may_know_and_no_others(tiny_model, split, asked):
    asking(tiny_model(), split, shots=3)
    for fact in (*split.attack_dev, *split.forget_hidden):
        texts = few_shot_texts(asked, fact)
        assert len(texts) == len(PARTS)
        for text, part in zip(texts, PARTS.values(), strict=True):
            *shown, last = text.split("\n")
            allowed = {said(fact, other) for other in getattr(split, part) if other.relation == fact.relation}
            assert last == fact.ask(fact.prompt)
            assert 1 <= len(set(shown)) == len(shown) <= 3
            assert set(shown) <= allowed


def test_few_shot_scores_are_those_of_the_whole_text(tiny_model, split, asked):
    model = tiny_model()
    result = asking(model, split, shots=1)
    for n, form in enumerate(PARTS):
        p_true = []
        for fact in split.forget_hidden:
            among = candidates(fact)
            log_p = candidate_log_probs(model, [few_shot_texts(asked, fact)[n]], [among])[0].double()
            p_true.append(float(log_p.softmax(-1)[among.index(fact.target_true)]))
        rows = result.rows.loc[result.rows["setting"] == form]
        assert rows["p_true"].tolist() == pytest.approx(p_true, abs=1e-5)
        assert p_true != pytest.approx(result.before["p_true"].tolist(), abs=1e-3)  # the statements matter


def test_statements_are_cut_to_what_the_model_has_positions_for(tiny_model, split, asked):
    model = tiny_model()
    asking(model, split, shots=20)
    for fact in split.forget_hidden:
        for text, part in zip(few_shot_texts(asked, fact), PARTS.values(), strict=True):
            others = [other for other in getattr(split, part) if other.relation == fact.relation]
            statement = max(len(encode(model, [said(fact, other)])[0]) for other in others)
            assert 64 - statement < len(encode(model, [text])[0]) <= 64


def test_the_statements_of_a_fact_depend_on_the_seed_and_not_on_other_facts(tiny_model, split, asked):
    model, fact = tiny_model(), split.forget_hidden[-1]

    def texts(hidden, seed):
        asked.clear()
        asking(model, replace(split, forget_hidden=hidden), shots=2, seed=seed)
        return few_shot_texts(asked, fact)

    assert texts(split.forget_hidden, 0) == texts((fact,), 0) != texts((fact,), 1)


def test_without_statements_there_is_no_few_shot(tiny_model, split):
    forms = {"prompt", "paraphrase:0", "question:0", "choice"}
    assert set(asking(tiny_model(), split, shots=0).notes["dev_p_true"]) == forms
    bare = replace(split, retain_train=tuple(f for f in split.retain_train if f.relation == "city"))
    assert set(asking(tiny_model(), bare).notes["dev_p_true"]) == {*forms, "few_shot:shown"}


def test_a_fact_that_lacks_the_chosen_form_is_asked_in_its_prompt_and_has_no_row_in_that_form(
    tiny_model, tiny_facts, split, monkeypatch
):
    def only_after_examples(model, facts, form="prompt", **options):
        p_true = [0.9 if "\n" in fact.prompt else 0.1 for fact in facts]
        return score_facts(model, facts, form, **options).assign(p_true=p_true)

    subjects = {fact.subject for fact in split.forget_hidden}
    cities = tuple(tiny_facts.where(lambda fact: fact.relation == "city" and fact.subject in subjects))
    kept = tuple(fact for fact in split.retain_train if fact.relation == "colour")
    mixed = replace(split, forget_hidden=(*cities[:2], *split.forget_hidden, *cities[2:]), retain_train=kept)
    monkeypatch.setitem(asking.__globals__, "scores_in_form", only_after_examples)
    for every_form in (True, False):
        result = asking(tiny_model(), mixed, report_all_forms=every_form)
        assert result.chosen in PARTS
        final = result.final()
        assert final["subject"].tolist() == [fact.subject for fact in mixed.forget_hidden]
        assert final["p_true"].tolist() == [0.9 if f.relation == "colour" else 0.1 for f in mixed.forget_hidden]
        if not every_form:
            assert result.by_form is None
            assert set(result.rows["setting"]) == {"prompt", result.chosen}
            continue
        assert result.by_form is not None
        assert set(result.by_form.query("setting == @result.chosen")["relation"]) == {"colour"}
        counts = result.by_form["setting"].value_counts()
        n = len(mixed.forget_hidden)
        assert counts.to_dict() == {
            **dict.fromkeys(("prompt", "paraphrase:0", "question:0", "choice"), n), **dict.fromkeys(PARTS, 5)
        }  # fmt: skip


def test_every_form_of_every_hidden_fact_is_kept_for_looking_at_single_facts(tiny_model, split):
    model = tiny_model()
    by_form = asking(model, split).by_form
    assert by_form is not None
    for form in ("prompt", "paraphrase:0", "question:0"):
        direct = score_facts(model, split.forget_hidden, form)
        own = by_form.loc[by_form["setting"] == form].reset_index(drop=True)
        pd.testing.assert_frame_equal(
            own[["p_true", "correct", "top"]], direct[["p_true", "correct", "top"]], atol=1e-5
        )
        assert own["subject"].tolist() == [fact.subject for fact in split.forget_hidden]


def test_guessing_in_multiple_choice_scores_chance(tiny_model, split, monkeypatch):
    """Whoever picks one of four options with certainty and no knowledge is right a quarter of the time."""

    def picking(model, facts, form="prompt", **_):
        p_true = [float(i % 4 == 0) if form == "choice" else 0.0 for i in range(len(facts))]
        return score_facts(model, facts, form).assign(p_true=p_true)

    facts = [replace(fact, choices=("red", "blue", "green", "black", "grey")) for fact in split.forget_hidden[:1]]
    many = tuple(replace(facts[0], subject=f"{facts[0].subject} {i}", target_true="red") for i in range(8))
    monkeypatch.setattr("mechunlearn.attack.by_form.score_facts", picking)
    result = asking(tiny_model(), replace(split, attack_dev=many, forget_hidden=many))
    assert result.chosen == "choice"
    assert np.mean(list(result.hidden_scores().values())) == pytest.approx(0.2, abs=0.01)
