"""Closed-form editors: the formulas by hand, the laws of masks, and whether the facts do change."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import mechunlearn.edit.value_search as value_search
from mechunlearn.activations import hooked, untouched
from mechunlearn.checkpoints import load_model
from mechunlearn.components import Component
from mechunlearn.edit import EDITORS
from mechunlearn.edit.alphaedit import confined_update, null_space
from mechunlearn.edit.closed_form import kept_moments
from mechunlearn.edit.edits import WeightEdit, applied, load_edit, save_edit
from mechunlearn.edit.keys_values import Row, added_at_subjects, means_at_subjects, row_tensors, rows_of
from mechunlearn.edit.least_squares import masked_update
from mechunlearn.edit.memit import against_text
from mechunlearn.edit.projections import before_norm, projection_weight
from mechunlearn.edit.rome import rank_one
from mechunlearn.edit.value_search import ValueSearch, search_values
from mechunlearn.facts import FactSplit, hash_facts, split_facts, with_edit_targets
from mechunlearn.masks import ParameterMask, mask_of
from mechunlearn.metrics import candidate_log_probs, score_facts
from mechunlearn.models import Model, mlp_neurons, mlp_write, oriented
from mechunlearn.organisms.forget_sets import load_forget_set

METHODS = ("rome", "memit", "alphaedit")
QUICK = {"steps": 3, "prefixes": 1, "n_texts": 20, "cache": False}
SEARCH = ValueSearch(
    steps=4, learning_rate=0.1, kl_weight=0.1, weight_decay=0.1, clamp_norm=1.0, batch_size=64
)  # fmt: skip


def few(split: FactSplit, n: int) -> FactSplit:
    return replace(split, forget_shown=split.forget[:n], attack_dev=(), forget_hidden=())


def mlps(model: Model, *layers: int) -> ParameterMask:
    return mask_of(model, [Component("mlp", layer) for layer in layers])


def weight(model: Model, layer: int) -> np.ndarray:
    name = projection_weight(model, layer)
    return oriented(model, name, model.hf.get_parameter(name).detach()).double().numpy().copy()


def change(model: Model, edit: WeightEdit, layer: int) -> np.ndarray:
    before = weight(model, layer)
    with applied(model, edit):
        return weight(model, layer) - before


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def moment(d: int, seed: int = 1) -> np.ndarray:
    keys = drawn(3 * d, d, seed=seed)
    return keys.T @ keys / len(keys)


def with_damping(c: np.ndarray) -> np.ndarray:
    return c + 1e-4 * np.diag(c).mean() * np.eye(len(c))


# the formulas


def test_a_rank_one_update_is_the_cheapest_one_that_gives_the_value():
    c, key, missing = moment(9), drawn(1, 9, seed=2), drawn(1, 5, seed=3)
    update = rank_one(*tensors(c, key, missing)).numpy()
    direction = np.linalg.solve(with_damping(c), key[0])
    np.testing.assert_allclose(update, np.outer(missing, direction) / (key[0] @ direction), atol=1e-12)
    np.testing.assert_allclose(update @ key[0], missing[0], atol=1e-12)

    def cost(delta: np.ndarray) -> float:
        return float(np.trace(delta @ with_damping(c) @ delta.T))

    for seed in range(5):  # any other update that gives the same value costs more
        other = drawn(5, 9, seed=10 + seed)
        other -= np.outer(other @ key[0], key[0]) / (key[0] @ key[0])
        assert cost(update + 0.1 * other) > cost(update)


def test_a_batch_update_solves_the_least_squares_problem_it_states():
    c, keys, missing = moment(9), drawn(4, 9, seed=2), drawn(4, 5, seed=3)
    update = against_text(*tensors(c, keys, missing), weight=0.3).numpy()
    root = np.linalg.cholesky(
        0.3 * 9 * with_damping(c)
    ).T  # |root Delta^T|^2 = weight * n_columns * tr(Delta C Delta^T)
    stacked, wanted = np.concatenate([keys, root]), np.concatenate([missing, np.zeros((9, 5))])
    np.testing.assert_allclose(update, np.linalg.lstsq(stacked, wanted, rcond=None)[0].T, atol=1e-10)


def test_an_update_off_the_text_leaves_its_keys_alone_and_is_a_ridge_solution():
    seen, keys, missing = drawn(4, 9), drawn(3, 9, seed=2), drawn(3, 5, seed=3)
    c = seen.T @ seen / 4
    update = off_the_text(*tensors(c, keys, missing), share=1e-9).numpy()
    np.testing.assert_allclose(update @ seen.T, 0, atol=1e-12)
    p = np.eye(9) - np.linalg.pinv(seen) @ seen
    alpha = 0.2 * (keys**2).sum(1).mean()
    # equation 14 of the source, without earlier edits
    expected = missing.T @ keys @ p @ np.linalg.inv(keys.T @ keys @ p + alpha * np.eye(9))
    np.testing.assert_allclose(update, expected, atol=1e-10)


def off_the_text(c: torch.Tensor, keys: torch.Tensor, missing: torch.Tensor, share: float) -> torch.Tensor:
    return confined_update(null_space(c, share), keys, missing, 0.2)


def test_a_null_space_holds_no_more_of_the_trace_than_its_share():
    c = torch.diag(torch.tensor([8.0, 0.5, 1.5, 0.0, 10.0], dtype=torch.float64))
    for share, size in ((1e-6, 1), (0.05, 2), (0.11, 3), (0.6, 4)):
        free = null_space(c, share)
        assert free.shape == (5, size)
        assert float((free.T @ c @ free).trace()) <= share * 20 + 1e-9
    assert null_space(torch.eye(5, dtype=torch.float64), 0.1).shape == (5, 0)


SOLVERS = {"memit": partial(against_text, weight=0.3), "alphaedit": partial(off_the_text, share=0.5)}


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_each_row_is_solved_on_its_own_allowed_entries(solve):
    c, keys, missing = tensors(moment(9), drawn(4, 9, seed=2), drawn(4, 6, seed=3))
    allowed = torch.from_numpy(drawn(6, 9, seed=4) > 0)
    allowed[0], allowed[1], allowed[2] = True, False, allowed[3]
    update = masked_update(allowed, c, keys, missing, solve)
    assert not update[~allowed].any()
    assert (update[allowed] != 0).float().mean() > 0.9  # alone, an entry may have no free direction
    for row, entries in enumerate(allowed):
        if entries.any():
            alone = solve(c[entries][:, entries], keys[:, entries], missing[:, [row]])
            torch.testing.assert_close(update[row, entries], alone[0], atol=1e-12, rtol=0)


def test_a_masked_rank_one_update_gives_the_value_in_every_row_that_may_change():
    c, key, missing = tensors(moment(9), drawn(1, 9, seed=2), drawn(1, 6, seed=3))
    allowed = torch.from_numpy(drawn(6, 9, seed=4) > 0)
    allowed[1] = False
    update = masked_update(allowed, c, key, missing, rank_one)
    expected = missing[0].clone()
    expected[1] = 0
    torch.testing.assert_close(update @ key[0], expected, atol=1e-12, rtol=0)
    assert not update[~allowed].any()


def test_a_key_that_is_0_where_weights_may_change_changes_none():
    key = torch.zeros(1, 9, dtype=torch.float64)
    key[0, :4] = 1
    allowed = torch.zeros(6, 9, dtype=torch.bool)
    allowed[:, 4:] = True
    update = masked_update(allowed, torch.eye(9, dtype=torch.float64), key, torch.ones(1, 6).double(), rank_one)
    assert not update.any()


# keys, values, texts


def test_rows_are_the_prompts_with_new_answers_and_what_is_to_be_kept(tiny_model, split):
    model = tiny_model()
    facts = (*split.forget[:2], replace(split.forget[0], relation="city", prompt="{} was born in", target_new="Rome"))
    kept = [fact for fact in split.retain_train if fact.subject == facts[1].subject]
    retain = (*kept, next(fact for fact in split.retain_train if fact.subject not in {f.subject for f in facts}))
    rows = rows_of(model, facts, retain, prefixes=["What ?"], essence=["{} is a"])
    asked, others = [row for row in rows if row.targets], [row for row in rows if not row.targets]
    texts = [model.tokenizer.decode(row.ids[1:]).strip() for row in asked]
    assert texts[:2] == [facts[0].ask(facts[0].prompt), f"What ? {facts[0].ask(facts[0].prompt)}"]
    assert [row.subject for row in asked] == [0, 0, 1, 1, 0, 0]  # two facts of one subject have one value
    assert [row.subject for row in others] == [0, 1] + [1] * len(kept)
    for row, fact in zip(asked, [f for f in facts for _ in range(2)], strict=True):
        assert model.tokenizer.decode(row.targets).strip() == fact.target_new
        assert model.tokenizer.decode(row.ids[: row.at + 1]).endswith(fact.subject)
    assert len(rows_of(model, facts, forms="all")) == 6
    assert len(rows_of(model, facts[:1], prefixes=["What ?" * 40, "Where"])) == 2  # longer than the positions


def test_prefixes_are_drawn_with_the_seed(tiny_model, split):
    one, two, other = (rows_of(tiny_model(), split.forget[:1], prefixes=2, seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one != other
    assert len(one) == 3


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_means_are_taken_at_the_subjects_last_tokens(tiny_model, split, architecture):
    model = tiny_model(architecture)
    rows = rows_of(model, split.forget[:3], prefixes=["What ?", "Where is"], essence=["{} is"])
    found = means_at_subjects(model, rows, [("neuron", 1), ("block", 2)], batch_size=4)
    for subject in range(3):
        own = [row for row in rows if row.subject == subject and row.targets]
        with torch.no_grad(), hooked(model, record=[("neuron", 1), ("block", 2)]) as seen:
            for place, means in found.items():
                each = []
                for row in own:
                    model.hf(torch.tensor([row.ids]))
                    each.append(seen[place][0, row.at].double())
                torch.testing.assert_close(means[subject], torch.stack(each).mean(0), atol=1e-5, rtol=1e-5)


def test_what_is_added_reaches_the_stream_at_the_subject_only(tiny_model, split):
    model = tiny_model()
    row = rows_of(model, split.forget[:1])[0]
    delta = torch.ones(1, model.d_model)
    with torch.no_grad(), hooked(model, record=[("mlp", 1)]) as seen:
        model.hf(torch.tensor([row.ids]))
        before = seen["mlp", 1]
        with added_at_subjects(model, 1, torch.tensor([row.at]), delta):
            model.hf(torch.tensor([row.ids]))
    moved = (seen["mlp", 1] - before)[0]
    torch.testing.assert_close(moved[row.at], delta[0])
    assert not np.delete(moved.numpy(), row.at, axis=0).any()
    assert not mlp_neurons(model, 1)._forward_hooks


def norms_of(n: int) -> torch.Tensor:
    return torch.full((n,), 3.0)


def search(model: Model, rows: list[Row], n: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    with untouched(model):
        return search_values(model, rows, 1, norms_of(n), replace(SEARCH, **options))


def test_the_first_loss_of_a_search_is_that_of_the_unchanged_model(tiny_model, split):
    model, facts = tiny_model(), [replace(fact, target_new="red blue") for fact in split.forget[:3]]
    _, losses = search(model, rows_of(model, facts, essence=["{} is"]), 3, steps=1)
    scored = candidate_log_probs(model, [f.ask(f.prompt) for f in facts], [("red blue",)] * 3)
    np.testing.assert_allclose(losses[0].numpy(), [-float(s[0]) for s in scored], atol=1e-4)


def test_values_do_not_depend_on_batches_and_make_the_new_answers_likely(tiny_model, split):
    model = tiny_model()
    rows = rows_of(model, split.forget[:4], split.retain_train, prefixes=1, essence=["{} is a"])
    one, losses = search(model, rows, 4, batch_size=1, steps=8)
    many, _ = search(model, rows, 4, batch_size=64, steps=8)
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-3)
    assert (losses[-1] < losses[0]).all()
    assert losses.shape == (8, 4)


def test_a_value_is_no_longer_than_allowed_and_stays_once_it_is_good(tiny_model, split, monkeypatch):
    model = tiny_model()
    rows = rows_of(model, split.forget[:2])
    for steps in (1, 10):
        deltas, _ = search(model, rows, 2, steps=steps, learning_rate=1.0, clamp_norm=0.2)
        assert (deltas.norm(dim=1) < 0.2 * 3.0 + 1e-5).all()
        assert steps > 1 or (deltas.norm(dim=1) > 0.2 * 3.0 - 1e-5).all()
    monkeypatch.setattr(value_search, "STOP_LOSS", 1e9)
    deltas, losses = search(model, rows, 2, steps=3)
    assert not deltas.any()
    assert torch.equal(losses[0], losses[2])


def test_a_search_of_no_steps_finds_nothing_missing(tiny_model, split):
    model = tiny_model()
    deltas, losses = search(model, rows_of(model, split.forget[:2]), 2, steps=0)
    assert not deltas.any()
    assert losses.shape == (0, 2)
    for name in METHODS:
        edit = EDITORS.get(name).function(model, mlps(model, 1), few(split, 2), **QUICK | {"steps": 0})
        assert np.abs(change(model, edit, 1)).max() < 1e-5
        assert edit.history == ()


def test_kl_and_weight_decay_hold_a_value_back(tiny_model, split):
    model = tiny_model()
    with torch.no_grad():  # or hardly any word's probability would depend on the subject
        model.hf.get_output_embeddings().weight.mul_(25)
    rows = rows_of(model, split.forget[:2], essence=["{} is a"])
    essence = rows[-2:]

    @torch.no_grad()
    def divergence(deltas: torch.Tensor) -> float:
        ids, (at, subject) = row_tensors(model, essence)
        unchanged = model.hf(ids).logits[torch.arange(2), [len(row.ids) - 1 for row in essence]].log_softmax(-1)
        with added_at_subjects(model, 1, at, deltas[subject]):
            now = model.hf(ids).logits[torch.arange(2), [len(row.ids) - 1 for row in essence]].log_softmax(-1)
        return float((now.exp() * (now - unchanged)).sum())

    free, _ = search(model, rows, 2, kl_weight=0.0, weight_decay=0.0, steps=12)
    short, _ = search(model, rows, 2, kl_weight=0.0, weight_decay=100.0, steps=12)
    near, _ = search(model, rows, 2, kl_weight=1e5, weight_decay=0.0, steps=12)
    assert (short.norm(dim=1) < 0.8 * free.norm(dim=1)).all()
    assert divergence(near) < 0.5 * divergence(free)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "llama"])
def test_before_a_norm_what_is_missing_after_it_is_asked_for(tiny_model, architecture):
    model = tiny_model(architecture)
    outputs, missing = tensors(drawn(3, 32), 0.3 * drawn(3, 32, seed=1))
    added = before_norm(model, 1, outputs, missing)
    if architecture == "llama":
        assert torch.equal(added, missing)
        return
    norm = mlp_write(model, 1)
    with torch.no_grad():
        wanted, got = norm(outputs.float()).double() + missing, norm((outputs + added).float()).double()
    cosine = torch.nn.functional.cosine_similarity(wanted, got)
    torch.testing.assert_close(cosine, torch.ones(3).double(), atol=1e-5, rtol=0)


# the editors


@pytest.fixture
def noted(monkeypatch):
    """What the search found: (keys, missing values) of each call."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def note(*args):
        keys, deltas, losses = value_search.found_values(*args)
        seen.append((keys.numpy(), deltas.numpy()))
        return keys, deltas, losses

    for module in ("rome", "spreading"):
        monkeypatch.setattr(sys.modules[f"mechunlearn.edit.{module}"], "found_values", note)
    return seen


def second_moment(model: Model, split: FactSplit, layer: int) -> np.ndarray:
    found = kept_moments(model, [layer], split.retain_train, None, n_texts=20, retain_share=0.5, cache=False)
    return found[layer].numpy()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_rome_writes_the_value_at_the_key_by_the_closed_form(tiny_model, split, noted, architecture):
    model, one = tiny_model(architecture), few(split, 1)
    edit = EDITORS.get("rome").function(model, mlps(model, 1), one, **QUICK)
    assert [name for name in edit.values] == [projection_weight(model, 1)]
    (((key,), (missing,)),) = noted
    direction = np.linalg.solve(with_damping(second_moment(model, split, 1)), key)
    found = change(model, edit, 1)
    scale = np.abs(found).max()
    np.testing.assert_allclose(found, np.outer(missing, direction) / (key @ direction), atol=1e-5 * scale)
    np.testing.assert_allclose(found @ key, missing, atol=1e-4 * np.abs(missing).max())
    rows = [row for row in rows_of(model, one.forget, prefixes=1) if row.targets]
    mean = means_at_subjects(model, rows, [("neuron", 1)], batch_size=1)["neuron", 1][0]
    np.testing.assert_allclose(key, mean, atol=1e-5)  # key and value over the same prefixes


def test_rome_edits_one_subject_after_another_on_the_weights_left_by_those_before(tiny_model, split, noted):
    model = tiny_model()
    edit = EDITORS.get("rome").function(model, mlps(model, 1), few(split, 3), **QUICK)
    assert len(noted) == 3
    inverse = np.linalg.inv(with_damping(second_moment(model, split, 1)))
    total = sum(np.outer(m[0], inverse @ k[0]) / (k[0] @ inverse @ k[0]) for k, m in noted)
    found = change(model, edit, 1)
    np.testing.assert_allclose(found, total, atol=1e-5 * np.abs(found).max())
    alone = noted[1][1][0]
    EDITORS.get("rome").function(model, mlps(model, 1), replace(few(split, 2), forget_shown=split.forget[1:2]), **QUICK)
    assert np.abs(alone - noted[3][1][0]).max() > 1e-4  # the second value is searched on weights that the first changed


@pytest.mark.parametrize("name", METHODS)
def test_layers_are_edited_up_to_the_one_asked_for_but_not_the_models_last(tiny_model, split, name):
    model, editor = tiny_model(), EDITORS.get(name).function
    for layer, last in ((None, 1), (0, 0), (1, 1)):
        edit = editor(model, mlps(model, 0, 1, 2), few(split, 1), **QUICK, layer=layer)
        expected = [last if layer is not None else 0] if name == "rome" else range(last + 1)
        assert list(edit.values) == [projection_weight(model, each) for each in expected]
    with pytest.raises(ValueError, match="got layer 2, allowed: the masked MLPs, 0, 1") as error:
        editor(model, mlps(model, 0, 1), few(split, 1), **QUICK, layer=2)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="got layer 2, after which nothing reads") as error:
        editor(model, mlps(model, 2), few(split, 1), **QUICK)
    assert "\n" not in str(error.value)


def test_memit_with_one_layer_and_one_fact_is_the_ridge_solution(tiny_model, split, noted):
    model = tiny_model()
    edit = EDITORS.get("memit").function(model, mlps(model, 1), few(split, 1), **QUICK, covariance_weight=0.5)
    (((key,), (missing,)),) = noted
    normal = 0.5 * 48 * with_damping(second_moment(model, split, 1)) + np.outer(key, key)
    found = change(model, edit, 1)
    np.testing.assert_allclose(found, np.outer(missing, np.linalg.solve(normal, key)), atol=1e-5 * np.abs(found).max())


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_memit_brings_the_last_stream_where_the_values_would_have_it(tiny_model, split, noted, architecture):
    model, facts = tiny_model(architecture), few(split, 3)
    rows = rows_of(model, facts.forget, prefixes=1)
    end = ("block", 1)

    def stream(delta: torch.Tensor | None = None) -> torch.Tensor:
        return means_at_subjects(model, rows, [end], batch_size=64, layer=1, delta=delta)[end]

    options = QUICK | {"covariance_weight": 1e-9, "steps": 3, "learning_rate": 0.02}
    edit = EDITORS.get("memit").function(model, mlps(model, 0, 1), facts, **options)
    before, wanted = stream(), stream(torch.from_numpy(noted[0][1]))
    with applied(model, edit):
        now = stream()
    assert np.abs(change(model, edit, 0)).max() > 0
    left = (now - wanted).norm(dim=1) / (wanted - before).norm(dim=1)
    # the norm after Gemma's MLPs does not let every length through, and the means are not of linear things
    assert (left < (0.35 if architecture == "gemma2" else 0.1)).all(), left


def test_alphaedit_leaves_what_the_preserved_keys_give(tiny_model, split):
    model, texts = tiny_model(), ["The colour of Bram is red .", "Cora likes the city of Rome"]
    options = QUICK | {"text": texts, "retain_share": 0.0, "null_share": 1e-6, "ridge": 1e-3, "steps": 8}
    edit = EDITORS.get("alphaedit").function(model, mlps(model, 1), few(split, 4), **options)
    keys = []
    with torch.no_grad(), hooked(model, record=[("neuron", 1)]) as seen:
        for text in texts:
            model.hf(torch.tensor([model.tokenizer(text)["input_ids"]]))
            keys.append(seen["neuron", 1][0].double().numpy())
    preserved, found = np.concatenate(keys), change(model, edit, 1)
    own = means_at_subjects(model, rows_of(model, split.forget[:4]), [("neuron", 1)], batch_size=9)["neuron", 1].numpy()
    assert np.abs(found @ preserved.T).max() < 1e-5 * np.abs(found @ own.T).max()
    assert np.abs(found @ own.T).max() > 1e-2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_only_the_masked_rows_and_neurons_change(tiny_model, split, architecture, name):
    model = tiny_model(architecture)
    weight_name = projection_weight(model, 1)
    rows, columns = torch.arange(32) % 3 == 0, torch.arange(48) % 2 == 0
    allowed = oriented(model, weight_name, rows[:, None] & columns[None, :]).contiguous()
    mask = ParameterMask(entries={weight_name: allowed}, shapes={weight_name: tuple(allowed.shape)})
    edit = EDITORS.get(name).function(model, mask, few(split, 2), **QUICK)
    found = change(model, edit, 1)
    assert not found[~rows.numpy()].any()
    assert not found[:, ~columns.numpy()].any()
    assert (found[rows.numpy()][:, columns.numpy()] != 0).mean() > 0.9
    neurons = mask_of(model, [Component("neuron", 1, index) for index in range(0, 48, 2)])
    whole_rows = change(model, EDITORS.get(name).function(model, neurons, few(split, 2), **QUICK), 1)
    scale = np.abs(whole_rows).max()
    if name != "rome":  # whose second value depends on what the first changed
        np.testing.assert_allclose(found[rows.numpy()], whole_rows[rows.numpy()], atol=1e-4 * scale)


@pytest.mark.parametrize("name", METHODS)
def test_a_mask_without_output_projections_is_refused_and_an_empty_one_changes_nothing(tiny_model, split, name):
    model = tiny_model()
    editor = EDITORS.get(name).function
    for mask in (mask_of(model, [Component("attention", 1)]), without_projection(model)):
        with pytest.raises(ValueError, match=f"{name}: .*mlp.down_proj.weight") as error:
            editor(model, mask, split, **QUICK)
        assert "\n" not in str(error.value)
    edit = editor(model, mask_of(model, []), split, **QUICK)
    assert not edit.values
    assert not edit.mask.entries


def without_projection(model: Model) -> ParameterMask:
    mask = mlps(model, 1)
    names = [name for name in mask.entries if "down_proj" not in name]
    return ParameterMask(
        entries={name: mask.entries[name] for name in names}, shapes={name: mask.shapes[name] for name in names}
    )


def test_alphaedit_says_when_no_direction_is_free(tiny_model, split):
    model = tiny_model()
    mask = mask_of(model, [Component("neuron", 1, 0)])
    with pytest.raises(ValueError, match=r"null_share 0.1, .* raise null_share") as error:
        EDITORS.get("alphaedit").function(model, mask, few(split, 1), **QUICK)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_missing_is_named(tiny_model, tiny_split, split, name):
    model, editor = tiny_model(), EDITORS.get(name).function
    mask = mlps(model, 1)
    with pytest.raises(ValueError, match="with_edit_targets"):
        editor(model, mask, tiny_split, **QUICK)
    with pytest.raises(ValueError, match="no facts to forget"):
        editor(model, mask, few(split, 0), **QUICK)
    with pytest.raises(ValueError, match="essence"):
        editor(model, mask, split, **QUICK, essence=("he is",))


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_edit_leaves_the_model_as_it_was(tiny_model, split, monkeypatch, name):
    model, before, calls = tiny_model(), tiny_model().sha256, []
    model.hf.train()

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")
        return masked_update(*args, **options)

    for module in ("rome", "spreading"):
        monkeypatch.setattr(sys.modules[f"mechunlearn.edit.{module}"], "masked_update", stop)
    with pytest.raises(RuntimeError, match="stop"):
        EDITORS.get(name).function(model, mlps(model, 0, 1), few(split, 3), **QUICK)
    assert model.sha256 == before
    assert model.hf.training
    assert all(parameter.requires_grad for parameter in model.hf.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_is_recorded_repeated_and_read_back(tiny_model, split, tmp_path: Path, name):
    model, facts = tiny_model(), few(split, 2)
    editor = EDITORS.get(name).function
    one, two, other = (editor(model, mlps(model, 1), facts, **QUICK, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(one.values[key], two.values[key]) for key in one.values)
    assert not all(torch.equal(one.values[key], other.values[key]) for key in one.values)
    assert one.facts_sha256 == hash_facts((*facts.forget, *facts.retain_train))
    assert one.options.keys() == EDITORS.get(name).defaults().keys() - {"cache"}
    assert (one.method, one.seed, len(one.history)) == (name, 3, 3)
    save_edit(one, tmp_path / "edit")
    read = load_edit(tmp_path / "edit")
    assert (read.options, read.history, read.mask.components) == (one.options, one.history, (Component("mlp", 1),))


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_kept(tiny_model, split, name):
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    edit = EDITORS.get(name).function(model, mlps(model, 1), few(split, 2), **QUICK)
    assert all(value.dtype == torch.bfloat16 for value in edit.values.values())
    assert np.abs(change(model, edit, 1)).max() > 0


def test_scored_parts_are_never_read(tiny_model, split, unscored):
    guarded = unscored(few(split, 3))
    model = tiny_model()
    for name in METHODS:
        EDITORS.get(name).function(model, mlps(model, 1), guarded, **QUICK | {"steps": 1})


@pytest.fixture(scope="module")
def atlas() -> Model:
    return load_model("atlas")


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_looks_facts_up_gives_the_new_answers_and_keeps_the_others(atlas, name):
    facts, to_forget = load_forget_set("athletes-64")
    split = split_facts(facts, with_edit_targets(to_forget[:4]), seed=0)
    edit = EDITORS.get(name).function(atlas, mlps(atlas, 1, 2, 3), split, prefixes=1, n_texts=200, cache=False)
    assert edit.history[-1] < 0.1 < 5 < edit.history[0]
    kept = split.retain_test[:40]
    before = score_facts(atlas, kept)["correct"].mean()
    with applied(atlas, edit):
        prompted, paraphrased = (score_facts(atlas, split.forget, form) for form in ("prompt", "paraphrase:0"))
        after = score_facts(atlas, kept)["correct"].mean()
    assert sum(prompted["top"].to_numpy() == [fact.target_new for fact in split.forget]) >= 3
    assert paraphrased["p_true"].mean() < 0.2
    assert after > before - 0.1


def test_options_are_checked():
    for name in METHODS:
        method = EDITORS.get(name)
        checked = method.validate({"prefixes": ["Once"], "essence": ["{} was"], "cache": "a folder", "text": ["a"]})
        assert checked["steps"] == 25
        for bad in ({"steps": -1}, {"prefixes": -1}, {"retain_share": 2.0}, {"learning_rate": 0.0}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                method.validate(bad)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_scales_the_whole_change_down(method, tiny_model, split):
    model = tiny_model()
    mask = mlps(model, 1, 2)
    editor = partial(EDITORS.get(method).function, model, mask, split, **QUICK, clamp_norm=50.0, learning_rate=2.0)
    generous = editor(max_damage=100.0)
    assert generous.notes["damage"] > 0
    limit = generous.notes["damage"] / 4
    held = editor(max_damage=limit)
    assert 0.8 * limit < held.notes["damage"] <= limit
    parameters = dict(model.hf.named_parameters())
    shares = []
    for name, value in held.values.items():
        base = parameters[name].detach()[held.mask.full(name)]
        whole, part = generous.values[name] - base, value - base
        shares.append(float((part @ whole) / (whole @ whole)))
        torch.testing.assert_close(part, shares[-1] * whole, atol=1e-5, rtol=1e-3)
    assert all(0 < share < 1 for share in shares)
    assert max(shares) - min(shares) < 1e-3

    assert not editor().notes
