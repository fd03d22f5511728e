"""How nouns show themselves in a notebook: their own numbers, and nothing of a user's text acts as HTML."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mechunlearn.attack.results import AttackResult, Health
from mechunlearn.components import Component, ComponentScores
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.evaluate.results import Evaluation
from mechunlearn.facts import Fact, FactSet
from mechunlearn.html_card import html_card
from mechunlearn.localize.edges import EdgeScores
from mechunlearn.localize.faithfulness import FaithfulnessCurve
from mechunlearn.localize.lens_map import LensMap
from mechunlearn.localize.patching_map import PatchingMap
from mechunlearn.localize.stability import Stability
from mechunlearn.masks import mask_of
from mechunlearn.runs import Cell, Run
from mechunlearn.verdict import AttackRow, Verdict

HOSTILE = "<script>alert('1')</script>"


def test_a_card_escapes_everything_cuts_what_is_long_and_leaves_out_what_is_empty():
    card = html_card(HOSTILE, {HOSTILE: HOSTILE, "none": None, "long": "x" * 500}, [(HOSTILE,), (HOSTILE,), (0.12345,)])
    assert "<script" not in card
    assert card.count("&lt;script") == 5
    assert "none" not in card
    assert "x" * 160 not in card
    assert "0.123<" in card
    assert "<table" not in html_card("a", {})


def test_facts_show_their_prompt_and_sets_their_counts(tiny_facts, tiny_split):
    fact = replace(tiny_facts[0], subject=HOSTILE)
    assert "The favourite colour of &lt;script" in fact._repr_html_()
    assert "<script" not in fact._repr_html_()
    card = tiny_facts._repr_html_()
    assert "<b>facts</b>: 80" in card
    assert "<b>subjects</b>: 40" in card
    assert "72 more" in card
    assert "more" not in tiny_facts[:3]._repr_html_()
    split = tiny_split._repr_html_()
    for part in ("forget_shown", "forget_hidden", "attack_dev", "retain_train", "retain_test", "same_subject"):
        assert f">{part}<" in split
    assert f">{len(tiny_split.retain_train)}<" in split
    assert FactSet(name="empty", facts=())._repr_html_()
    assert "&lt;b&gt;" in Fact(subject="a", relation="<b>", prompt="{}", target_true="b")._repr_html_()


def test_scores_show_their_largest_components():
    per_fact = np.zeros((2, 12, 1))
    per_fact[:, 11] = [[-3.0], [-5.0]]
    scores = ComponentScores(
        method=HOSTILE, metric="logit_diff", sign="s", components=tuple(Component("mlp", i) for i in range(12)),
        roles=("last",), per_fact=per_fact,
    )  # fmt: skip
    card = scores._repr_html_()
    assert "<script" not in card
    assert card.index(">m11<") < card.index(">m0<")
    assert "-4.000" in card
    assert "1.000" in card  # standard error of -3 and -5
    assert card.count("<tr>") == 9


def test_edges_curves_masks_and_verdicts_show_their_numbers(tiny_model):
    edges = EdgeScores(metric="m", sign=HOSTILE, writers=("embed",), readers=("m0", "logits"),
                       per_fact=np.array([[[0.25, -0.5]]]))  # fmt: skip
    card = edges._repr_html_()
    assert card.index(">logits<") < card.index(">m0<")
    assert "-0.500" in card
    curve = FaithfulnessCurve(method=HOSTILE, sizes=(0.5, 1.0), n_components=(1, 2), f=np.array([0.5, 1.0]),
                              completeness=np.array([0.125, 0.0]))  # fmt: skip
    assert "0.375" in curve._repr_html_()  # CPR: half of 0.75
    assert "0.125" in curve._repr_html_()
    mask = mask_of(tiny_model(), [Component("mlp", 1)])
    assert f"{mask.n_selected:,} entries may change" in mask._repr_html_()
    assert "m1" in mask._repr_html_()
    row = AttackRow(name=HOSTILE, share=0.321, lower=0.1, upper=0.5, sd=1.0, n_facts=7, n_seeds=1, decides=True,
                    healthy=True, powered=True, zero_budget=False)  # fmt: skip
    verdict = Verdict(label="hidden", still_expressed=True, rows=(row,), reason=HOSTILE, settle=None, delta=0.1,
                      denominator=0.9, null="twin")  # fmt: skip
    shown = verdict._repr_html_()
    assert "hidden (still expressed)" in shown
    assert "0.321" in shown
    for text in (card, curve._repr_html_(), shown):
        assert "<script" not in text


def test_models_and_edits_show_what_they_are_made_of(tiny_model):
    model = tiny_model("llama")
    card = replace(model, name=HOSTILE)._repr_html_()
    assert "4 heads (2 with keys and values) and 48 neurons" in card
    assert f"{sum(p.numel() for p in model.hf.parameters()):,}" in card
    mask = mask_of(model, [Component("mlp", 1)])
    edit = WeightEdit(
        values={name: torch.zeros(int(mask.full(name).sum())) for name in mask.entries}, mask=mask, base_name=HOSTILE,
        base_sha256="0123456789abcdef", method=HOSTILE, options={HOSTILE: 0.25}, history=(2.0, 1.0, 0.5),
    )  # fmt: skip
    shown = edit._repr_html_()
    for text in (f"{mask.n_selected:,}", "m1", "0123456789ab)", "2.000 to 0.500 in 3 steps", "0.250"):
        assert text in shown
    assert "training loss" not in replace(edit, history=())._repr_html_()
    for text in (card, shown):
        assert "<script" not in text


def test_attacks_and_runs_show_what_came_back():
    columns = {"subject": ["a", "b"], "relation": "r", "answer": "x", "part": "forget_hidden", "step": 3}
    rows = pd.DataFrame({**columns, "setting": HOSTILE, "p_true": [0.5, 0.75], "correct": [True, True], "top": "x"})
    before = rows.assign(p_true=0.125, correct=False)
    attack = AttackResult(
        attack="relearning", access="weights", decides=True, rows=rows, before=before, chosen=HOSTILE, chosen_step=3,
        health=Health(perplexity_ratio=9.0), options={}, seed=0, model=HOSTILE, notes={},
    )  # fmt: skip
    card = attack._repr_html_()
    for text in (">0.125<", ">0.625<", ">1.000<", "step 3", "perplexity x9.00"):
        assert text in card
    verdict = Verdict(label="hidden", still_expressed=True, rows=(), reason="", settle=None, delta=0.1, denominator=0.9,
                      null="twin")  # fmt: skip
    evaluation = Evaluation(rows=pd.DataFrame(), options={})
    cell = Cell(name=HOSTILE, role="arm", verdict=verdict, evaluation=evaluation, edited=(attack,), null=(attack,),
                components=("m1", "m2"), share=0.25)  # fmt: skip
    manifest = {"name": HOSTILE, "model": {"name": "atlas"}, "twin": None}
    run = Run(manifest=manifest, scores={}, agreement=pd.DataFrame(), cells=(cell,))._repr_html_()
    for text in ("<b>model</b>: atlas", "m1, m2", "25.0%", "hidden (still expressed)"):
        assert text in run
    assert "twin" not in run
    for text in (card, run):
        assert "<script" not in text


def test_maps_of_one_prompt_and_stability_show_their_numbers():
    values = np.zeros((3, 4))
    values[1, 2], values[2, 3] = 0.75, -0.875
    patching = PatchingMap(
        tokens=("a", HOSTILE, " b", " c"), components=tuple(Component("mlp", i) for i in range(3)), values=values,
        clean=2.0, corrupt=-1.0, donor=HOSTILE,
    )  # fmt: skip
    card = patching._repr_html_()
    assert card.index("-0.875") < card.index("0.750")
    assert ">m1<" in card
    assert ">2:  b<" in card
    assert card.count("<tr>") == 9
    p = np.linspace(0, 1, 20).reshape(10, 2)
    lens = LensMap(
        prompt=HOSTILE, tokens=("a", "b"), streams=tuple(f"m{i}" for i in range(10)), answer=HOSTILE, p_answer=p,
        top=(("x", HOSTILE),) * 10, p_top=p,
    )  # fmt: skip
    shown = lens._repr_html_()
    assert ">m9<" in shown
    assert ">m1<" not in shown
    assert ">1.000<" in shown
    stability = Stability(subjects=0.875, subjects_lower=0.5, n_subjects=7, forms=0.25, n_forms=2)
    assert ">0.875<" in stability._repr_html_()
    assert "forms" in stability._repr_html_()
    assert "forms" not in replace(stability, forms=float("nan"), n_forms=1)._repr_html_()
    for text in (card, shown):
        assert "<script" not in text


@pytest.mark.parametrize("noun", ["facts", "components", "verdict", "html_card"])
def test_nouns_that_show_themselves_still_import_neither_torch_nor_plotly(noun):
    import subprocess
    import sys

    code = f"import mechunlearn.{noun}, sys; assert not {{'torch', 'plotly', 'ipywidgets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
