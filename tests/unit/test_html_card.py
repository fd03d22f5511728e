"""How nouns show themselves in a notebook: their own numbers, and nothing of a user's text acts as HTML."""

from dataclasses import replace

import numpy as np
import pytest

from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact, FactSet
from mechunlearn.html_card import html_card
from mechunlearn.localize.edges import EdgeScores
from mechunlearn.localize.faithfulness import FaithfulnessCurve
from mechunlearn.masks import mask_of
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


@pytest.mark.parametrize("noun", ["facts", "components", "verdict", "html_card"])
def test_nouns_that_show_themselves_still_import_neither_torch_nor_plotly(noun):
    import subprocess
    import sys

    code = f"import mechunlearn.{noun}, sys; assert not {{'torch', 'plotly', 'ipywidgets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
