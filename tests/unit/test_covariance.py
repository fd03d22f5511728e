"""Second moments of keys: against numpy, and the cache that must never hand out another model's or text's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mechunlearn.activations import hooked
from mechunlearn.edit.covariance import cache_folder, second_moments
from mechunlearn.models import Model
from mechunlearn.prompts import encode

TEXTS = ["The colour of Bram is red .", "Cora likes", "Where is the city ? Answer: Rome", "Dina"]


def by_hand(model: Model, layer: int, texts: list[str], width: int = 128) -> np.ndarray:
    """Every text on its own, without padding; the mean of k k^T over tokens in float64."""
    keys = []
    with torch.no_grad(), hooked(model, record=[("neuron", layer)]) as seen:
        for ids in encode(model, texts):
            model.hf(torch.tensor([ids[:width]]))
            keys.append(seen["neuron", layer][0].double().numpy())
    stacked = np.concatenate(keys)
    return stacked.T @ stacked / len(stacked)


@pytest.fixture
def forwards(monkeypatch):
    """Count forward passes of a model."""

    def count(model: Model) -> list[int]:
        seen: list[int] = []
        model.hf.base_model.register_forward_pre_hook(lambda *_: seen.append(1))
        return seen

    return count


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2"])
def test_a_second_moment_is_the_mean_outer_product_of_the_keys(tiny_model, architecture, batch_size):
    model = tiny_model(architecture)
    found = second_moments(model, [0, 2], TEXTS, batch_size=batch_size)
    assert list(found) == [0, 2]
    for layer, value in found.items():
        expected = by_hand(model, layer, TEXTS)
        np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_only_the_start_of_a_long_text_is_read(tiny_model):
    model = tiny_model()
    found = second_moments(model, [1], TEXTS, max_tokens=3)[1].numpy()
    np.testing.assert_allclose(found, by_hand(model, 1, TEXTS, width=3), atol=1e-5 * np.abs(found).max())
    assert not np.allclose(found, by_hand(model, 1, TEXTS), rtol=1e-2)


def test_half_precision_is_summed_in_full(tiny_model):
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    found = second_moments(model, [1], TEXTS * 50, batch_size=1)[1]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), by_hand(model, 1, TEXTS), atol=2e-2 * float(found.abs().max()))


def test_a_second_moment_is_measured_once(tiny_model, tmp_path: Path, forwards):
    model = tiny_model()
    first = second_moments(model, [0, 1], TEXTS, cache=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 2
    runs = forwards(model)
    again = second_moments(model, [1, 0], TEXTS, cache=tmp_path)
    assert not runs
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert all(torch.equal(first[layer], again[layer]) for layer in (0, 1))
    assert second_moments(model, [0, 2], TEXTS, cache=tmp_path).keys() == {0, 2}
    assert len(runs) == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_no_cache_reads_and_writes_nothing(tiny_model, tmp_path: Path, forwards, monkeypatch):
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path))
    model = tiny_model()
    second_moments(model, [0], TEXTS, cache=tmp_path)
    runs = forwards(model)
    second_moments(model, [0], TEXTS, cache=cache_folder(False))
    assert runs
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["weights", "texts", "tokens", "swapped files"])
def test_what_is_kept_for_something_else_is_not_used(tiny_model, tmp_path: Path, change):
    model, texts, width = tiny_model(), list(TEXTS), 128
    second_moments(model, [0, 1], texts, cache=tmp_path)
    if change == "weights":
        with torch.no_grad():
            model.hf.get_parameter("model.embed_tokens.weight").mul_(1.5)
    elif change == "texts":
        texts[1] = "Edwin likes"
    elif change == "tokens":
        width = 4
    else:
        one, other = sorted(tmp_path.iterdir())
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
    found = second_moments(model, [0, 1], texts, max_tokens=width, cache=tmp_path)
    for layer, value in found.items():
        expected = by_hand(model, layer, texts, width)
        np.testing.assert_allclose(value.numpy(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "shape", "nan"])
def test_a_damaged_file_is_measured_anew_and_replaced(tiny_model, tmp_path: Path, damage):
    model = tiny_model()
    good = second_moments(model, [1], TEXTS, cache=tmp_path)[1]
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage in ("shape", "nan"):
        bad = torch.zeros(2, 2) if damage == "shape" else good * torch.nan
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file({"second_moment": bad}, path, metadata=metadata)
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "noise": b"\xff" * 100, "empty": b""}[damage])
    assert torch.equal(second_moments(model, [1], TEXTS, cache=tmp_path)[1], good)
    assert torch.equal(load_file(path)["second_moment"], good)
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_of_the_cache(monkeypatch, tmp_path: Path):
    assert cache_folder(False) is None
    assert cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("MECHUNLEARN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mechunlearn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mechunlearn"


def test_texts_without_tokens_are_refused(tiny_model):
    with pytest.raises(ValueError, match="give some text") as error:
        second_moments(tiny_model(), [0], [])
    assert "\n" not in str(error.value)
