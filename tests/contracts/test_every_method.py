"""Laws that every registered method obeys; a new method is tested by being registered."""

import random
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechunlearn.attack import ATTACKS
from mechunlearn.components import Component
from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import applied
from mechunlearn.localize import LOCALIZERS
from mechunlearn.masks import mask_of
from mechunlearn.metrics import score_facts
from mechunlearn.settings import load_settings, preset_names
from mechunlearn.sources import SOURCES

LOCALIZER_OPTIONS = {
    "fact_lookup_probe": {"folds": 2, "draws": 1}, "fact_lookup_paths": {"fdr": 1.0}, "learned_mask": {"steps": 5},
    "shuffled_pairs": {"draws": 2},
}  # fmt: skip
SEVERAL_FACTS = ("fact_lookup_probe", "fact_lookup_paths", "shuffled_pairs")  # they compare facts with each other
ATTACK_OPTIONS = {
    "relearning": {
        "steps": 2, "eval_every": 1, "learning_rates": (1e-3,), "batch_size": 4, "max_health_facts": 8,
        "kinds": ("full", "lora:2"), "sources": ("shown", "unrelated"),
    },
    "probing": {"max_train": 40, "max_steps": 10},
}  # fmt: skip


def localize(name, model, facts, split, **options):
    """As a run calls it: retained facts go to the methods that take them."""
    method = LOCALIZERS.get(name)
    given = method.wanted(retain=split.retain_train)
    return method.function(model, facts, **method.validate({**LOCALIZER_OPTIONS.get(name, {}), **options}), **given)


@contextmanager
def nothing_changes(model):
    """Weights, gradients, flags, hooks, mode and the global random state are what they were."""

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.hf.modules()]
        modes = [m.training for m in model.hf.modules()]
        flags = [(p.requires_grad, p.grad is None) for p in model.hf.parameters()]
        forwards = ["forward" in module.__dict__ for module in model.hf.modules()]
        config = model.hf.config.to_dict(), model.hf.config._attn_implementation
        drawn = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
        return model.sha256, hooks, modes, flags, forwards, config, drawn

    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize("registry", [LOCALIZERS, EDITORS, ATTACKS, SOURCES], ids=lambda r: r.kind)
def test_every_method_documents_itself_and_its_defaults_validate(registry):
    assert registry.names()
    for method in registry.methods():
        assert method.summary, method.name
        assert method.source, method.name
        required = [n for n, f in method.options.model_fields.items() if f.is_required()]
        assert not required, f"{method.name}: options without a default: {required}"
        assert method.validate({}) == method.defaults()
        with pytest.raises(ValueError, match="unknown option"):
            method.validate({"no_such_option": 1})


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_validates(preset):
    assert load_settings(preset).name == preset


@pytest.mark.parametrize("name", LOCALIZERS.names())
def test_a_localizer_scores_every_component_once_and_leaves_the_model_alone(name, tiny_model, tiny_split):
    model = tiny_model()
    with nothing_changes(model):
        scores = localize(name, model, tiny_split.forget, tiny_split)
    assert len(set(scores.components)) == len(scores.components)
    assert {c.layer for c in scores.components} == set(range(model.n_layers))
    assert np.isfinite(scores.values).all()
    assert scores.sign
    assert scores.n_facts == len(tiny_split.forget)


@pytest.mark.parametrize("name", LOCALIZERS.names())
def test_a_localizer_does_not_depend_on_the_order_of_the_facts(name, tiny_model, tiny_split):
    model = tiny_model()
    forward = localize(name, model, tiny_split.forget, tiny_split).values
    backward = localize(name, model, tiny_split.forget[::-1], tiny_split).values
    # a probe's folds are dealt by subject, so its tolerance is that of the solver
    np.testing.assert_allclose(forward, backward, atol=0.12 if "probe" in name else 1e-4)


class Stop(Exception):
    """What a user's Ctrl-C, or a GPU without memory, would raise."""


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("name", LOCALIZERS.names())
def test_a_localizer_that_is_interrupted_leaves_the_model_alone(name, call, tiny_model, tiny_split):
    model, seen = tiny_model(), []

    def stop(*_):
        seen.append(1)
        if len(seen) == call:
            raise Stop

    handle = model.hf.get_output_embeddings().register_forward_pre_hook(stop)
    with nothing_changes(model):
        try:
            localize(name, model, tiny_split.forget, tiny_split)
        except Stop:
            assert len(seen) == call
        else:
            assert len(seen) < call  # it asks the model less often, or not at all
    handle.remove()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", LOCALIZERS.names())
def test_padding_and_batches_change_no_score(name, dtype, tolerance, tiny_model, tiny_split):
    model, method = tiny_model(), LOCALIZERS.get(name)
    model.hf.to(dtype)
    n = len(tiny_split.forget) if name in SEVERAL_FACTS else 8
    facts = [*tiny_split.forget[:4], *(replace(f, prompt=f.paraphrases[0]) for f in tiny_split.forget[4:n])]
    expected = localize(name, model, facts, tiny_split).per_fact
    close = {"rtol": 0, "atol": tolerance * np.abs(expected).max()}
    model.tokenizer.padding_side = "left" if model.tokenizer.padding_side == "right" else "right"
    np.testing.assert_allclose(localize(name, model, facts, tiny_split).per_fact, expected, **close)
    if "batch_size" in method.options.model_fields and name != "learned_mask":  # which is trained on its batches
        one = localize(name, model, facts, tiny_split, batch_size=1).per_fact
        np.testing.assert_allclose(one, expected, **close)


@pytest.mark.parametrize("name", [n for n in LOCALIZERS.names() if n not in SEVERAL_FACTS])
def test_one_fact_suffices_for_a_localizer(name, tiny_model, tiny_split):
    assert localize(name, tiny_model(), tiny_split.forget[:1], tiny_split).n_facts == 1


@pytest.mark.parametrize("name", SEVERAL_FACTS)
def test_a_localizer_that_compares_facts_says_in_one_line_that_one_is_too_few(name, tiny_model, tiny_split):
    with pytest.raises(ValueError, match=rf"{name}|same answer") as error:
        localize(name, tiny_model(), tiny_split.forget[:1], tiny_split)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", EDITORS.names())
def test_an_editor_changes_masked_entries_only_and_the_model_comes_back(name, any_model, split):
    model = any_model
    mask = mask_of(model, [Component("mlp", 1), Component("head", 2, 1)])
    with nothing_changes(model):
        edit = EDITORS.get(name).function(model, mask, split, steps=2, seed=0)
        before = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
        with applied(model, edit):
            changed = 0
            for n, p in model.hf.named_parameters():
                inside = mask.full(n) if n in mask.entries else torch.zeros_like(p, dtype=torch.bool)
                assert torch.equal(p[~inside], before[n][~inside]), n
                changed += int((p[inside] != before[n][inside]).sum())
            assert changed > 0


@pytest.mark.parametrize("name", EDITORS.names())
def test_an_empty_mask_changes_nothing(name, tiny_model, split):
    model = tiny_model()
    edit = EDITORS.get(name).function(model, mask_of(model, []), split, steps=2, seed=0)
    assert not edit.values


@pytest.mark.parametrize("name", ATTACKS.names())
def test_an_attack_leaves_the_model_alone_and_scores_every_hidden_fact(name, tiny_model, split):
    model, method = tiny_model(), ATTACKS.get(name)
    with nothing_changes(model):
        result = method.function(model, split, **method.validate(ATTACK_OPTIONS.get(name, {})))
    assert len(result.hidden_scores()) == len(split.forget_hidden)
    assert result.access in ("prompts", "activations", "weights", "original_weights")
    assert result.health is not None


@pytest.mark.parametrize("name", ATTACKS.names())
def test_what_an_attack_starts_from_is_what_evaluation_measures(name, tiny_model, split):
    model, method = tiny_model(), ATTACKS.get(name)
    result = method.function(model, split, **method.validate(ATTACK_OPTIONS.get(name, {})))
    direct = score_facts(model, split.forget_hidden)["p_true"]
    assert list(result.hidden_before().values()) == pytest.approx(direct.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_no_attack_reads_hidden_facts_before_it_has_chosen(name, tiny_model, split):
    """Hidden facts swapped for others change the scores and nothing that was chosen."""
    model, method = tiny_model(), ATTACKS.get(name)
    options = method.validate(ATTACK_OPTIONS.get(name, {}))
    one = method.function(model, split, **options)
    swapped = replace(split, forget_hidden=split.forget_hidden[: len(split.forget_hidden) // 2])
    other = method.function(model, swapped, **options)
    assert (one.chosen, one.chosen_step, one.health.fitted) == (other.chosen, other.chosen_step, other.health.fitted)
    shared = other.hidden_scores()
    assert {k: one.hidden_scores()[k] for k in shared} == pytest.approx(shared, abs=1e-5)
