"""Localizers: laws, exactness against literal versions, and a model whose facts sit in a known MLP."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechunlearn.activations import Tokens, hooked, last_logits, untouched
from mechunlearn.components import ROLES, Component, ComponentScores
from mechunlearn.facts import Fact, FactSet
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.agreement import agreement
from mechunlearn.localize.all_mlps import all_mlps
from mechunlearn.localize.attribution_patching import attribution_patching
from mechunlearn.localize.bands import Band, ablate_bands
from mechunlearn.localize.fact_lookup_probe import climbing_band, fact_lookup_probe
from mechunlearn.localize.first_order import first_order_scores
from mechunlearn.localize.nonlocalized import nonlocalized
from mechunlearn.localize.pairs import PairBatch, align, batches, build_pairs, to_batch
from mechunlearn.localize.random_components import random_components
from mechunlearn.localize.random_mlps import random_mlps
from mechunlearn.localize.resample_ablation import resample_ablation
from mechunlearn.models import Model, all_components, embedding

MakeModel = Callable[..., Model]
CONTROLS = (random_components, random_mlps, all_mlps, nonlocalized)
METHODS = (attribution_patching, resample_ablation, *CONTROLS)


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> Model:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def facts(tiny_facts: FactSet) -> tuple[Fact, ...]:
    return tiny_facts.of("colour").facts[:12]


def state(model: Model) -> list[object]:
    """Everything a localizer could leave changed."""
    hf = model.hf
    return [
        torch.get_rng_state().tolist(),
        [(p.detach().clone().flatten().tolist(), p.requires_grad, p.grad is None) for p in hf.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hf.modules()],
        hf.config.to_dict(),
        torch.is_grad_enabled(),
    ]


# --- pairs ---


def test_tokens_are_aligned_from_the_start_before_the_subject_and_from_the_end_after() -> None:
    clean = ["between", "subject_first", "subject_middle", "subject_last", "between", "last"]
    corrupt = ["between", "subject_first", "subject_last", "between", "last"]
    assert align(clean, corrupt) == [(0, 0), (2, 1), (3, 2), (4, 3), (5, 4)]
    assert align(clean, clean) == [(i, i) for i in range(6)]


def test_a_donor_has_another_subject_and_answer_and_the_same_number_of_tokens_where_possible(
    model: Model, facts: tuple[Fact, ...]
) -> None:
    answers = {fact.subject: fact.target_true for fact in facts}
    for pair in build_pairs(model, facts, pairs_per_fact=2):
        fact = facts[pair.fact]
        assert pair.donor is not None
        assert answers[pair.donor] != fact.target_true
        assert pair.answer != pair.counterfactual
        assert {pair.answer, pair.counterfactual} <= set(pair.candidates)
    lengths = {fact.subject: len(pair.clean) for fact, pair in zip(facts, build_pairs(model, facts), strict=True)}
    for fact, pair in zip(facts, build_pairs(model, facts), strict=True):
        same = [f for f in facts if f.target_true != fact.target_true and lengths[f.subject] == len(pair.clean)]
        assert not same or len(pair.corrupt) == len(pair.clean)


def test_a_facts_donor_does_not_depend_on_the_order_of_the_facts(model: Model, facts: tuple[Fact, ...]) -> None:
    forward = {facts[pair.fact].subject: pair.donor for pair in build_pairs(model, facts)}
    backward = {facts[::-1][pair.fact].subject: pair.donor for pair in build_pairs(model, facts[::-1])}
    assert forward == backward


def test_answers_that_begin_alike_are_compared_at_the_first_token_that_differs(
    model: Model, facts: tuple[Fact, ...]
) -> None:
    long = ("red city one", "red city two")
    both = tuple(replace(facts[i], target_true=long[i], choices=long) for i in range(2))
    ids = {name: model.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in long}  # type: ignore[misc]
    shared = next(i for i, (a, b) in enumerate(zip(*ids.values(), strict=False)) if a != b)
    assert shared > 0
    for pair, fact in zip(build_pairs(model, both), both, strict=True):
        assert pair.answer == ids[fact.target_true][shared]
        assert list(pair.clean[-shared:]) == ids[fact.target_true][:shared]
        assert pair.aligned[-1] == (len(pair.clean) - 1, len(pair.corrupt) - 1, ROLES.index("last"))
        assert sum(role == ROLES.index("last") for *_, role in pair.aligned) == 1


def test_a_fact_without_donor_and_without_candidates_is_one_line(model: Model, facts: tuple[Fact, ...]) -> None:
    with pytest.raises(ValueError, match=r"no donor.*give more facts") as error:
        build_pairs(model, [replace(facts[0], choices=())])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no facts"):
        build_pairs(model, [])


# --- laws of every localizer ---


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_every_component_is_scored_once_and_finite(method, model: Model, facts: tuple[Fact, ...]) -> None:
    scores: ComponentScores = method(model, facts, seed=1)
    assert scores.n_facts == len(facts)
    kinds = {c.kind for c in scores.components}
    assert set(scores.components) == set(all_components(model, tuple(kinds)))
    assert np.isfinite(scores.per_fact).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_one_fact_suffices(method, model: Model, facts: tuple[Fact, ...]) -> None:
    assert method(model, facts[:1], seed=0).n_facts == 1


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_the_model_and_the_global_rng_are_untouched(method, tiny_model: MakeModel, facts: tuple[Fact, ...]) -> None:
    model = tiny_model("gpt2")
    next(model.hf.parameters()).requires_grad_(False)
    model.hf.train()  # dropout must not act, and the flag must come back
    before = state(model)
    first = method(model, facts, seed=0)
    assert state(model) == before
    np.testing.assert_array_equal(method(model, facts, seed=0).per_fact, first.per_fact)


def test_the_model_is_restored_when_a_localizer_fails(tiny_model: MakeModel, facts: tuple[Fact, ...]) -> None:
    model = tiny_model("llama")
    before = state(model)

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    handle = model.hf.get_output_embeddings().register_forward_hook(fail)
    for method in (attribution_patching, resample_ablation):
        with pytest.raises(RuntimeError, match="inside"):
            method(model, facts)
    handle.remove()
    assert state(model) == before


@pytest.mark.parametrize("method", [attribution_patching, resample_ablation], ids=lambda m: m.__name__)
def test_batch_size_and_fact_order_change_nothing(method, any_model: Model, facts: tuple[Fact, ...]) -> None:
    facts = facts[:5]
    reference = method(any_model, facts, pairs_per_fact=2, batch_size=1).per_fact
    tolerance = {"atol": 2e-5 * np.abs(reference).max()}
    padded = method(any_model, facts, pairs_per_fact=2, batch_size=4).per_fact
    np.testing.assert_allclose(padded, reference, **tolerance)
    backward = method(any_model, facts[::-1], pairs_per_fact=2, batch_size=32).per_fact
    np.testing.assert_allclose(backward[::-1], reference, **tolerance)


# --- attribution patching ---


def patched_effect(model: Model, batch: PairBatch, component: Component, embed=None) -> torch.Tensor:
    """The slow literal version: run the corrupt prompts with the component's clean values at the aligned tokens."""
    place = (component.kind, component.layer)
    with torch.no_grad():
        with hooked(model, record=[place], change_embedding=embed) as seen:  # type: ignore[arg-type]
            last_logits(model, batch.clean)
        start, width = (component.index or 0) * model.d_head, model.d_head if component.kind == "head" else None
        columns = slice(start, start + width) if width else slice(None)

        def restore(value: torch.Tensor) -> torch.Tensor:
            changed = value.clone()
            row, k = batch.roles.any(dim=2).nonzero(as_tuple=True)
            clean = seen[place][row, batch.clean_positions[row, k]]  # type: ignore[index]
            at = batch.corrupt_positions[row, k][:, None]
            changed[row[:, None], at, torch.arange(value.shape[-1])[columns]] = clean[:, columns]
            return changed

        with hooked(model, change={place: restore}):  # type: ignore[dict-item]
            after = batch.logit_diff(last_logits(model, batch.corrupt))
        return after - batch.logit_diff(last_logits(model, batch.corrupt))


def embeddings(model: Model, tokens: Tokens) -> torch.Tensor:
    with torch.no_grad():
        return embedding(model)(tokens.ids)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_the_error_against_true_patching_falls_fourfold_when_the_step_is_halved(
    architecture: str, tiny_model: MakeModel, facts: tuple[Fact, ...]
) -> None:
    model = tiny_model(architecture)
    model.hf.double()
    pairs = [pair for pair in build_pairs(model, facts) if len(pair.clean) == len(pair.corrupt)]
    batch = to_batch(model, [pair for pair in pairs if len(pair.clean) == len(pairs[0].clean)])
    components = all_components(model, ("mlp", "attention", "head"))
    clean, corrupt = embeddings(model, batch.clean), embeddings(model, batch.corrupt)
    errors = []
    with untouched(model):
        for step in (2**-5, 2**-6):
            near = lambda _output, step=step: corrupt + step * (clean - corrupt)  # noqa: E731
            scores, *_ = first_order_scores(model, batch, components, "denoise", clean_embedding=near)
            truth = torch.stack([patched_effect(model, batch, c, near) for c in components], dim=1)
            errors.append((scores.sum(dim=2) - truth).norm().item())
    assert 3.3 < errors[0] / errors[1] < 4.7


def test_the_forms_agree_for_a_small_step_and_both_is_their_mean(model: Model, facts: tuple[Fact, ...]) -> None:
    batch = next(batches(model, build_pairs(model, facts), 32))
    components = all_components(model)
    with untouched(model):
        forms = ("denoise", "noise", "both")
        denoise, noise, both = (first_order_scores(model, batch, components, form)[0] for form in forms)
    torch.testing.assert_close(both, (denoise + noise) / 2, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(denoise, noise, atol=1e-3)


def test_heads_sum_to_their_sublayers_score(any_model: Model, facts: tuple[Fact, ...]) -> None:
    if any_model.architecture.attention_write != any_model.architecture.attention:
        pytest.skip("a norm stands between the heads and the stream, so first-order effects differ by design")
    scores = attribution_patching(any_model, facts, kinds=("attention", "head"))
    for layer in range(any_model.n_layers):
        whole = scores.values[scores.components.index(Component("attention", layer))]
        heads = sum(scores.values[i] for i, c in enumerate(scores.components) if c.kind == "head" and c.layer == layer)
        assert heads == pytest.approx(whole, rel=1e-3, abs=1e-5)


def test_corrupting_with_the_same_subject_scores_zero(model: Model, facts: tuple[Fact, ...]) -> None:
    pairs = [replace(pair, corrupt=pair.clean, aligned=tuple((c, c, r) for c, _, r in pair.aligned))
             for pair in build_pairs(model, facts)]  # fmt: skip
    with untouched(model):
        scores, clean, corrupt = first_order_scores(model, to_batch(model, pairs), all_components(model), "both")
    assert not scores.any()
    torch.testing.assert_close(clean, corrupt)


# --- exact ablation ---


def test_ablation_equals_running_the_clean_prompt_with_the_donors_output(model: Model, facts: tuple[Fact, ...]) -> None:
    scores = resample_ablation(model, facts, batch_size=4)
    subject_only = [ROLES.index(role) for role in ROLES if role.startswith("subject")]
    for pair in build_pairs(model, facts)[:4]:
        batch = to_batch(model, [pair])
        drop = []
        for layer in range(model.n_layers):
            with torch.no_grad(), hooked(model, record=[("mlp", layer)]) as seen:
                last_logits(model, batch.corrupt)

            def exchange(value: torch.Tensor, donor: torch.Tensor = seen["mlp", layer], pair=pair) -> torch.Tensor:
                changed = value.clone()
                for c, k, role in pair.aligned:
                    if role in subject_only:
                        changed[0, c] = donor[0, k]
                return changed

            with torch.no_grad(), hooked(model, change={("mlp", layer): exchange}):
                after = batch.logit_diff(last_logits(model, batch.clean))
            with torch.no_grad():
                drop.append((batch.logit_diff(last_logits(model, batch.clean)) - after).item())
        np.testing.assert_allclose(scores.per_fact[pair.fact, :, 0], drop, atol=1e-5)


def train_one_mlp(model: Model, facts: Iterable[Fact], layer: int, steps: int = 120) -> Model:
    """Teach the facts to one MLP alone, so that where they sit is known."""
    pairs = build_pairs(model, list(facts))
    batch = to_batch(model, pairs)
    answers = batch.answer
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    module = model.hf.get_submodule(f"model.layers.{layer}.mlp")
    leaves = [p.requires_grad_(True) for p in module.parameters()]
    optimizer = torch.optim.Adam(leaves, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(last_logits(model, batch.clean), answers).backward()
        optimizer.step()
    model.hf.zero_grad(set_to_none=True)
    return model


def test_a_planted_mlp_is_ranked_first_and_ablating_it_moves_the_answer_to_the_donors(
    tiny_model: MakeModel, facts: tuple[Fact, ...]
) -> None:
    model = train_one_mlp(tiny_model("llama"), facts, layer=1)
    planted = Component("mlp", 1)
    exact = resample_ablation(model, facts, pairs_per_fact=3)
    assert exact.ranking()[0] == planted
    assert planted in attribution_patching(model, facts, kinds=("mlp",), pairs_per_fact=3, form="both").ranking()[:2]
    result = ablate_bands(model, facts, [Band(first=1, last=1, role="all")], pairs_per_fact=3)
    assert result["clean"].mean() > 0.9
    assert result["correct"].mean() < result["clean"].mean() - 0.3
    assert result["donor"].mean() > 0.3
    together = ablate_bands(model, facts, [Band(first=0, last=0), Band(first=1, last=1, role="all")], pairs_per_fact=3)
    assert together[together["first"] == 1].reset_index(drop=True).equals(result)


def test_ablating_unknown_layers_is_refused(model: Model, facts: tuple[Fact, ...]) -> None:
    with pytest.raises(ValueError, match=r"got layers 7 to 7 .* allowed: within 0 to 2"):
        ablate_bands(model, facts, [Band(first=7, last=7)])


# --- probe ---


def readable_from(model: Model, facts: Iterable[Fact], layer: int) -> Model:
    """Make the given block write the answer at the subject's last token (by its MLP's output)."""
    from mechunlearn.models import mlp_write
    from mechunlearn.prompts import token_roles

    facts = list(facts)
    names = sorted({fact.target_true for fact in facts})
    known = {}
    for fact in facts:
        ids, roles = token_roles(model, fact.ask(fact.prompt), fact.subject)
        known[tuple(ids)] = (roles.index("subject_last"), names.index(fact.target_true))
    rows: list[list[int]] = []
    embedding(model).register_forward_pre_hook(lambda _m, args: rows.__setitem__(slice(None), args[0].tolist()))

    def write(_module, _inputs, output):
        output = output.clone()
        for i, row in enumerate(rows):
            for ids, (position, answer) in known.items():
                if tuple(row[: len(ids)]) == ids:
                    output[i, position, answer] += 60.0
        return output

    mlp_write(model, layer).register_forward_hook(write)
    return model


def test_the_probe_scores_the_mlp_that_makes_the_attribute_readable(tiny_model: MakeModel, tiny_facts: FactSet) -> None:
    colours = tiny_facts.of("colour").facts
    twin, model = tiny_model("llama"), readable_from(tiny_model("llama"), colours, layer=1)
    scores = fact_lookup_probe(model, colours, twin=twin, folds=4, draws=1)
    assert scores.ranking()[0] == Component("mlp", 1)
    assert scores.notes["band"] == {"first": 1, "last": 1}
    curve = scores.notes["curve"]
    assert curve["accuracy"][2] > 0.9 > curve["control"][2]
    assert len(curve["accuracy"]) == model.n_layers + 1
    above = np.array(curve["accuracy"]) - np.array(curve["baseline"])
    np.testing.assert_allclose(scores.values, np.diff(above), atol=1e-9)
    same = fact_lookup_probe(model, colours, twin=model, folds=4, draws=1)
    assert same.notes["band"] == "none"
    assert max(same.values) <= 0.1 + scores.values.max() * 0.5


def test_a_model_that_knows_nothing_has_no_band(tiny_model: MakeModel, tiny_facts: FactSet) -> None:
    scores = fact_lookup_probe(tiny_model("gpt2"), tiny_facts.facts, folds=4, margin=0.3, draws=1, site="subject_mean")
    assert scores.notes["band"] == "none"
    assert set(scores.notes["relations"]) == {"colour", "city"}


def test_the_band_runs_from_the_margin_to_nine_tenths_of_the_maximum() -> None:
    assert climbing_band(np.array([0.0, 0.05, 0.2, 0.4, 0.7, 0.8, 0.75]), 0.1)[0] == (1, 4)
    assert climbing_band(np.array([0.0, 0.05, 0.09]), 0.1)[0] is None
    assert climbing_band(np.array([0.5, 0.5, 0.5]), 0.1)[0] is None
    assert climbing_band(np.array([0.0, 0.6, 0.6]), 0.1)[0] == (0, 0)


def test_too_few_facts_per_answer_for_a_probe_is_one_line(model: Model, facts: tuple[Fact, ...]) -> None:
    odd = replace(facts[0], subject="Bram Petrov", target_true="amber red", choices=())
    with pytest.raises(ValueError, match=r"relation 'colour'.*at least 2 per") as error:
        fact_lookup_probe(model, [*facts, odd])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no facts"):
        fact_lookup_probe(model, [])


# --- controls, agreement, registry ---


def test_random_controls_depend_on_the_seed_alone(model: Model, facts: tuple[Fact, ...]) -> None:
    a, b = random_mlps(model, facts, seed=1), random_mlps(model, facts[:3], seed=1)
    np.testing.assert_array_equal(a.per_fact[0], b.per_fact[0])
    assert (a.values > 0).all()
    assert not np.array_equal(a.values, random_mlps(model, facts, seed=2).values)
    assert {c.kind for c in random_components(model, facts).components} == {"mlp", "attention"}
    assert set(all_mlps(model, facts).values) == set(nonlocalized(model, facts).values) == {1.0}


def test_scores_agree_with_themselves_and_disagree_with_their_opposite(model: Model, facts: tuple[Fact, ...]) -> None:
    a = random_components(model, facts, seed=3)
    opposite = replace(a, per_fact=-a.per_fact)
    assert agreement(a, a) == pytest.approx({"pearson": 1, "spearman": 1, "top_k_recall": 1, "k": 2, "n_components": 6})
    assert agreement(a, opposite)["spearman"] == pytest.approx(-1)
    assert agreement(a, opposite)["top_k_recall"] == 0
    assert np.isnan(agreement(a, nonlocalized(model, facts))["pearson"])
    assert agreement(a, random_mlps(model, facts))["n_components"] == model.n_layers
    with pytest.raises(ValueError, match="allowed: 1 to 6"):
        agreement(a, a, top=9)


def test_all_localizers_are_registered_and_their_defaults_validate() -> None:
    names = {method.__name__ for method in METHODS} | {"fact_lookup_probe"}
    assert names <= set(LOCALIZERS.names())
    for name in names:
        method = LOCALIZERS.get(name)
        assert method.validate({}) == method.defaults()
    assert "twin" not in LOCALIZERS.get("fact_lookup_probe").defaults()
    with pytest.raises(ValueError, match="form"):
        LOCALIZERS.get("attribution_patching").validate({"form": "denoised"})
