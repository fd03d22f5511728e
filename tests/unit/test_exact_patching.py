"""Exact patching with reused blocks and tokens: equal to the naive loop, and the laws of its methods."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechunlearn.activations import hooked, last_logits, place_of, untouched
from mechunlearn.codebook import Codebook, CodebookShape
from mechunlearn.codebook_model import insert_codebook
from mechunlearn.components import ROLES, Component
from mechunlearn.facts import Fact, FactSet
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.activation_patching import activation_patching, resampled
from mechunlearn.localize.bands import Band, ablate_bands
from mechunlearn.localize.causal_tracing import causal_tracing, subject_embedding_std
from mechunlearn.localize.pairs import PairBatch, build_pairs, to_batch
from mechunlearn.localize.patching import cell_effects, component_effects, exchange, window_of
from mechunlearn.localize.patching_map import patching_map
from mechunlearn.localize.resample_ablation import resample_ablation
from mechunlearn.localize.restart import Run, skipped
from mechunlearn.localize.scoring import at_roles, clean_roles, measure_of, whole
from mechunlearn.models import Model, all_components, block, embedding
from mechunlearn.prompts import token_roles

MakeModel = Callable[..., Model]


@pytest.fixture(scope="module")
def facts(tiny_facts: FactSet) -> tuple[Fact, ...]:
    return tiny_facts.of("colour").facts[:5]


def one_token_each(batch: PairBatch) -> torch.Tensor:
    """A selection for every fourth aligned token; the batch's last ones are padding in its shorter pairs."""
    real = batch.roles.any(dim=2)
    every_fourth = torch.eye(real.shape[1], dtype=torch.bool)[(real.shape[1] - 1) % 4 :: 4]
    return every_fourth[:, None] & real


def naive(model: Model, batch: PairBatch, places, selected, *, restore: bool, columns=None, embed=None) -> torch.Tensor:
    """One whole forward pass a cell, with nothing reused: [cell batch]."""
    base, donor = (batch.corrupt, batch.clean) if restore else (batch.clean, batch.corrupt)
    to, origin = (
        (batch.corrupt_positions, batch.clean_positions)
        if restore
        else (batch.clean_positions, batch.corrupt_positions)
    )
    on_corrupt = {"change_embedding": embed}
    with hooked(model, record=places, **({} if restore else on_corrupt)) as seen:
        last_logits(model, donor)

    def swapped(place, mask):
        def change(value):
            changed = value.clone()
            for row, k in mask.nonzero().tolist():
                new, at = seen[place][row, origin[row, k]], to[row, k]
                changed[row, at] = new if columns is None else torch.where(columns, new, changed[row, at])
            return changed

        return change

    with hooked(model, **(on_corrupt if restore else {})):
        before = batch.logit_diff(last_logits(model, base))
    rows = []
    for mask in selected:
        with hooked(model, change={place: swapped(place, mask) for place in places}, **(on_corrupt if restore else {})):
            rows.append(batch.logit_diff(last_logits(model, base)) - before)
    return torch.stack(rows) * (1 if restore else -1)


def tolerance(values: torch.Tensor) -> float:
    return 1e-5 * max(1.0, float(values.abs().max()))


@pytest.mark.parametrize("restore", [True, False], ids=["denoise", "noise"])
def test_reusing_blocks_and_tokens_equals_the_naive_loop(restore: bool, any_model: Model, facts) -> None:
    model, batch = any_model, to_batch(any_model, build_pairs(any_model, facts))
    assert len({len(pair.clean) for pair in batch.pairs}) > 1, "the batch is to be padded"
    selected, measure = one_token_each(batch), measure_of(batch, "logit_diff")
    layers, head = range(model.n_layers), 1
    columns = torch.arange(model.n_heads).repeat_interleave(model.d_head) == head
    kinds = {"mlp": None, "attention": None, "block": None, "head": columns}
    with untouched(model), torch.no_grad():
        places = [(kind, layer) for kind in kinds for layer in layers]
        given = exchange(model, batch, places, restore=restore)
        changed = given.cells(selected)
        for (kind, layer), mine in ((place, kinds[place[0]]) for place in places):
            several = None if mine is None else mine.expand(len(changed), -1)
            ours = cell_effects(model, given, [(kind, layer)], changed, measure, columns=several, batch_size=7)
            theirs = naive(model, batch, [(kind, layer)], selected, restore=restore, columns=mine)
            assert theirs.abs().max() > 1e-3
            torch.testing.assert_close(ours, theirs, atol=tolerance(theirs), rtol=0, msg=f"{kind} {layer}")


@pytest.mark.parametrize("architecture", ["gpt_neo", "mistral", "gemma2", "gemma3_text"])
def test_windows_of_attention_shorter_than_the_prompt_stay_right(
    architecture: str, tiny_model: MakeModel, facts
) -> None:
    import transformers

    given_model = tiny_model(architecture)
    config = copy.deepcopy(given_model.hf.config)
    setattr(config, "window_size" if architecture == "gpt_neo" else "sliding_window", 4)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    hf.load_state_dict(given_model.hf.state_dict())
    model = replace(given_model, hf=hf.eval())
    batch = to_batch(model, build_pairs(model, facts[:3]))
    assert batch.clean.ids.shape[1] > 6
    with untouched(model), torch.no_grad():
        assert not torch.allclose(last_logits(model, batch.clean), last_logits(given_model, batch.clean), atol=1e-3)
        places = [("mlp", 0), ("attention", 1), ("mlp", 1)]
        given = exchange(model, batch, places, restore=True)
        selected = one_token_each(batch)
        for place in places:
            ours = cell_effects(model, given, [place], given.cells(selected), measure_of(batch, "logit_diff"))
            theirs = naive(model, batch, [place], selected, restore=True)
            torch.testing.assert_close(ours, theirs, atol=tolerance(theirs), rtol=0)


def test_a_window_of_layers_is_restored_together(any_model: Model, facts) -> None:
    model, batch = any_model, to_batch(any_model, build_pairs(any_model, facts))
    selected, components = at_roles(batch, ("subject", "last")), all_components(model, ("mlp", "attention"))
    with untouched(model), torch.no_grad():
        given = exchange(model, batch, [place_of(c) for c in components], restore=True)
        measure = measure_of(batch, "logit_diff")
        ours = component_effects(model, given, components, selected, measure, window=2, batch_size=5)
        for index, component in enumerate(components):
            places = [(component.kind, layer) for layer in window_of(component.layer, 2, model.n_layers)]
            theirs = naive(model, batch, places, selected, restore=True)
            torch.testing.assert_close(ours[:, index].T, theirs, atol=tolerance(theirs), rtol=0)


def test_windows_are_those_of_rome() -> None:
    assert list(window_of(5, 10, 48)) == list(range(10))
    assert list(window_of(0, 10, 48)) == list(range(5))
    assert list(window_of(47, 10, 48)) == list(range(42, 48))
    assert list(window_of(4, 1, 6)) == [4]
    assert list(window_of(4, 3, 6)) == [3, 4, 5]


def test_blocks_below_the_change_and_tokens_before_it_are_not_run(tiny_model: MakeModel, facts) -> None:
    model = tiny_model("llama")
    batch = to_batch(model, build_pairs(model, facts))
    lengths: list[list[int]] = [[] for _ in range(model.n_layers)]
    with untouched(model), torch.no_grad():
        given = exchange(model, batch, [("mlp", 0)], restore=True)
        handles = [
            block(model, n).mlp.register_forward_hook(lambda _m, i, _o, n=n: lengths[n].append(i[0].shape[1]))  # type: ignore[union-attr]
            for n in range(model.n_layers)
        ]
        changed = given.cells(at_roles(batch, ("last",)))
        cell_effects(model, given, [("mlp", 0)], changed, measure_of(batch, "logit_diff"), batch_size=1)
        for handle in handles:
            handle.remove()
    assert lengths[0] == []
    assert set(lengths[1]) == set(lengths[2]) == {1}


def test_forwards_come_back_also_when_a_restart_fails(tiny_model: MakeModel, facts) -> None:
    model = tiny_model("gpt2")
    batch = to_batch(model, build_pairs(model, facts))
    own = lambda *a, **k: None  # noqa: E731
    block(model, 0).forward = own  # as accelerate leaves one on a module
    run = Run(
        tokens=batch.clean, logits=torch.zeros(1), activations={}, keys_values=(), wraps=False
    )  # fmt: skip

    def fail() -> None:
        with skipped(model, run, range(2), torch.zeros(1)):
            assert block(model, 0).forward is not own
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert block(model, 0).forward is own
    assert "forward" not in block(model, 1).__dict__


def test_restoring_every_stream_gives_the_clean_metric_and_swapping_like_for_like_nothing(
    any_model: Model, facts
) -> None:
    model = any_model
    same = [pair for pair in build_pairs(model, facts) if len(pair.clean) == len(pair.corrupt)]
    batch = to_batch(model, same)
    measure = measure_of(batch, "logit_diff")
    with untouched(model), torch.no_grad():
        for layer in range(model.n_layers):
            given = exchange(model, batch, [("block", layer)], restore=True)
            gap = batch.logit_diff(given.logits["clean"]) - batch.logit_diff(given.logits["corrupt"])
            everything = given.cells(at_roles(batch, ("all",)))
            restored = cell_effects(model, given, [("block", layer)], everything, measure)[0]
            torch.testing.assert_close(restored, gap, atol=1e-5, rtol=1e-5)
        alike = to_batch(model, [whole(pair) for pair in same])
        places = [("mlp", 0), ("attention", 1), ("head", 1)]
        given = exchange(model, alike, places, restore=False)
        for place in places:
            nothing = cell_effects(model, given, [place], given.cells(at_roles(alike, ROLES)), measure)
            assert nothing.abs().max() < 1e-5


# --- methods ---


@pytest.mark.parametrize("codes_after", [None, 0, 1])
@pytest.mark.parametrize("form", ["denoise", "noise"])
def test_activation_patching_is_the_mean_of_the_naive_effects_by_role(
    form, codes_after, tiny_model: MakeModel, facts
) -> None:
    model = tiny_model("llama")
    if codes_after is not None:  # a codebook in the block: those that are skipped do not go through it again
        insert_codebook(model, Codebook(CodebookShape(d_model=model.d_model, n_codes=64, k=4)), codes_after)
    scores = activation_patching(model, facts, form=form, pairs_per_fact=2, batch_size=3)
    expected, count = np.zeros_like(scores.per_fact), np.zeros(len(facts))
    with untouched(model), torch.no_grad():
        for pair in build_pairs(model, facts, pairs_per_fact=2):
            batch = to_batch(model, [pair])
            count[pair.fact] += 1
            for index, component in enumerate(scores.components):
                place = (component.kind, component.layer)
                effect = naive(model, batch, [place], at_roles(batch, ROLES), restore=form == "denoise")
                expected[pair.fact, index] += effect[:, 0].numpy()
    np.testing.assert_allclose(scores.per_fact, expected / count[:, None, None], atol=2e-5)


def test_resample_ablation_is_activation_patching_with_the_donors_values(tiny_model: MakeModel, facts) -> None:
    model = tiny_model("gpt2")
    options = {"pairs_per_fact": 2, "seed": 3}
    for metric in ("logit_diff", "accuracy"):
        ablated = resample_ablation(model, facts, metric=metric, **options)
        patched = activation_patching(
            model, facts, form="noise", metric=metric, kinds=("mlp",), roles=("subject", "last"), **options
        )
        np.testing.assert_allclose(ablated.per_fact, patched.per_fact, atol=1e-5)
    lost = ablate_bands(model, facts, [Band(first=1, last=1)], **options)
    drop = (lost["clean"].astype(int) - lost["correct"]).groupby(lost["fact"]).mean()
    np.testing.assert_allclose(ablated.at("subject").per_fact[:, 1, 0], drop)


def test_a_patching_map_is_the_share_that_each_token_restores(tiny_model: MakeModel, facts) -> None:
    model = tiny_model("qwen3")
    found = patching_map(model, facts[0], facts[1:])
    pair = next(pair for pair in build_pairs(model, facts) if pair.fact == 0)
    batch = to_batch(model, [pair])
    selected = torch.eye(len(pair.aligned), dtype=torch.bool)[:, None]
    with untouched(model), torch.no_grad():
        expected = naive(model, batch, [("attention", 1)], selected, restore=True)[:, 0] / (found.clean - found.corrupt)
    row = found.values[found.components.index(Component("attention", 1))]
    np.testing.assert_allclose(row[[c for c, _, _ in pair.aligned]], expected.numpy(), atol=1e-4)
    assert found.clean == pytest.approx(float(batch.logit_diff(last_logits(model, batch.clean)).detach()), abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gpt_neox"])
def test_zero_and_mean_put_zeros_and_the_roles_means(architecture: str, tiny_model: MakeModel, facts) -> None:
    model = tiny_model(architecture)
    pairs = build_pairs(model, facts)
    zero, mean = (activation_patching(model, facts, form=form, roles=("subject", "last")) for form in ("zero", "mean"))
    component = zero.components.index(Component("mlp", 1))
    seen, roles = [], []
    with untouched(model), torch.no_grad():
        for pair in pairs:
            with hooked(model, record=[("mlp", 1)]) as values:
                last_logits(model, to_batch(model, [pair]).clean)
            seen.append(values["mlp", 1][0])
            roles.append(clean_roles(pair))
        rows = {
            role: torch.cat([v[[r == role for r in given]] for v, given in zip(seen, roles, strict=True)])
            for role in ROLES
        }
        for pair in pairs:
            batch, given = to_batch(model, [pair]), clean_roles(pair)
            for scores, filling in ((zero, lambda role: 0.0), (mean, lambda role: rows[role].mean(dim=0))):

                def fill(value, filling=filling, given=given):
                    changed = value.clone()
                    for position, role in enumerate(given):
                        if role.startswith("subject"):
                            changed[0, position] = filling(role)
                    return changed

                with hooked(model, change={("mlp", 1): fill}):
                    after = batch.logit_diff(last_logits(model, batch.clean))
                drop = (batch.logit_diff(last_logits(model, batch.clean)) - after).item()
                assert scores.per_fact[pair.fact, component, 0] == pytest.approx(drop, abs=2e-5)


def test_resampling_draws_another_fact_by_seed_and_not_by_order(tiny_model: MakeModel, tiny_facts: FactSet) -> None:
    model, facts = tiny_model("llama"), tiny_facts.facts[:10]
    first = activation_patching(model, facts, form="resample", seed=1)
    np.testing.assert_array_equal(activation_patching(model, facts, form="resample", seed=1).per_fact, first.per_fact)
    backward = activation_patching(model, facts[::-1], form="resample", seed=1).per_fact[::-1]
    np.testing.assert_allclose(backward, first.per_fact, atol=1e-5)
    assert not np.allclose(activation_patching(model, facts, form="resample", seed=2).per_fact, first.per_fact)
    assert not np.allclose(activation_patching(model, facts, form="noise", seed=1).per_fact, first.per_fact)


def test_a_resampled_run_is_another_subjects_own_prompt(tiny_model: MakeModel, tiny_facts: FactSet) -> None:
    model, facts = tiny_model("llama"), tiny_facts.facts[:12]  # a colour and a city each
    pairs = build_pairs(model, facts, pairs_per_fact=3)
    prompts = {pair.clean: facts[pair.fact].subject for pair in pairs}
    changed = resampled(pairs, facts, seed=0)
    assert all(prompts[pair.corrupt] != facts[pair.fact].subject for pair in changed)
    assert any(facts[pair.fact].prompt != facts[0].prompt for pair in changed)
    assert [(pair.clean, pair.answer, pair.counterfactual) for pair in changed] == [
        (pair.clean, pair.answer, pair.counterfactual) for pair in pairs
    ]
    alone = build_pairs(model, facts[:1])
    assert resampled(alone, facts[:1], seed=0) == alone


def test_roles_rebuilt_from_a_pair_are_those_of_the_tokenizer(tiny_model: MakeModel, tiny_facts: FactSet) -> None:
    model, facts = tiny_model("llama"), tiny_facts.facts
    for pair in build_pairs(model, facts):
        prompt = facts[pair.fact].ask(facts[pair.fact].prompt)
        assert clean_roles(pair) == token_roles(model, prompt, facts[pair.fact].subject)[1]


def test_donors_with_the_same_answer_are_a_null_for_the_forms_that_have_donors(tiny_model: MakeModel, facts) -> None:
    model, alike = tiny_model(), [replace(fact, target_true="red") for fact in facts[:2]]
    null = LOCALIZERS.get("shuffled_pairs").function(model, alike, method="activation_patching", draws=1)
    direct = activation_patching(model, alike, donors="same_answer")
    np.testing.assert_array_equal(null.per_fact, direct.per_fact)
    batch = to_batch(model, build_pairs(model, alike, donors="same_answer"))
    with torch.no_grad():
        clean = float(batch.logit_diff(last_logits(model, batch.clean)).mean())
    assert direct.notes["logit_diff_clean"] == pytest.approx(clean, abs=1e-5)
    with pytest.raises(ValueError, match="option 'donors': got 'same_answer' with form 'mean', allowed: denoise"):
        activation_patching(model, facts, donors="same_answer", form="mean")


@pytest.mark.parametrize("options", [{"kinds": ()}, {"roles": ()}, {"roles": ("last", "last")}])
@pytest.mark.parametrize("method", [activation_patching, causal_tracing])
def test_no_or_repeated_kinds_and_roles_are_one_line(method, options, tiny_model: MakeModel, facts) -> None:
    with pytest.raises(ValueError, match=r"option '(kinds|roles)': got .* allowed: ") as error:
        method(tiny_model(), facts, **options)
    assert "\n" not in str(error.value)


def left_as_found(model: Model) -> list[object]:
    """Everything a localizer could leave changed."""
    modules = list(model.hf.modules())
    return [
        model.sha256,
        torch.get_rng_state().tolist(),
        [(p.requires_grad, p.grad is None) for p in model.hf.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in modules],
        model.hf.config.to_dict(),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("name", ["activation_patching", "causal_tracing", "path_patching", "fact_lookup_paths"])
def test_the_model_is_left_as_found_also_when_a_method_fails_half_way(name, tiny_model: MakeModel, facts) -> None:
    model, method = tiny_model("gpt2"), LOCALIZERS.get(name).function
    options = {"fact_lookup_paths": {"fdr": 1.0}, "causal_tracing": {"corruption": "noise"}}.get(name, {})
    next(model.hf.parameters()).requires_grad_(False)
    model.hf.train()  # dropout must not act, and the flag must come back
    before = left_as_found(model)
    first = method(model, facts, **options)
    assert left_as_found(model) == before
    np.testing.assert_array_equal(method(model, facts, **options).per_fact, first.per_fact)
    calls: list[int] = []

    def fail_the_third_time(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:  # the first two are the unchanged runs
            raise RuntimeError("inside")

    handle = model.hf.get_output_embeddings().register_forward_hook(fail_the_third_time)
    with pytest.raises(RuntimeError, match="inside"):
        method(model, facts, **options)
    handle.remove()
    assert left_as_found(model) == before


# --- causal tracing ---


def test_without_noise_tracing_restores_nothing(tiny_model: MakeModel, facts) -> None:
    scores = causal_tracing(tiny_model("gemma2"), facts[:3], corruption="noise", noise=0.0, draws=2)
    assert np.abs(scores.per_fact).max() < 1e-5


def test_replacement_with_a_window_of_one_is_denoising(tiny_model: MakeModel, facts) -> None:
    traced = causal_tracing(tiny_model(), facts, window=1)
    np.testing.assert_allclose(traced.per_fact, activation_patching(tiny_model(), facts).per_fact, atol=1e-6)
    assert not np.allclose(causal_tracing(tiny_model(), facts, window=3).per_fact, traced.per_fact, atol=1e-3)


def test_noise_is_three_deviations_of_the_subjects_embeddings_drawn_by_seed(tiny_model: MakeModel, facts) -> None:
    model = tiny_model("gemma3_text")
    pairs = build_pairs(model, facts)
    ids = [pair.clean[position] for pair in pairs for position in pair.subject]
    with torch.no_grad():
        expected = embedding(model)(torch.tensor(ids)).std().item()
    assert subject_embedding_std(model, pairs) == pytest.approx(expected)
    noisy = {"corruption": "noise", "draws": 3, "metric": "probability", "roles": ("subject", "last"), "window": 1}
    first = causal_tracing(model, facts, **noisy, seed=5)
    assert first.notes["noise_standard_deviation"] == pytest.approx(3 * expected)
    np.testing.assert_array_equal(causal_tracing(model, facts, **noisy, seed=5).per_fact, first.per_fact)
    np.testing.assert_allclose(
        causal_tracing(model, facts, **noisy, seed=5, batch_size=3).per_fact, first.per_fact, atol=1e-5
    )
    assert not np.allclose(causal_tracing(model, facts, **noisy, seed=6).per_fact, first.per_fact)
    # the same by hand for one fact: noise on the subject's embeddings, the clean output of one MLP put back
    longest = max(len(pair.subject) for pair in pairs)
    drawn = np.random.default_rng(5).standard_normal((longest, 3, model.d_model)) * 3 * expected
    pair = pairs[2]
    batch = to_batch(model, [whole(pair)])
    effects = []
    with untouched(model), torch.no_grad():
        for draw in range(3):

            def noised(output, draw=draw):
                output = output.clone()
                output[0, list(pair.subject)] += torch.tensor(drawn[: len(pair.subject), draw], dtype=torch.float32)
                return output

            with hooked(model, change_embedding=noised):
                before = last_logits(model, batch.clean).softmax(-1)[0, pair.answer]
            with hooked(model, record=[("mlp", 1)]) as seen:
                last_logits(model, batch.clean)

            def restored(value, clean=seen["mlp", 1]):
                value = value.clone()
                value[0, list(pair.subject)] = clean[0, list(pair.subject)]
                return value

            with hooked(model, change={("mlp", 1): restored}, change_embedding=noised):
                effects.append((last_logits(model, batch.clean).softmax(-1)[0, pair.answer] - before).item())
    index = first.components.index(Component("mlp", 1))
    assert first.per_fact[pair.fact, index, 0] == pytest.approx(np.mean(effects), abs=1e-5)


def test_batches_of_another_size_change_nothing(any_model: Model, facts: Sequence[Fact]) -> None:
    one, many = (
        activation_patching(any_model, facts[:5], kinds=("mlp", "head"), batch_size=n).per_fact for n in (1, 64)
    )
    np.testing.assert_allclose(one, many, atol=2e-5 * max(1, np.abs(one).max()))
