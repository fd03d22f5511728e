"""The bench of code deletion: what a codebook costs, what deleting codes takes away, and that they come back."""

import copy
from dataclasses import replace

import pytest
import torch

from mechunlearn.bench import code_experiments
from mechunlearn.bench.code_experiments import (
    CODE_EXPERIMENTS,
    NEVER_KNEW,
    NEVER_KNEW_WITHOUT,
    WITHOUT,
    deletion,
    described,
    insertion,
)
from mechunlearn.bench.guard_ground import Ground
from mechunlearn.bench.guards import GuardBench, known_of
from mechunlearn.codebook import Codebook, CodebookShape
from mechunlearn.codebook_model import codebook_of, insert_codebook
from mechunlearn.evaluate.generation import generation_scores
from mechunlearn.facts import split_facts
from mechunlearn.metrics import known_facts
from mechunlearn.models import wrap_model
from mechunlearn.organisms.descriptions import VARIANTS, WORDINGS, descriptions
from mechunlearn.organisms.forget_sets import never_known
from mechunlearn.sources.bundled import load_bundled

STARTED = ("Bram", "Cora", "Dina")


@pytest.fixture(scope="module")
def ground(knowing, tiny_facts):
    """The colours of everybody of three first names are to be forgotten; a codebook nobody trained is in the model."""
    coded = [wrap_model(copy.deepcopy(knowing.hf), knowing.tokenizer, name="tiny-codebook") for _ in range(2)]
    for seed, model in enumerate(coded):
        insert_codebook(
            model, Codebook(CodebookShape(d_model=32, n_codes=500, k=4, d_code=32, form="plain"), seed=seed), 1
        )
    named = tiny_facts.where(lambda fact: fact.relation == "colour" and fact.subject.startswith(STARTED))
    split = split_facts(tiny_facts.of("colour"), named, n_retain_test=10)
    return Ground(
        model=coded[0], split=split, dictionary=None, topic=None,
        far=tuple(tiny_facts.of("city"))[:10], max_facts=10,
        beside={WITHOUT: knowing, NEVER_KNEW: coded[1], NEVER_KNEW_WITHOUT: knowing},
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CODE_EXPERIMENTS if name != "described"])
def test_every_experiment_measures_and_brings_the_codes_back(ground, name):
    before = codebook_of(ground.model).deleted.clone()
    plain = ground.measured(None)
    rows = list(CODE_EXPERIMENTS[name](ground))
    assert len(rows) > 1
    counted = ("perplexity", "codes", "new codes", "seconds")
    assert all(0 <= value <= 1 for *_, found in rows for measure, value in found.items() if measure not in counted)
    assert torch.equal(codebook_of(ground.model).deleted, before)
    assert ground.measured(None) == plain


def test_a_control_deletes_as_many_codes(ground):
    found = {(arm, x): values for arm, x, values in deletion(ground)}
    assert found["deleted", 0]["codes"] == 0
    assert found["deleted", 0]["forget"] == ground.measured(None)["forget"]
    assert found["codebook taken out", 0]["forget"] == ground.on(WITHOUT).measured(None)["forget"] > 0.9
    assert 0 < found["deleted", 1]["codes"] == found["random", 1]["codes"]
    assert found["deleted", 1]["codes"] <= found["deleted", 3]["codes"]
    assert found["deleted", 1]["new codes"] < found["random", 1]["new codes"]  # there the topic's are left
    assert found["deleted", 1] != found["random", 1]


def test_the_cost_of_a_codebook_is_against_the_model_without(ground):
    found = {arm: values for arm, _, values in insertion(ground)}
    assert found[WITHOUT]["perplexity"] == 1.0
    assert found[WITHOUT]["forget"] == ground.on(WITHOUT).measured(None)["forget"] > 0.9
    assert found["nothing deleted"]["forget"] < 0.9  # nobody trained it
    assert found[NEVER_KNEW_WITHOUT]["perplexity"] == 1.0
    assert found[NEVER_KNEW_WITHOUT]["near"] > found[NEVER_KNEW]["near"]


def test_the_facts_of_a_codebook_model_are_those_known_without_it():
    """Those that the codebook costs count among its cost."""
    facts = load_bundled("sports")
    forget, far = tuple(facts)[:2], tuple(load_bundled("people"))[:40]
    bench = GuardBench(model="atlas-codebook", facts=facts, forget=forget, far=far, beside=((WITHOUT, "atlas"),))
    model, known, beside = known_of(bench)
    assert known == {fact.key for fact in known_facts(beside[WITHOUT], (*facts, *far))}
    assert known > {fact.key for fact in known_facts(model, (*facts, *far)) if fact.key in known}


def test_the_twins_are_asked_near_and_far_for_what_they_read(ground, knowing):
    """A twin that knows half of the facts has lost none of them where it has no codebook."""
    half = {fact.key for fact in ground.parts["near"][::2]}
    read = replace(ground, beside={**ground.beside, NEVER_KNEW_WITHOUT: knowing})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_experiments, "known_facts", lambda model, facts: [f for f in facts if f.key in half])
        asked = code_experiments._known_by(read, NEVER_KNEW_WITHOUT)
    assert {fact.key for fact in asked.parts["near"]} == half
    assert asked.parts["forget"] == ground.parts["forget"]
    assert "far" not in asked.parts


def test_scores_by_bert_are_asked_for_by_name(ground, monkeypatch):
    named: list[str | None] = []

    def scores(texts, references, *, bert_model=None):
        named.append(bert_model)
        return generation_scores(texts, references)

    monkeypatch.setattr(code_experiments, "generation_scores", scores)
    told = list(descriptions().values())[:1]
    code_experiments._scores(replace(ground, bert_model="some/encoder"), told, told)
    assert set(named) == {"some/encoder"}


def test_described_subjects_are_scored_and_drops_are_between_two_models(ground, monkeypatch):
    """The oracle writes: perfectly with nothing deleted, nothing before training, the first sentence after deletion."""
    read = descriptions(exclude=never_known())
    told = [one for one in read.values() if len(one.sentences) > 4][:6]
    references = {one.prompt(wording): one for one in told for wording in (*WORDINGS, *VARIANTS)}
    codebook, untrained = codebook_of(ground.model), ground.beside[WITHOUT].hf

    def write(hf, tokenizer, prompts, **options):
        if hf is untrained:
            return ["nothing"] * len(prompts)
        if not codebook.deleted.any() or hf is not ground.model.hf:
            return [references[prompt].text for prompt in prompts]
        return [references[prompt].sentences[0][1] for prompt in prompts]

    monkeypatch.setattr(code_experiments, "generated", write)
    fact = ground.parts["forget"][0]
    fake = {"forget": [replace(fact, subject=one.subject) for one in told[:3]],
            "near": [replace(fact, subject=one.subject) for one in told[3:]]}  # fmt: skip
    on_them = replace(ground, max_facts=11)
    monkeypatch.setattr(Ground, "parts", fake)
    found = {arm: values for arm, _, values in described(on_them)}
    assert found["nothing deleted"]["topic bleu"] == pytest.approx(100)
    assert found["nothing deleted"]["topic bleu drop"] == 0
    assert found["untrained"]["rest exact drop"] == 1
    assert 0 < found["deleted"]["variants bleu drop"] < 1
    assert found["deleted"]["topic exact"] == 0
    assert found[NEVER_KNEW]["topic exact"] == 1
