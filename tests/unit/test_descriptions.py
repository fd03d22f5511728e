"""Features in words: what describes them is where they are highest, and a topic finds those that speak of it."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from mechunlearn.activations import read
from mechunlearn.features.descriptions import describe_features, features_of_topic, load_descriptions
from mechunlearn.features.selection import NothingFound
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import encode
from tests.unit.test_guard import a_dictionary


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_feature_is_described_by_its_highest_token(model, batch_size: int):
    dictionary, texts = a_dictionary(), neutral_text(20, 3)
    said = describe_features(model, dictionary, texts, n_tops=1, before=0, after=0, batch_size=batch_size)
    best: dict[int, tuple[float, str]] = {}
    for text in texts:
        ids = torch.tensor(encode(model, [text]))[:, :64]  # as many positions as the model has
        features = dictionary.encode(read(model, ids, ("block", 1)))[0, 1:]  # without BOS
        for feature in range(dictionary.d_sae):
            value, at = features[:, feature].max(0)
            if float(value) > best.get(feature, (0.0, ""))[0] + 1e-6:
                best[feature] = (float(value), model.tokenizer.decode(ids[0, 1 + int(at)]).strip())
    assert set(said) == set(best)
    assert len(said) > 5
    assert said == {feature: f"{token} in {token}" for feature, (_, token) in best.items()}


def test_contexts_are_words_around_and_never_padding(model):
    said = describe_features(model, a_dictionary(), ["word", *neutral_text(10, 3)], n_tops=3)
    assert max(len(text.split("; ")) for text in said.values()) == 3
    assert not any(special in text for text in said.values() for special in model.tokenizer.all_special_tokens)


def test_a_topic_finds_the_features_that_speak_of_it():
    said = {4: "names of hockey players", 7: "towns by a river", 9: "players in hockey arenas; the puck", 11: "colours"}
    assert set(features_of_topic(said, "hockey players", n=2)) == {4, 9}
    assert features_of_topic(said, "the river", n=5)[0] == 7
    with pytest.raises(NothingFound, match="no word of 'astronomy'"):
        features_of_topic(said, "astronomy", n=2)
    with pytest.raises(NothingFound, match="none of 1 descriptions has a word"):
        features_of_topic({3: "..."}, "astronomy", n=2)


ROWS = [{"modelId": "m", "index": "4", "description": "hockey"}, {"index": 9, "description": "a puck"},
        {"index": 9, "description": "arenas"}, {"index": 1, "description": ""}]  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "folder"])
def test_descriptions_are_read_as_neuronpedia_exports_them(tmp_path: Path, name: str):
    lines = "\n".join(json.dumps(row) for row in ROWS)
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for number, line in enumerate(lines.splitlines()):
            (path / f"batch-{number}.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(ROWS) if name == "a.json" else lines + "\n")
    assert load_descriptions(path) == {4: "hockey", 9: "a puck; arenas"}


def test_an_own_file_may_be_one_object(tmp_path: Path):
    (tmp_path / "own.json").write_text('{"12": "hockey", "3": "rivers"}')
    assert load_descriptions(tmp_path / "own.json") == {3: "rivers", 12: "hockey"}


@pytest.mark.parametrize("text", ["", "[1, 2]", '[{"index": 3}]', '{"one": "hockey"}', "index,description"])
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ValueError, match="holds no descriptions") as refused:
        load_descriptions(tmp_path / "own.json")
    assert "\n" not in str(refused.value)
    with pytest.raises(FileNotFoundError, match="no descriptions at"):
        load_descriptions(tmp_path / "none.json")
