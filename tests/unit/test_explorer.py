"""What the explorer computes, against direct computation; its widgets show it without a browser."""

import base64

import numpy as np
import pytest
import torch

from mechunlearn.components import ROLES, Component
from mechunlearn.exploration import Exploration, roles_of
from mechunlearn.explorer import Explorer, explore
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.localize.retain_contrast import retain_contrast
from mechunlearn.models import attention_write, head_input, mlp_neurons, mlp_write
from mechunlearn.prompts import token_roles


@pytest.fixture(scope="module")
def facts(tiny_facts):
    return tiny_facts.of("colour").facts[:12]


@pytest.fixture(scope="module")
def exploration(tiny_model, facts):
    return Exploration(tiny_model("llama"), facts)


@torch.no_grad()
def _logits(model, ids):
    return model.hf(torch.tensor([ids])).logits[0, -1].double()


def _difference(pair, logits):
    return float(logits[pair.answer] - logits[pair.counterfactual])


def test_the_two_runs_are_the_models_own(exploration):
    pair, runs = exploration.pairs[3], exploration.runs(3)
    for ids, found, p in (
        (pair.clean, runs.outcome.logit_diff_before, runs.outcome.before),
        (pair.corrupt, runs.outcome.logit_diff_after, runs.outcome.after),
    ):
        logits = _logits(exploration.model, ids)
        assert found == pytest.approx(_difference(pair, logits), abs=1e-5)
        assert p[runs.outcome.true] == pytest.approx(float(logits.softmax(-1)[pair.answer]), abs=1e-6)
    assert len(runs.clean) == len(pair.clean)
    assert runs.donor == pair.donor


def test_roles_of_a_pair_are_those_of_its_prompt(exploration, facts):
    for i, fact in enumerate(facts):
        pair = exploration.pairs[i]
        if pair.end == len(pair.clean) - 1:
            assert roles_of(pair) == token_roles(exploration.model, fact.ask(fact.prompt), fact.subject)[1]
        batch = to_batch(exploration.model, [pair])
        for at, role in zip(batch.clean_positions[0].tolist(), batch.roles[0].argmax(-1).tolist(), strict=True):
            assert roles_of(pair)[at] == ROLES[role]


@pytest.mark.parametrize("name", ["m1", "a1", "a1.h2", "m1.n7"])
@pytest.mark.parametrize("how", ["zero", "mean", "donor"])
@pytest.mark.parametrize("run", ["clean", "corrupt"])
def test_an_intervention_is_what_hooking_the_module_by_hand_gives(any_model, tiny_facts, name, how, run):
    facts = tiny_facts.of("colour").facts[:5]
    exploration, component = Exploration(any_model, facts), Component.parse(name)
    pair = exploration.pairs[2]
    reads = {"head": head_input, "neuron": mlp_neurons}.get(component.kind)
    module = (reads or {"mlp": mlp_write, "attention": attention_write}[component.kind])(any_model, component.layer)
    width = {"head": any_model.d_head, "neuron": 1}.get(component.kind)
    columns = slice(0, None) if width is None else slice(component.index * width, (component.index + 1) * width)
    seen = []

    def record(_module, inputs, output):
        seen.append((inputs[0] if reads else output[0] if isinstance(output, tuple) else output)[0].detach())

    handle = module.register_forward_hook(record)
    own, other = (pair.clean, pair.corrupt) if run == "clean" else (pair.corrupt, pair.clean)
    for ids in [*(each.clean for each in exploration.pairs.values()), other]:
        _logits(any_model, ids)
    handle.remove()
    position = max(pair.subject)
    rows = [
        value[i, columns] for value, each in zip(seen, exploration.pairs.values(), strict=False)
        for i, role in enumerate(roles_of(each)) if role == "subject_last"
    ]  # fmt: skip
    partner = {c: k for c, k, _ in pair.aligned}[position]
    at, from_ = (position, partner) if run == "clean" else (partner, position)
    new = {"zero": 0.0, "mean": torch.stack(rows).mean(0), "donor": seen[-1][from_, columns]}[how]

    def put(value):
        value = value.clone()
        value[0, at, columns] = new
        return value

    if reads:
        handle = module.register_forward_pre_hook(lambda _m, inputs: (put(inputs[0]), *inputs[1:]))
    else:
        handle = module.register_forward_hook(
            lambda _m, _i, output: (put(output[0]), *output[1:]) if isinstance(output, tuple) else put(output)
        )
    expected = _difference(pair, _logits(any_model, own))
    handle.remove()
    found = exploration.intervene(2, component, how, position, run=run)
    assert found.logit_diff_after == pytest.approx(expected, abs=1e-5)
    assert found.logit_diff_before == pytest.approx(_difference(pair, _logits(any_model, own)), abs=1e-5)


def test_restoring_by_hand_gives_the_cells_of_the_exact_map(exploration):
    fact = next(i for i, pair in exploration.pairs.items() if len(pair.clean) != len(pair.corrupt))
    found, aligned = exploration.patching(fact), {c for c, _, _ in exploration.pairs[fact].aligned}
    for position in range(len(found.tokens)):
        if position not in aligned:
            with pytest.raises(ValueError, match=f"token {position} has no partner"):
                exploration.intervene(fact, found.components[2], "donor", position, run="corrupt")
            continue
        outcome = exploration.intervene(fact, found.components[2], "donor", position, run="corrupt")
        share = (outcome.logit_diff_after - found.corrupt) / (found.clean - found.corrupt)
        assert share == pytest.approx(found.values[2, position], abs=1e-4)


@pytest.mark.parametrize("run", ["clean", "corrupt"])
def test_at_all_tokens_zero_leaves_nothing_of_either_run(exploration, run):
    model = exploration.model
    fact, pair = next((i, pair) for i, pair in exploration.pairs.items() if len(pair.clean) < len(pair.corrupt))
    handle = mlp_write(model, 0).register_forward_hook(lambda _m, _i, output: output * 0)
    expected = _difference(pair, _logits(model, getattr(pair, run)))
    handle.remove()
    found = exploration.intervene(fact, Component("mlp", 0), "zero", run=run)
    assert found.logit_diff_after == pytest.approx(expected, abs=1e-5)


def test_an_intervention_leaves_the_model_as_it_was(exploration):
    model = exploration.model
    before = model.sha256, [p.requires_grad for p in model.hf.parameters()], torch.get_rng_state()
    exploration.intervene(0, Component("head", 1, 0), "mean")
    with pytest.raises(ValueError, match="allowed: zero, mean, donor"):
        exploration.intervene(0, Component("mlp", 1), "nothing")  # pyright: ignore[reportArgumentType]
    assert model.sha256 == before[0]
    assert [p.requires_grad for p in model.hf.parameters()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


@pytest.mark.parametrize("component", [Component("mlp", 3), Component("head", 0, 4), Component("neuron", 0, 48)])
def test_a_component_that_the_model_lacks_is_refused(exploration, component):
    with pytest.raises(ValueError, match=f"got {component}, allowed: layers 0 to 2, heads 0 to 3, neurons 0 to 47"):
        exploration.intervene(0, component, "zero")


def test_a_token_or_fact_that_is_not_there_is_refused(exploration):
    with pytest.raises(ValueError, match="allowed: zero, mean, donor at 0 to"):
        exploration.intervene(0, Component("mlp", 0), "zero", 99)
    with pytest.raises(ValueError, match=r"of the other run, allowed: .* of the clean or corrupt run"):
        exploration.intervene(0, Component("mlp", 0), "zero", run="other")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got number 12, allowed: 0 to 11"):
        exploration.runs(12)


def test_scores_at_tokens_sum_to_the_facts_own_scores(exploration):
    for localizer in ("attribution_patching", "resample_ablation", "gradient_norm"):
        scores = exploration.scores(localizer)
        assert exploration.scores(localizer) is scores  # kept
        values = exploration.token_scores(1, scores)
        assert values.shape == (len(scores.components), len(exploration.tokens(1)))
        np.testing.assert_allclose(values.sum(axis=1), scores.per_fact[1].sum(axis=1), atol=1e-12)
    patching = exploration.scores("attribution_patching")
    last = exploration.token_scores(1, patching)[:, -1]
    np.testing.assert_allclose(last, patching.per_fact[1, :, ROLES.index("last")])


def test_a_metric_is_passed_on_and_unknown_ones_are_refused(exploration):
    assert exploration.metrics("resample_ablation") == ("logit_diff", "accuracy")
    assert exploration.metrics("random_components") == ()
    assert exploration.scores("resample_ablation", "accuracy").metric == "accuracy"
    with pytest.raises(ValueError, match="option 'metric': got 'loss', allowed"):
        exploration.scores("resample_ablation", "loss")
    with pytest.raises(ValueError, match="Did you mean 'attribution_patching'"):
        exploration.scores("attribution_patchin")


def test_localizers_get_the_facts_to_retain_and_the_twin_if_they_take_them(tiny_model, tiny_split):
    model, twin, facts = tiny_model("llama"), tiny_model("llama", seed=1), tiny_split.forget
    exploration = Exploration(model, facts, retain=tiny_split.retain_train[:6], twin=twin, seed=2)
    contrast = exploration.scores("retain_contrast")
    expected = retain_contrast(model, facts, retain=tiny_split.retain_train[:6], seed=2)
    np.testing.assert_array_equal(contrast.per_fact, expected.per_fact)
    assert exploration.scores("forget_retain_contrast").notes["n_retain"] == 6
    assert exploration.scores("fact_lookup_probe").notes["twin"] == twin.name


def test_without_facts_to_retain_no_contrast_is_claimed(exploration):
    explorer = Explorer(exploration, localizer="retain_contrast", view="this prompt")
    assert "nothing is subtracted" in _subtitle(explorer.map).replace("<br>", " ")
    explorer.localizer.value = "forget_retain_contrast"
    assert "got no facts to retain" in explorer.map.note


def test_the_donor_of_the_maps_is_the_donor_of_the_runs(exploration):
    for fact in range(4):
        assert exploration.patching(fact).donor == exploration.runs(fact).donor


def test_the_lens_ends_in_what_the_model_says(any_model, tiny_facts):
    fact = tiny_facts.of("colour").facts[0]
    lens = Exploration(any_model, tiny_facts.of("colour").facts[:4]).lens(0)
    ids = token_roles(any_model, fact.ask(fact.prompt), fact.subject)[0]
    p = _logits(any_model, ids).softmax(-1)
    pair = next(p for p in build_pairs(any_model, tiny_facts.of("colour").facts[:4]) if p.fact == 0)
    assert lens.p_answer.shape == lens.p_top.shape == (len(lens.streams), len(ids))
    assert lens.p_answer[-1, -1] == pytest.approx(float(p[pair.answer]), abs=1e-5)
    assert lens.p_top[-1, -1] == pytest.approx(float(p.max()), abs=1e-5)


def test_every_choice_in_the_explorer_is_shown(tiny_model, facts, exploration):
    explorer = explore(tiny_model("llama"), facts, view="all facts")
    for view in explorer.views:
        explorer.view.value = view
        assert explorer.map.figure["data"], view
    explorer.view.value = "this prompt"
    explorer.fact.value = 2
    assert facts[2].subject in explorer.runs.value
    assert len(explorer.position.options) == 1 + len(exploration.tokens(2))
    np.testing.assert_allclose(
        _array(explorer.map.figure["data"][0]["z"]),
        exploration.token_scores(2, exploration.scores("attribution_patching", "logit_diff")), atol=1e-6,
    )  # fmt: skip
    explorer.component.value, explorer.how.value = "a1.h2", "donor"
    explorer.position.value = 1
    for run in ("clean", "corrupt"):
        explorer.run.value = run
        outcome = exploration.intervene(2, Component("head", 1, 2), "donor", 1, run=run)
        before, after = explorer.changed.figure["data"]
        assert before["name"] == f"{run} run"
        np.testing.assert_allclose(_array(before["x"]), list(outcome.before.values()), atol=1e-6)
        np.testing.assert_allclose(_array(after["x"]), list(outcome.after.values()), atol=1e-6)


def test_no_dropdown_is_empty_before_or_after_a_choice(exploration):
    explorer = Explorer(exploration, localizer="attribution_patching", view="this prompt")
    dropdowns = (explorer.fact, explorer.view, explorer.localizer, explorer.metric, explorer.position)
    assert all(dropdown.index is not None for dropdown in dropdowns)
    explorer.fact.value, explorer.localizer.value = 1, "random_components"
    assert all(dropdown.index is not None for dropdown in dropdowns)
    explorer.localizer.value = "resample_ablation"
    assert explorer.metric.value == "logit_diff"
    explorer.position.value = 2
    explorer.fact.value = 0
    assert explorer.position.label == "all tokens"
    assert "at all tokens" in _subtitle(explorer.changed)


def test_a_localizer_that_is_picked_is_shown(exploration):
    explorer = Explorer(exploration, localizer="attribution_patching", view="this prompt, exact")
    explorer.localizer.value = "gradient_norm"
    assert explorer.view.value == "this prompt"
    assert "gradient_norm" in explorer.map.figure["layout"]["title"]["text"]
    explorer.view.value, explorer.localizer.value = "all facts", "resample_ablation"
    explorer.metric.value = "accuracy"
    assert explorer.view.value == "all facts"
    assert explorer.map.figure["layout"]["coloraxis"]["colorbar"]["title"]["text"].endswith("accuracy")


def test_what_cannot_be_shown_says_why(exploration):
    explorer = Explorer(exploration, localizer="attribution_patching", view="all facts")
    explorer.component.value = "<b>"
    assert not explorer.changed.figure
    assert "allowed: m3 (MLP)" in explorer.changed.note
    assert "<b>'" not in explorer.changed.note
    with pytest.raises(ValueError, match="got view 'no', allowed: this prompt"):
        explore(exploration.model, exploration.facts, view="no")


def test_while_it_computes_the_explorer_says_so_even_where_that_fails(exploration, monkeypatch):
    explorer = Explorer(exploration, localizer="attribution_patching", view="this prompt")
    said = []

    def fail(*_, **__):
        said.append(explorer.changed.note)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(exploration, "intervene", fail)
    with pytest.raises(RuntimeError):
        explorer.how.value = "mean"
    monkeypatch.undo()
    assert "computing" in said[0]
    assert "log" in explorer.changed.note
    explorer.how.value = "donor"
    assert explorer.changed.note == ""
    assert explorer.changed.figure["data"]


def test_a_click_chooses_component_and_token_and_computes_once(exploration, monkeypatch):
    explorer = Explorer(exploration, localizer="attribution_patching", view="this prompt")
    asked, intervene = [], exploration.intervene
    monkeypatch.setattr(
        exploration, "intervene", lambda *choice, run: asked.append(choice) or intervene(*choice, run=run)
    )
    explorer.click("m2", 1)
    assert (explorer.component.value, explorer.position.value) == ("m2", 1)
    assert asked == [(0, Component("mlp", 2), "zero", 1)]
    assert explorer.position.index == 2


@pytest.mark.parametrize(("view", "fact", "token"), [("all facts", 0, "subject_last"), ("fact by fact", 3, None)])
def test_a_click_on_a_map_of_all_facts_reads_its_column(exploration, view, fact, token):
    explorer = Explorer(exploration, localizer="attribution_patching", view=view)
    scores = exploration.scores("attribution_patching", "logit_diff")
    explorer.click("a1", scores.roles.index(token) if token else fact)
    assert (explorer.fact.value, explorer.component.value) == (fact, "a1")
    assert explorer.position.value == (max(exploration.pairs[0].subject) if token else -1)
    assert _subtitle(explorer.changed).startswith("a1 (zero) at ")


def test_every_map_names_the_components_of_its_cells(exploration):
    explorer = Explorer(exploration, localizer="attribution_patching", view="all facts")
    for view in explorer.views:
        explorer.view.value = view
        for trace in explorer.map.figure["data"]:
            names = {name for row in trace["customdata"] for name in row} - {""}
            assert {str(Component.parse(name)) for name in names} == names, view


def test_a_click_in_the_browser_reaches_the_explorer_and_plotly_is_sent_once(exploration):
    explorer = Explorer(exploration, localizer="attribution_patching", view="this prompt")
    explorer.map._handle_custom_msg({"component": "a2", "column": 0}, [])
    assert (explorer.component.value, explorer.position.value) == ("a2", 0)
    sent = [bool(figure.plotlyjs) for figure in (explorer.map, explorer.answers, explorer.changed)]
    assert sent == [True, False, False]


def _subtitle(figure):
    return figure.figure["layout"]["title"]["subtitle"]["text"]


def _array(values):
    """Numbers as plotly may send them: in base64."""
    if not isinstance(values, dict):
        return np.array(values)
    array = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
    return array.reshape([int(n) for n in values["shape"].split(",")]) if "shape" in values else array
