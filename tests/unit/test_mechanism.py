"""The check of an organism: attention that is blocked, bands beside each other, probes, base rates, the card."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mechunlearn.activations import blocked_attention, last_logits, pad, untouched
from mechunlearn.bench.check import Check, Subjects, check_model
from mechunlearn.bench.criteria import NEEDS, summary
from mechunlearn.bench.knowledge import base_rate, knowledge, plain_kinds, trained_kinds
from mechunlearn.bench.mechanism import _best, _candidates, measure_mechanism, neighbours, subject_first
from mechunlearn.bench.readable import readable_attributes
from mechunlearn.checkpoints import load_model
from mechunlearn.facts import Fact, FactSet
from mechunlearn.localize.attention_knockout import knock_out_attention
from mechunlearn.localize.bands import Band, ablate_bands
from mechunlearn.models import Model
from mechunlearn.organisms.card import write_card
from mechunlearn.prompts import token_roles
from mechunlearn.report.check import check_figure, sweep_figure
from mechunlearn.sources.bundled import load_bundled, load_templates

MakeModel = Callable[..., Model]
ARCHITECTURES = ("gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def atlas() -> Model:
    return load_model("atlas")


@pytest.fixture(scope="module")
def people() -> tuple[Fact, ...]:
    """160 facts of two attributes."""
    facts = load_bundled("people")
    return (*facts.of("pet").facts[:80], *facts.of("instrument").facts[:80])


@torch.no_grad()
def logits(model: Model, text: str, subject: str, layers: range) -> torch.Tensor:
    """Logits after the text when its last token cannot see the subject in the given layers."""
    ids, roles = token_roles(model, text, subject)
    tokens = pad(model, [ids, [*ids, *ids]])  # a longer row beside it, so that there is padding
    blocked = torch.zeros(2, tokens.ids.shape[1], tokens.ids.shape[1], dtype=torch.bool)
    blocked[0, len(ids) - 1, [i for i, role in enumerate(roles) if role.startswith("subject")]] = True
    with untouched(model), blocked_attention(model, layers, blocked):
        return last_logits(model, tokens)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_last_token_that_cannot_see_the_subject_does_not_depend_on_it(
    architecture: str, tiny_model: MakeModel
) -> None:
    """With one layer, attention from the last token is the only way from the subject to the answer."""
    model = tiny_model(architecture, n_layers=1 if architecture != "gpt_neo" else 2)
    first, second = ("Bram Petrov lives in", "Bram Petrov"), ("Cora Petrov lives in", "Cora Petrov")
    if len(token_roles(model, *first)[0]) != len(token_roles(model, *second)[0]):
        second = ("Bram Okafor lives in", "Bram Okafor")
    layers = range(1)
    if architecture == "gpt_neo":  # its second kind of layer is local; here only the first may carry anything
        for parameter in model.hf.transformer.h[1].parameters():  # pyright: ignore[reportAttributeAccessIssue]
            parameter.data.zero_()
    seen = [logits(model, *text, layers=range(0)) for text in (first, second)]
    hidden = [logits(model, *text, layers=layers) for text in (first, second)]
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-5, rtol=1e-5)


def test_blocking_nothing_changes_nothing_and_hooks_are_gone_afterwards(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    text = ("Bram Petrov lives in", "Bram Petrov")
    ids, _ = token_roles(model, *text)
    with torch.no_grad(), untouched(model):
        plain = last_logits(model, pad(model, [ids]))[0]
        with blocked_attention(model, range(3), torch.zeros(1, len(ids), len(ids), dtype=torch.bool)):
            same = last_logits(model, pad(model, [ids]))[0]
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-5)
    logits(model, *text, layers=range(3))
    assert not any(module._forward_pre_hooks for module in model.hf.modules())


def test_knocking_out_no_layer_gives_the_clean_answers(atlas: Model, people: tuple[Fact, ...]) -> None:
    correct = knock_out_attention(atlas, people[:20], [])
    clean = ablate_bands(atlas, people[:20], [Band(first=1, last=1)]).sort_values("fact")["clean"]
    assert correct == clean.tolist()
    with pytest.raises(ValueError, match="got layers \\[9\\], allowed: 0 to 7"):
        knock_out_attention(atlas, people[:20], [9])


def test_neighbours_are_of_the_same_size_leave_layer_0_out_and_do_not_overlap() -> None:
    for first, last in ((1, 3), (2, 3), (3, 5), (4, 7), (1, 7)):
        found = neighbours(Band(first=first, last=last), 8)
        size = last - first + 1
        assert found["band"].layers == found["band at the last token"].layers
        assert found["band at the last token"].role == "last"
        assert found["MLP 0 beside the band"] == Band(first=0, last=0, held=found["band"].layers)
        for name in {"earlier", "later"} & set(found):
            beside = found[name].layers
            assert 0 not in beside
            assert len(beside) <= size
            assert not set(beside) & set(found["band"].layers)
        assert ("earlier" in found) == (first > 1)
        assert ("later" in found) == (last < 7)


@pytest.mark.parametrize("n_layers", [3, 4, 8, 12, 32])
def test_a_band_with_a_costly_neighbour_however_short_is_not_chosen(n_layers: int) -> None:
    bands = _candidates(n_layers)
    assert all(max(band.first - 1, n_layers - 1 - band.last) >= len(band.layers) for band in bands)
    measured = {b for band in bands for b in (band, *neighbours(band, n_layers).values()) if b.role == "subject"}
    rows = [  # MLP 1 alone carries everything
        {"first": b.first, "last": b.last, "clean": 1.0, "correct": float(b.first > 1), "donor": 0.0} for b in measured
    ]
    best = _best(pd.DataFrame(rows), bands, n_layers)
    assert best.first == 1


def test_mlp_1_acts_through_those_that_follow_when_their_outputs_are_not_held(
    atlas: Model, people: tuple[Fact, ...]
) -> None:
    freely, beside = (
        ablate_bands(atlas, people[:60], [Band(first=1, last=1, held=held)])["correct"].mean() for held in ((), (2, 3))
    )
    assert freely < 0.6
    assert beside > 0.85
    with pytest.raises(ValueError, match="none of them held"):
        ablate_bands(atlas, people[:4], [Band(first=0, last=1, held=(1,))])


def test_a_prompt_is_usable_if_the_subject_comes_before_the_relation() -> None:
    fact = Fact(
        subject="Ann",
        relation="city",
        prompt="The home city of {} is",
        target_true="Rome",
        paraphrases=("Fact: {} lives in", "As neighbors know, {} lives in", "I met {}"),
    )
    asked = subject_first(fact)
    assert asked is not None
    assert asked.prompt == "Fact: {} lives in"
    assert subject_first(replace(fact, paraphrases=())) is None


def test_atlas_looks_its_facts_up_in_a_band_at_the_subject(atlas: Model, people: tuple[Fact, ...]) -> None:
    found = measure_mechanism(atlas, people)
    share = found.ablations.groupby("intervention")[["clean", "correct", "donor"]].mean()
    assert found.band.first >= 1
    assert share.loc["MLP 0 beside the band", "correct"] > 0.85
    assert share.loc["band", "correct"] < 0.3 < 0.6 < share.loc["band", "donor"]
    assert share.loc["later", "correct"] > 0.8
    assert share.loc["band at the last token", "correct"] > 0.9
    assert set(found.ablations["relation"]) == {"pet", "instrument"}
    assert len(found.knockouts) == found.knockouts["fact"].nunique() * 16  # none, 7 from the start, 8 to the end


def test_what_is_readable_rises_over_the_band_and_not_in_a_model_without_the_facts(
    atlas: Model, tiny_model: MakeModel
) -> None:
    pets = load_bundled("people").of("pet").facts[:300]
    curve = readable_attributes(atlas, pets).set_index("layer")
    assert curve.loc[5, "accuracy"] - curve.loc[5, "baseline"] > 0.4 > curve.loc[0, "accuracy"]
    assert curve["twin"].isna().all()
    assert (curve["n"] == 300).all()
    ignorant = readable_attributes(tiny_model("llama"), pets)
    assert (ignorant["accuracy"] - ignorant["baseline"]).max() < 0.2
    assert readable_attributes(atlas, []).empty


def test_the_twins_probe_is_a_baseline_on_what_it_never_read_alone(atlas: Model) -> None:
    pets = load_bundled("people").of("pet").facts[:200]
    unread = {(fact.subject, fact.relation) for fact in pets[:50]}
    curve = readable_attributes(atlas, pets, twin=atlas, unread=unread).set_index(["part", "layer"])
    part = curve.loc["unknown to the twin"]
    assert (part["n"] == 50).all()
    assert (part["twin"] == part["accuracy"]).all()  # the model as its own twin shows nothing of its own
    assert curve.loc["all", "twin"].isna().all()


def test_base_rates_come_from_the_known_facts_alone(tiny_model: MakeModel, tiny_facts: FactSet) -> None:
    model = tiny_model("llama")
    facts = tiny_facts.of("colour").facts
    known = [replace(fact, target_true="red", choices=(), target_new=None) for fact in facts[:8]]
    unknown = [replace(fact, target_true="blue", choices=(), target_new=None) for fact in facts[8:12]]
    assert base_rate(model, known, unknown)[1] == 0.0
    unknown = [replace(fact, target_true="red") for fact in unknown[:1]] + unknown[1:]
    assert base_rate(model, known, unknown) == ("most frequent answer", 0.25)
    assert base_rate(model, known, [replace(fact, relation="other") for fact in unknown])[1] == 0.0


def test_the_base_rate_reads_names_where_names_tell(tiny_model: MakeModel) -> None:
    """Every name that ends in Petrov likes red, every Okafor blue: the name predictor is taken, and right."""
    model = tiny_model("llama")
    fact = Fact(subject="x", relation="colour", prompt="{} likes", target_true="red", choices=("red", "blue"))
    firsts = ("Bram", "Cora", "Dora", "Emil", "Finn", "Gus", "Hana", "Ivo", "Jan", "Kai")
    facts = [
        replace(fact, subject=f"{first} {last}", target_true=answer)
        for first in firsts
        for last, answer in (("Petrov", "red"), ("Okafor", "blue"))
    ]
    assert base_rate(model, facts[:16], facts[16:]) == ("name tokens", 1.0)


def test_forms_unseen_in_training_are_asked_apart_from_seen_ones(atlas: Model) -> None:
    facts = load_bundled("people").of("pet").facts[:40]
    kinds = trained_kinds(load_templates("people"))
    for fact in facts:
        assert kinds["seen"](fact) != kinds["unseen"](fact)
        assert kinds["question"](fact) != kinds["unseen question"](fact)
    table = knowledge(atlas, facts, kinds).set_index("kind")
    assert list(table.index) == list(kinds)
    assert (table["n"] == 40).all()
    assert table.loc["seen", "accuracy"] > 0.9
    bare = [replace(fact, paraphrases=(), questions=()) for fact in facts]
    assert list(knowledge(atlas, bare, plain_kinds())["kind"]) == ["prompt"]


@pytest.fixture(scope="module")
def checked(atlas: Model, people: tuple[Fact, ...]) -> Check:
    """A check of two relations; the second data set's facts are unknown to the model."""
    nonsense = tuple(
        replace(fact, subject=f"{fact.subject}zu", relation="pet of nobody")
        for fact in people
        if fact.relation == "pet"
    )
    groups = [
        Subjects(dataset="people", facts=people, kinds=plain_kinds()),
        Subjects(dataset="nobody", facts=nonsense, kinds=plain_kinds()),
    ]
    return check_model(atlas, groups)


def test_a_check_fails_what_a_model_does_not_know_and_holds_what_it_does(checked: Check) -> None:
    rows = checked.criteria.set_index(["dataset", "criterion"])
    assert set(checked.criteria["criterion"]) <= set(NEEDS)
    assert rows.loc[("people", "knows, prompt"), "outcome"] == "holds"
    assert rows.loc[("nobody", "knows, prompt"), "outcome"] == "fails"
    assert rows.loc[("people", "(b) cost of ablating band"), "outcome"] == "holds"
    assert rows.loc[("nobody", "(a) readable at the subject, above baselines"), "outcome"] == "fails"
    shares = checked.criteria.dropna(subset="lower")
    assert ((shares["lower"] <= shares["measured"] + 1e-3) & (shares["measured"] <= shares["upper"] + 1e-3)).all()


def test_what_cannot_be_measured_is_a_row_that_says_why_and_never_holds(
    tiny_model: MakeModel, people: tuple[Fact, ...]
) -> None:
    """An ignorant model of two layers, facts without questions: most criteria cannot even be asked."""
    bare = tuple(replace(fact, questions=()) for fact in people[:40])
    group = Subjects(dataset="bare", facts=bare, kinds=plain_kinds())
    found = check_model(tiny_model("llama", n_layers=2), [group], twin=tiny_model("llama", n_layers=2))
    rows = found.criteria.set_index("criterion")
    for criterion in (
        "knows, question",
        "knows, choice",
        "(b) cost of ablating band",
        "(d) cost of blocking it after the band",
    ):
        assert rows.loc[criterion, "outcome"] == "not measured"
        assert np.isnan(rows.loc[criterion, "measured"])
        assert rows.loc[criterion, "note"]
    assert f"{(rows['outcome'] == 'not measured').sum()} not measured" in summary(found.criteria)
    assert not [trace for trace in check_figure(found).data if trace.type == "bar"]  # no mechanism was measured
    with pytest.raises(ValueError, match="of different names"):
        check_model(tiny_model("llama"), [group, group])


def test_pairs_without_a_donor_do_not_count_as_failures_to_give_the_donors_answer(
    atlas: Model, people: tuple[Fact, ...]
) -> None:
    lone = [replace(fact, relation=f"only {i}") for i, fact in enumerate(people[:4])]
    rows = ablate_bands(atlas, [*people[:20], *lone], [Band(first=1, last=3)]).set_index("fact")
    assert rows["has_donor"].tolist().count(False) == 4
    assert not rows.loc[[20, 21, 22, 23], "has_donor"].any()


def test_the_checks_figure_escapes_names_and_shows_every_data_set(checked: Check) -> None:
    figure = check_figure(replace(checked, name="<b>x</b>"))
    assert "&lt;b&gt;" in str(figure.layout.title.text)
    names = {trace.name for trace in figure.data if trace.type == "bar" and trace.name}
    assert any(name.startswith("people (band m") for name in names)
    rows = checked.criteria.assign(recipe="one")
    drawn = sweep_figure(pd.concat([rows, rows.assign(recipe="two")]))
    assert {trace.type for trace in drawn.data} == {"heatmap"}
    assert len(np.asarray(drawn.data[0].z)) == 2


def test_a_card_needs_an_organisms_folder_and_holds_the_criteria(checked: Check, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no card\.json"):
        write_card(tmp_path, checked)
    card = {
        "name": "small", "recipe": {"tokens": 5, "seed": 1, "datasets": ["people"]}, "n_facts": 3, "n_subjects": 2,
        "read_the_default_forget_sets": False, "n_excluded_facts": 7, "parameters": 9, "torch": "2",
        "license": "CC0-1.0", "sha256": "abc",
    }  # fmt: skip
    (tmp_path / "card.json").write_text(json.dumps(card))
    text = write_card(tmp_path, checked).read_text()
    assert "never read the 7 facts" in text
    assert "knows, prompt" in text
    assert "`abc`" in text
