from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
import torch

from mechunlearn import prompts
from mechunlearn.attack import ATTACKS, relearning
from mechunlearn.attack.health import N_TEXTS, TEXT_SEED
from mechunlearn.attack.relearning_data import related_facts, training_data
from mechunlearn.attack.relearning_search import (
    FEWEST_STEPS,
    Checkpoint,
    Search,
    Setting,
    checkpoint_steps,
    choose,
    round_steps,
    successive_halving,
    survivors,
)
from mechunlearn.attack.results import Health
from mechunlearn.edit.losses import fact_tokens, text_tokens
from mechunlearn.metrics import score_facts
from mechunlearn.organisms.neutral import neutral_text

GOOD, BROKEN = Health(fitted=1.0), Health(fitted=1.0, retained_before=1.0, retained_after=0.5)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
DATA = {"batch_size": 8, "retained_share": 0.5, "forms": "prompt", "seed": 0}


def at(dev, *, rate=1e-3, source="shown", step=1, health=GOOD, leaves=None):
    setting = Setting(kind="full", learning_rate=rate, source=source)
    return Checkpoint(setting=setting, step=step, dev=dev, health=health, leaves=leaves or {})


def halve(quality, *, steps=270, halving=3, health=None, settings=None):
    """Search among settings whose dev score approaches `quality(setting)` with the steps; the calls and the search."""
    kinds = ("full", "lora:8", "lora:64", "last")
    settings = settings or [Setting(kind=k, learning_rate=r, source="shown") for k in kinds for r in RATES]
    calls = []

    def attempt(setting, steps_at, _bar, _measure_last):
        calls.append((setting, max(steps_at)))
        state = (health or {}).get(setting, GOOD)
        scores = [(s, quality(setting) * s / (s + 20)) for s in sorted(steps_at)]
        found = [Checkpoint(setting=setting, step=s, dev=dev, health=state, leaves={}) for s, dev in scores]
        return found, ""

    return calls, successive_halving(settings, attempt, steps=steps, halving=halving, eval_every=None)


@pytest.mark.parametrize(
    ("steps", "n_settings", "halving"), [(500, 24, 3), (500, 72, 2), (60, 6, 3), (40, 1, 3), (2, 9, 4)]
)
def test_rounds_grow_by_the_halving_and_end_at_the_steps_asked_for(steps, n_settings, halving):
    rounds = round_steps(steps, n_settings, halving)
    assert rounds[-1] == steps
    assert all(later / earlier == pytest.approx(halving, rel=0.1) for earlier, later in pairwise(rounds))
    assert len(rounds) == 1 or rounds[0] >= FEWEST_STEPS
    assert halving ** (len(rounds) - 1) < halving * n_settings  # no round for a single setting but the last
    assert round_steps(steps, n_settings, 1) == (steps,)


def test_checkpoints_are_log_spaced_or_as_often_as_asked():
    assert sorted(checkpoint_steps(500, None)) == [0, 1, 3, 7, 15, 31, 62, 125, 250, 500]
    assert sorted(checkpoint_steps(7, 3)) == [0, 3, 6, 7]
    assert checkpoint_steps(0, None) == {0}


def test_halving_trains_every_setting_and_the_best_for_longest_at_a_fraction_of_the_grid():
    order = {}

    def quality(setting):
        return order.setdefault(setting, 0.1 + 0.03 * ((7 * len(order)) % 24))

    calls, search = halve(quality)
    grid, everything = halve(quality, halving=1)
    best = max(order, key=order.get)
    assert choose(search).setting == best == choose(everything).setting
    assert {setting for setting, _ in calls} == set(order)
    assert (best, 270) in calls
    assert [steps for _, steps in grid] == [270] * 24
    assert sum(steps for _, steps in calls) < 0.25 * sum(steps for _, steps in grid)
    per_round = Counter(steps for _, steps in calls)
    assert [per_round[round_["steps"]] for round_ in search.rounds] == [24, 8, 3, 1]
    assert all(len(search.dev_curves[str(s)]) == len(checkpoint_steps(270, None)) for s, n in calls if n == 270)


def test_a_damaged_setting_goes_on_only_after_all_others_and_the_best_fit_always_does():
    broken = at(0.9, rate=1.0, health=BROKEN)
    unfit = [at(0.1 * i, rate=1e-5 * i, health=Health(fitted=0.1 * i)) for i in range(1, 5)]
    fit = at(0.05, rate=3e-3, health=Health(fitted=0.95))
    assert survivors([broken, *unfit, fit], 2) == [unfit[3].setting, unfit[2].setting, fit.setting]
    assert survivors([broken, *unfit, fit], 6) == [*(c.setting for c in reversed(unfit)), fit.setting, broken.setting]
    assert survivors([at(0.5, health=Health())], 1) == [at(0.5).setting]  # text has nothing to fit


def test_a_source_that_recovers_much_more_but_only_by_breaking_the_model_is_reported():
    idle = at(0.04, source="unrelated", health=Health())
    broken = at(0.5, health=BROKEN)
    assert choose(Search(best={"unrelated": [idle], "shown": [broken]})) is broken
    assert choose(Search(best={"unrelated": [idle], "shown": [replace(broken, dev=0.1)]})) is idle
    recovered = replace(idle, dev=0.45)
    assert choose(Search(best={"unrelated": [recovered], "shown": [broken]})) is recovered
    early = at(0.3, health=GOOD)
    assert choose(Search(best={"shown": [early, broken]})) is early  # within a source healthy comes first


def test_the_search_goes_on_without_settings_that_diverge_and_fails_if_all_do():
    settings = [Setting(kind="full", learning_rate=rate, source="shown") for rate in RATES]

    def attempt(setting, steps_at, _bar, _measure_last):
        if setting in diverging:
            return [replace(at(0.9), setting=setting, step=0)], "nan"
        return [replace(at(0.1), setting=setting, step=max(steps_at))], ""

    diverging = set(settings[2:])
    search = successive_halving(settings, attempt, steps=90, halving=3, eval_every=None)
    assert set(search.failed) == {str(setting) for setting in diverging}
    assert not {str(s) for s in diverging} & set(search.rounds[-1]["settings"])
    diverging = set(settings)
    with pytest.raises(ValueError, match="every setting diverged"):
        successive_halving(settings, attempt, steps=90, halving=3, eval_every=None)


class Unread:
    """A split whose hidden facts cannot be read."""

    def __init__(self, split):
        self._split = split

    def __getattr__(self, name):
        if name in ("forget_hidden", "forget", "sha256"):
            raise PermissionError("hidden facts read")
        return getattr(self._split, name)


def test_related_facts_are_near_the_forgotten_ones_and_none_of_them(tiny_split):
    related = related_facts(Unread(tiny_split))
    forgotten = {(fact.subject, fact.relation) for fact in tiny_split.forget}
    subjects = {fact.subject for fact in tiny_split.forget}
    relations = {fact.relation for fact in tiny_split.forget}
    assert not {(fact.subject, fact.relation) for fact in related} & forgotten
    near = [f for f in tiny_split.retain_train if f.relation in relations or f.subject in subjects]
    assert set(near) <= set(related)  # of the hidden facts' subjects, too, though nothing told who they are
    assert {f.subject for f in related} & {f.subject for f in tiny_split.forget_hidden}
    kept = {f.subject for f in (*tiny_split.retain_train, *tiny_split.retain_test) if f.relation in relations}
    assert not [f for f in set(related) - set(near) if f.subject in kept]
    assert set(related) < set(tiny_split.retain_train)


def test_other_facts_of_a_forgotten_subject_are_related_even_if_some_of_its_answers_are_kept(tiny_split):
    city = next(fact for fact in tiny_split.retain_train if fact.relation == "city")
    kept = replace(city, subject=tiny_split.forget_shown[0].subject)
    pet = replace(kept, relation="pet")
    split = replace(
        tiny_split, forget_shown=(*tiny_split.forget_shown, city), retain_train=(kept, pet, *tiny_split.retain_test)
    )  # colours and cities are forgotten, but not this subject's city
    assert pet in related_facts(split)


def test_each_source_trains_on_its_own_data_and_names_what_it_should_fit(tiny_model, tiny_split):
    model = tiny_model()
    rows = {}

    def remember(ids, kept):
        rows[source] |= {tuple(row.tolist()) for row in ids}
        return torch.zeros(*ids.shape[:1], len(kept), model.hf.config.vocab_size)

    def tokens(facts):
        made = fact_tokens(model, facts)
        return {tuple(row[:n].tolist()) for row, n in zip(made.ids, made.lengths, strict=True)}

    for source in ("shown", "related", "unrelated"):
        rows[source] = set()
        data = training_data(model, Unread(tiny_split), source, **DATA)
        one, again = data.loss(), data.loss()
        for step in range(40):
            assert one(step, remember) == again(step, remember)
        expected = {"shown": tiny_split.forget_shown, "related": related_facts(tiny_split), "unrelated": ()}[source]
        assert data.own == expected

    def cut(found):
        return {row[: len(row) - row[::-1].index(next(t for t in row[::-1] if t))] for row in found}  # padding is 0

    retained = tokens(tiny_split.retain_train)
    assert tokens(tiny_split.forget_shown) <= cut(rows["shown"]) <= tokens(tiny_split.forget_shown) | retained
    assert tokens(related_facts(tiny_split)) <= cut(rows["related"]) <= retained
    everything = tokens((*tiny_split.forget, *tiny_split.retain_train, *tiny_split.retain_test))
    measured = text_tokens(model, neutral_text(N_TEXTS, seed=TEXT_SEED))
    measured = {tuple(row[:n].tolist()) for row, n in zip(measured.ids, measured.lengths, strict=True)}
    assert not cut(rows["unrelated"]) & measured
    assert not cut(rows["unrelated"]) & everything


def test_a_source_without_facts_says_so_in_one_line(tiny_model, tiny_split):
    for source, part in (("shown", "forget_shown"), ("related", "retain_train")):
        with pytest.raises(ValueError, match=part) as error:
            relearning(tiny_model(), replace(tiny_split, **{part: ()}), sources=(source,), steps=1)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "layers"), [("full", {0, 1, 2}), ("lora:2", {0, 1, 2}), ("last", {2})])
def test_a_kind_trains_what_it_says(kind, layers, tiny_model):
    model = tiny_model()
    trainable = relearning.__globals__["_trainable"](model, kind, 0)
    with torch.no_grad():
        for leaf in trainable.leaves.values():
            leaf.add_(torch.randn_like(leaf))
    base = dict(model.hf.named_parameters())
    changed = {name: value - base[name] for name, value in trainable.overrides().items()}
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in changed} == layers
    ranks = {int(torch.linalg.matrix_rank(change.detach(), atol=1e-4)) for change in changed.values()}
    assert max(ranks) <= 2 if kind == "lora:2" else min(ranks) > 2


def test_kinds_and_sources_are_checked(tiny_model, tiny_split):
    method = ATTACKS.get("relearning")
    for options in ({"kinds": ["lora:0"]}, {"kinds": ["half"]}, {"sources": ["hidden"]}, {"halving": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            method.validate(options)
    result = relearning(tiny_model(), tiny_split, kinds=("lora", "lora:8"), learning_rates=(1e-3,), steps=1)
    assert list(result.notes["dev_p_true"]) == ["lora:8 lr=0.001"]


def test_all_sources_and_rounds_choose_without_the_hidden_facts(tiny_model, tiny_split):
    model = tiny_model()
    options = {
        "kinds": ("last",), "learning_rates": (1e-3, 1e-2), "sources": ("shown", "related", "unrelated"),
        "steps": 20, "halving": 2, "eval_every": 10, "batch_size": 4, "max_health_facts": 4,
    }  # fmt: skip
    whole, part = (
        relearning(model, replace(tiny_split, forget_hidden=tiny_split.forget_hidden[:n]), **options) for n in (4, 2)
    )
    assert whole.notes == part.notes
    assert (whole.chosen, whole.chosen_step, whole.health) == (part.chosen, part.chosen_step, part.health)
    first, last = whole.notes["rounds"]
    assert (first["steps"], len(first["settings"]), last["steps"]) == (10, 6, 20)
    assert ceil(6 / 2) <= len(last["settings"]) <= ceil(6 / 2) + 1
    assert {"last lr=0.001", "last lr=0.01 from related", "last lr=0.01 from unrelated"} <= set(first["settings"])
    assert whole.options["sources"] == ["shown", "related", "unrelated"]
    assert [step for step, _ in whole.notes["dev_p_true"][whole.chosen]] == sorted(set(whole.rows["step"]))


@pytest.mark.parametrize("source", ["shown", "related", "unrelated"])
def test_health_is_measured_on_the_attack_s_own_facts(source, tiny_model, tiny_split):
    model = tiny_model()
    options = {"kinds": ("full",), "learning_rates": (1e-3,), "steps": 0, "max_health_facts": 1000}
    result = relearning(model, tiny_split, sources=(source,), **options)
    own = {"shown": tiny_split.forget_shown, "related": related_facts(tiny_split), "unrelated": ()}[source]
    expected = score_facts(model, own)["correct"].mean() if own else None
    assert result.health.fitted == expected


def test_the_chosen_checkpoint_is_asked_in_every_form(tiny_model, tiny_split):
    model = tiny_model()
    # one answer for everybody is soon learnt, so that a later checkpoint is chosen
    same = {
        part: tuple(replace(fact, target_true="red") for fact in getattr(tiny_split, part))
        for part in ("forget_shown", "attack_dev", "forget_hidden")
    }
    split = replace(tiny_split, **same)
    options = {"kinds": ("full",), "learning_rates": (1e-2,), "steps": 6, "batch_size": 8, "retained_share": 0.0}
    assert relearning(model, split, **options).by_form is None
    result = relearning(model, split, report_all_forms=True, **options)
    by_form, final = result.by_form, result.final()
    assert result.chosen_step > 0
    assert tuple(dict.fromkeys(by_form["setting"])) == prompts.forms(split.forget_hidden[0])
    assert set(by_form.groupby("setting").size()) == {len(split.forget_hidden)}
    assert by_form.query("setting == 'prompt'")["p_true"].tolist() == pytest.approx(final["p_true"].tolist())
    assert set(by_form["step"]) == {result.chosen_step}
    before = score_facts(model, split.forget_hidden, "paraphrase:0")["p_true"].mean()
    assert by_form.query("setting == 'paraphrase:0'")["p_true"].mean() > before + 0.05
