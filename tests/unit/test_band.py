"""Every localizer against the band that ablation shows."""

import pytest

from mechunlearn.bench import band
from mechunlearn.bench.mechanism import Mechanism
from mechunlearn.bench.planted_settings import LocalizerSettings
from mechunlearn.localize.bands import Band


@pytest.fixture
def found(monkeypatch):
    """The band is given: finding it has tests of its own."""
    empty = dict.fromkeys(("choice", "ablations", "knockouts"))
    monkeypatch.setattr(band, "measure_mechanism", lambda *_, **__: Mechanism(band=Band(first=1, last=2), **empty))


def test_rankings_are_held_against_the_band(found, knowing, tiny_facts):
    facts = tiny_facts.of("colour").facts[:12]
    lines = [
        LocalizerSettings(method="resample_ablation"),
        LocalizerSettings(method="attribution_patching", name="heads", options={"kinds": ["head"]}),
        LocalizerSettings(method="all_mlps"),
        LocalizerSettings(method="fisher"),
    ]
    rows = band.bench_band(knowing, facts, tiny_facts.of("city").facts[:12], lines).set_index("localizer")
    assert set(rows["band"]) == {"m1 to m2"}
    assert rows.loc["random", "recall"] == pytest.approx(2 / knowing.n_layers)
    assert rows.loc["heads", "error"] == "scores no MLPs"
    assert rows.loc["all_mlps", "hit@1"] == 0  # a tie is no hit
    for name in ("resample_ablation", "fisher"):
        highest = rows.loc[name, "highest"].split()
        assert rows.loc[name, "hit@1"] == float(highest[0] in ("m1", "m2"))
        assert rows.loc[name, "recall"] == len({"m1", "m2"} & set(highest[:2])) / 2
        assert -1 <= rows.loc[name, "Spearman with exact"] <= 1


def test_the_drawn_facts_share_their_answers(tiny_facts):
    facts = tiny_facts.facts
    drawn = band._drawn(facts, len(facts) // 2, 0)
    answers = [(fact.relation, fact.target_true) for fact in drawn]
    assert len(set(drawn)) == len(drawn) <= len(facts) // 2
    assert all(answers.count(answer) > 1 for answer in answers)
    assert band._drawn(facts, len(facts), 0) == list(facts)
