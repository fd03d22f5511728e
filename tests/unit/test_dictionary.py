"""Dictionaries: parity with SAELens on golden tensors (tests/golden/make_sae_golden.py), files, folding, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mechunlearn.features.dictionary import Dictionary, fold_decoder_norm
from mechunlearn.features.formats import load_dictionary, save_dictionary

GOLDEN = Path(__file__).parents[1] / "golden" / "sae"
HOOK = "blocks.1.hook_resid_post"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir())


def golden(name: str) -> tuple[Dictionary, dict[str, torch.Tensor]]:
    path = GOLDEN / name
    source = path / "params.npz" if name == "gemma_scope" else path
    found = load_dictionary(source, hook_point=HOOK)
    return found, load_file(path / "golden.safetensors")


@pytest.mark.filterwarnings("ignore:.*normalize_activations")
@pytest.mark.parametrize("name", FOLDERS)
def test_features_and_reconstruction_are_those_of_saelens(name: str):
    dictionary, expected = golden(name)
    features = dictionary.encode(expected["x"])
    torch.testing.assert_close(features, expected["features"], atol=1e-5, rtol=0)
    decoded = dictionary.decode(features, like=expected["x"])
    torch.testing.assert_close(decoded, expected["reconstruction"], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*normalize_activations")
@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "topk"])
def test_folding_is_that_of_saelens_and_is_recorded(name: str):
    dictionary, expected = golden(name)
    folded = fold_decoder_norm(dictionary)
    assert folded.is_folded
    torch.testing.assert_close(folded.weights["W_dec"].norm(dim=-1), torch.ones(dictionary.d_sae))
    features = folded.encode(expected["x"])
    torch.testing.assert_close(features, expected["features_folded"], atol=1e-5, rtol=0)
    decoded = folded.decode(features, like=expected["x"])
    torch.testing.assert_close(decoded, expected["reconstruction_folded"], atol=1e-5, rtol=0)
    assert fold_decoder_norm(folded) is folded


def test_a_topk_dictionary_that_folding_would_change_is_refused():
    with pytest.raises(ValueError, match="would choose other features"):
        fold_decoder_norm(golden("topk")[0])


def test_a_topk_dictionary_of_rounded_unit_directions_folds_to_the_same_features():
    whole, expected = golden("topk")
    unit = torch.nn.functional.normalize(whole.weights["W_dec"], dim=-1)
    rounded = replace(whole, weights=whole.weights | {"W_dec": 3 * unit.bfloat16().float()})
    norm = rounded.weights["W_dec"].norm(dim=-1)
    assert float((norm / norm.mean() - 1).abs().max()) > 1e-4
    folded, x = fold_decoder_norm(rounded), expected["x"]
    features, own = folded.encode(x), rounded.encode(x)
    assert torch.equal(features > 0, own > 0)
    torch.testing.assert_close(folded.decode(features, like=x), rounded.decode(own, like=x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded.weights["W_dec"].norm(dim=-1), torch.ones(whole.d_sae), atol=0.01, rtol=0)


@pytest.mark.filterwarnings("ignore:.*normalize_activations")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_dictionary_comes_back_from_disk_as_it_was(name: str, tmp_path: Path):
    dictionary, expected = golden(name)
    dictionary = replace(dictionary, notes={"tokens": 5}, model_name="tiny", is_folded=True)
    save_dictionary(dictionary, tmp_path / "made")
    again = load_dictionary(tmp_path / "made")
    assert torch.equal(again.encode(expected["x"]), dictionary.encode(expected["x"]))
    assert again.weights.keys() == dictionary.weights.keys()
    assert vars(again) | {"weights": 0} == vars(dictionary) | {"weights": 0}


def test_hook_point_and_model_come_from_the_folder():
    found = load_dictionary(GOLDEN / "standard" / "cfg.json", model_name="mine")
    assert found.hook_point == json.loads((GOLDEN / "standard" / "cfg.json").read_text())["metadata"]["hook_name"]
    assert found.model_name == "mine"


def test_an_old_folder_without_metadata_is_read(tmp_path: Path):
    shutil.copytree(GOLDEN / "topk", tmp_path / "old")
    config = json.loads((tmp_path / "old" / "cfg.json").read_text())
    old = {"hook_point": HOOK, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": config["k"]}, "d_in": 8}
    old |= {"normalize_activations": None, "apply_b_dec_to_input": config["apply_b_dec_to_input"]}
    (tmp_path / "old" / "cfg.json").write_text(json.dumps(old))
    expected = load_file(GOLDEN / "topk" / "golden.safetensors")
    found = load_dictionary(tmp_path / "old")
    torch.testing.assert_close(found.encode(expected["x"]), expected["features"], atol=1e-5, rtol=0)
    assert (found.hook_point, found.k) == (HOOK, config["k"])


def test_scaling_that_should_have_been_folded_is_warned_about():
    with pytest.warns(UserWarning, match="expected_average_only_in"):
        golden("standard_expected_average_only_in")


def test_bad_files_are_one_clear_line(tmp_path: Path):
    with pytest.raises(ValueError, match="which activation it is of"):
        load_dictionary(GOLDEN / "gemma_scope" / "params.npz")
    with pytest.raises(FileNotFoundError, match="no dictionary at"):
        load_dictionary(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.ones((2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=r"got W_enc, a params\.npz has"):
        load_dictionary(tmp_path / "params.npz", hook_point=HOOK)
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is no params\.npz"):
        load_dictionary(tmp_path / "broken.npz", hook_point=HOOK)
    shutil.copytree(GOLDEN / "gated", tmp_path / "gated")
    config = json.loads((tmp_path / "gated" / "cfg.json").read_text())
    for changed, message in (
        ({"architecture": "batchtopk"}, "allowed: standard"),
        ({"architecture": "standard"}, "has tensors"),
    ):
        (tmp_path / "gated" / "cfg.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=message) as refused:
            load_dictionary(tmp_path / "gated")
        assert "\n" not in str(refused.value)
    (tmp_path / "gated" / "sae_weights.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="is no dictionary"):
        load_dictionary(tmp_path / "gated")


def test_pickled_arrays_are_never_loaded(tmp_path: Path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"is no params\.npz"):
        load_dictionary(tmp_path / "params.npz", hook_point=HOOK)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "deep"}, "allowed: relu"), ({"kind": "topk"}, "topk needs k"), ({"k": 2}, "topk needs k"),
        ({"weights": {"W_enc": torch.ones(8, 20)}}, "has tensors"),
    ],
)  # fmt: skip
def test_a_dictionary_that_does_not_fit_itself_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(golden("standard")[0], **changed)


def test_tensors_of_other_shapes_are_refused():
    dictionary, _ = golden("standard")
    with pytest.raises(ValueError, match=r"b_enc has shape \[3\]"):
        replace(dictionary, weights={**dictionary.weights, "b_enc": torch.ones(3)})


def test_undoing_a_scaling_needs_what_was_scaled():
    dictionary, expected = golden("standard_layer_norm")
    with pytest.raises(ValueError, match="undone with the activations"):
        dictionary.decode(expected["features"])
