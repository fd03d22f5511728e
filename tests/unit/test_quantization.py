"""Rounding against torch's own quantisers, laws of code flips, and an attack that undoes an edit below half a step."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from mechunlearn.attack import ATTACKS, quantization
from mechunlearn.edit.training import substituted
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model, all_components, oriented, weight_matrices
from mechunlearn.prompts import forms
from mechunlearn.rounding import code_flip_rate, code_flips, round_to_nearest

WEIGHT = torch.randn(24, 50, generator=torch.Generator().manual_seed(0))


def steps(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [0, 1, 20, 25, 64])
def test_rounding_is_torchs_fake_quantisation_of_every_group(bits: int, group_size: int) -> None:
    top = 2 ** (bits - 1) - 1
    parts = [
        torch.fake_quantize_per_channel_affine(
            part, steps(part, bits), torch.zeros(len(part), dtype=torch.int32), 0, -top, top
        )
        for part in WEIGHT.split(group_size or 50, dim=1)  # the last group is smaller when they do not divide
    ]
    torch.testing.assert_close(
        round_to_nearest(WEIGHT, bits=bits, group_size=group_size), torch.cat(parts, 1), atol=1e-6, rtol=1e-5
    )


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_int8_rows_are_those_of_a_quantised_tensor() -> None:
    zeros = torch.zeros(len(WEIGHT), dtype=torch.int64)
    quantised = torch.quantize_per_channel(WEIGHT, steps(WEIGHT, 8), zeros, axis=0, dtype=torch.qint8)
    torch.testing.assert_close(round_to_nearest(WEIGHT, bits=8), quantised.dequantize(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_moves_by_more_than_half_a_step_and_rounding_twice_is_rounding_once(bits: int) -> None:
    rounded = round_to_nearest(WEIGHT, bits=bits)
    moved = (rounded - WEIGHT).abs()
    assert (moved <= steps(WEIGHT, bits)[:, None] / 2 * (1 + 1e-5)).all()
    assert moved.max() > 0.4 * steps(WEIGHT, bits).min()
    torch.testing.assert_close(round_to_nearest(rounded, bits=bits), rounded)
    torch.testing.assert_close(round_to_nearest(-3 * WEIGHT, bits=bits), -3 * rounded)


def test_an_outlier_costs_its_own_group_only() -> None:
    weight = WEIGHT.clone()
    weight[:, 0] = 100.0
    row, group = (round_to_nearest(weight, bits=4, group_size=size)[:, 10:] for size in (0, 10))
    assert (row == 0).all()
    torch.testing.assert_close(group, round_to_nearest(WEIGHT[:, 10:], bits=4, group_size=10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays_and_the_argument_is_not_touched(dtype: torch.dtype) -> None:
    weight = torch.cat([WEIGHT, torch.zeros(1, 50)]).to(dtype)
    before = weight.clone()
    rounded = round_to_nearest(weight, bits=8)
    assert rounded.dtype == dtype
    assert torch.equal(weight, before)
    assert (rounded[-1] == 0).all()


def test_changes_below_half_a_step_vanish_and_above_it_do_not() -> None:
    grid = round_to_nearest(WEIGHT, bits=4)
    step = steps(grid, 4)[:, None]
    assert code_flip_rate(grid, grid + 0.49 * step, bits=4) == 0
    assert code_flip_rate(grid, grid + 0.51 * step, bits=4) == 1
    assert code_flip_rate(grid, 2 * grid, bits=4) == pytest.approx(float((grid != 0).float().mean()))


def test_the_flip_rate_of_a_small_shift_is_the_shift_in_steps() -> None:
    """A weight anywhere on the grid crosses a boundary with probability |Delta| / s."""
    before = torch.rand(40, 2000, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before[:, 0] = 1.0
    for bits, share in ((8, 0.3), (4, 0.05)):
        assert code_flip_rate(before, before + share * steps(before, bits)[:, None], bits=bits) == pytest.approx(
            share, abs=0.01
        )


@pytest.mark.parametrize("group_size", [0, 16])
def test_weights_that_did_not_change_do_not_flip_even_beside_a_new_largest_one(group_size: int) -> None:
    after = WEIGHT.clone()
    after[:, 7] *= 30
    flips = code_flips(WEIGHT, after, bits=8, group_size=group_size)
    assert not flips[:, np.arange(50) != 7].any()
    assert flips[:, 7].float().mean() > 0.9
    assert code_flip_rate(WEIGHT, after, bits=8, group_size=group_size) == pytest.approx(
        float(flips.float().mean()), abs=1e-6
    )


@pytest.mark.parametrize(
    ("weight", "bits", "group_size"), [(WEIGHT, 1, 0), (WEIGHT, 9, 0), (WEIGHT, 8, -1), (WEIGHT[0], 8, 0)]
)
def test_bad_input_is_one_line(weight: torch.Tensor, bits: int, group_size: int) -> None:
    for call in (
        lambda: round_to_nearest(weight, bits=bits, group_size=group_size),
        lambda: code_flip_rate(weight, weight, bits=bits, group_size=group_size),
        lambda: code_flip_rate(WEIGHT, WEIGHT[:3], bits=8),
    ):
        with pytest.raises(ValueError, match="allowed") as error:
            call()
        assert "\n" not in str(error.value)


def test_bits_that_nobody_ships_are_refused() -> None:
    with pytest.raises(ValueError, match="bits"):
        ATTACKS.get("quantization").validate({"bits": (3,)})


def by_hand(model: Model, bits: int) -> dict[str, torch.Tensor]:
    """Every projection's weight, fake-quantised by torch along its own output axis."""
    top, found = 2 ** (bits - 1) - 1, {}
    for name, module in model.hf.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or module is model.hf.get_output_embeddings():
            continue
        weight, axis = module.weight.detach(), int(isinstance(module, Conv1D))
        scale = weight.abs().amax(dim=1 - axis) / top
        found[f"{name}.weight"] = torch.fake_quantize_per_channel_affine(
            weight, scale, torch.zeros_like(scale, dtype=torch.int32), axis, -top, top
        )
    return found


def test_every_projection_is_rounded_along_its_outputs_and_the_scores_are_those_of_the_rounded_model(
    any_model: Model, tiny_split: FactSplit
) -> None:
    model = any_model
    result = quantization(model, tiny_split, group_sizes=(0,), report_all_forms=False)
    for setting, tensors in (("none", {}), ("int8 per row", by_hand(model, 8)), ("int4 per row", by_hand(model, 4))):
        with substituted(model, tensors):
            hidden = score_facts(model, tiny_split.forget_hidden)["p_true"].to_numpy()
            dev = score_facts(model, tiny_split.attack_dev)["p_true"].mean()
        rows = result.rows[result.rows["setting"] == setting]
        np.testing.assert_allclose(rows["p_true"], hidden, atol=1e-4)
        assert result.notes["dev_p_true"][setting] == pytest.approx(dev, abs=1e-4)
    assert set(weight_matrices(model, all_components(model))) == set(by_hand(model, 8))
    assert result.by_form is None


def labelled(model: Model, facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
    """The facts with what the model says as their true answer."""
    return tuple(
        replace(fact, target_true=top) for fact, top in zip(facts, score_facts(model, facts)["top"], strict=True)
    )


@pytest.fixture(scope="module")
def vanishing(tiny_model: Callable[..., Model], tiny_split: FactSplit) -> tuple[Model, FactSplit]:
    """A model edited by less than half an int4 step everywhere, and facts: forgotten and retained are the original's.

    The original is on the grid, so that rounding the edited model to int4 gives exactly it.
    """
    model = tiny_model("gpt2", seed=3)
    with torch.no_grad():
        model.hf.get_output_embeddings().weight.mul_(4)
    parameters, generator = dict(model.hf.named_parameters()), torch.Generator().manual_seed(0)
    parts = ("forget_shown", "forget_hidden", "attack_dev", "retain_train", "retain_test")
    edit = {}
    with torch.no_grad():
        for name in weight_matrices(model, all_components(model)):
            parameters[name].copy_(by_hand(model, 4)[name])
            grid = oriented(model, name, parameters[name])
            noise = 0.45 * torch.randn(grid.shape, generator=generator).sign() * steps(grid, 4)[:, None]
            largest = grid.abs() == grid.abs().amax(dim=1, keepdim=True)  # the scale stays
            edit[name] = oriented(model, name, torch.where(largest, grid, grid + noise)).clone()
            assert code_flip_rate(grid, oriented(model, name, edit[name]), bits=4) == 0
            assert code_flip_rate(grid, oriented(model, name, edit[name]), bits=8) > 0.5
        split = replace(tiny_split, **{part: labelled(model, getattr(tiny_split, part)) for part in parts})
        for name, value in edit.items():
            parameters[name].copy_(value)
    return model, split


def test_an_edit_below_half_a_step_is_undone(vanishing: tuple[Model, FactSplit]) -> None:
    model, split = vanishing
    before = model.sha256
    result = quantization(model, split, group_sizes=(0,))
    assert model.sha256 == before
    assert result.chosen == "int4 per row"
    assert result.health.healthy
    assert result.health.fitted is None  # it trains on nothing
    assert result.final()["correct"].all()
    assert result.before["correct"].mean() < 0.7
    assert set(result.rows["setting"]) == {"none", "int8 per row", "int4 per row"}
    assert result.by_form is not None
    assert set(result.by_form["setting"]) == set(forms(split.forget_hidden[0]))
    asked = result.by_form[result.by_form["setting"] == "prompt"]["p_true"]
    assert asked.tolist() == result.final()["p_true"].tolist()


def test_rounding_that_breaks_what_is_retained_is_not_chosen(vanishing: tuple[Model, FactSplit]) -> None:
    model, split = vanishing
    kept = replace(split, retain_test=labelled(model, split.retain_test))  # now rounding changes retained answers
    result = quantization(model, kept, group_sizes=(0,))
    assert result.notes["dev_p_true"]["int4 per row"] > result.notes["dev_p_true"]["none"]
    assert "retained" in result.notes["unhealthy"]["int4 per row"]
    assert result.chosen != "int4 per row"
    assert result.health.healthy


def test_nothing_that_helps_is_asking_by_the_prompt(vanishing: tuple[Model, FactSplit]) -> None:
    model, split = vanishing
    relabelled = zip(split.forget_shown, labelled(model, split.forget_shown), strict=True)
    own = replace(split, attack_dev=tuple(new for old, new in relabelled if old != new))  # rounding loses all of these
    assert own.attack_dev
    result = quantization(model, own, bits=(4,), group_sizes=(0,))
    assert result.chosen == "none"
    assert result.hidden_scores() == result.hidden_before()
    assert (result.health.retained_after, result.health.perplexity_ratio) == (result.health.retained_before, 1.0)


@pytest.mark.parametrize("part", ["attack_dev", "forget_hidden"])
def test_an_empty_part_is_one_line(part: str, tiny_model: Callable[..., Model], tiny_split: FactSplit) -> None:
    with pytest.raises(ValueError, match=part):
        quantization(tiny_model(), replace(tiny_split, **{part: ()}), bits=(8,), group_sizes=(0,))
