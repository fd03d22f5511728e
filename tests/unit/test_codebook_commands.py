"""The commands that train a codebook into one's own model, and that write a model folder with its codes erased."""

import copy
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mechunlearn import applied, load_model, save_model
from mechunlearn.cli import app
from mechunlearn.codebook import Codebook, CodebookShape
from mechunlearn.codebook_model import codebook_of, insert_codebook
from mechunlearn.evaluate.generation import generated
from mechunlearn.facts import split_facts
from mechunlearn.features.code_choice import choose_codes
from mechunlearn.features.code_deletion import paired_sentences
from mechunlearn.features.deletion import CodeDeletion
from mechunlearn.features.guard_files import save_in
from mechunlearn.features.texts import statements
from mechunlearn.features.token_rows import rows_of_texts
from mechunlearn.models import Model, wrap_model
from mechunlearn.organisms.shipped_features import LENGTH, MEASURED, ROWS

CODEBOOK_SHAPE = CodebookShape(d_model=32, n_codes=16, k=2)
QUICK = ["--set", "n_codes=48", "--set", "k=3", "--set", "steps=4", "--device", "cpu"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def ground(tiny_model, tiny_facts, tmp_path: Path) -> Path:
    """A folder with a model and with text to train on."""
    save_model(tiny_model(), tmp_path / "model")
    passages = [text for _ in range(12) for text in statements(tiny_facts.facts)]
    (tmp_path / "mine.txt").write_text("\n".join(passages) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("form", ["encoded", "plain"])
def test_a_codebook_is_trained_into_ones_own_model(ground, form):
    common = ["features", "codebook", "--model", ground / "model", "--layer", 1, "--text", ground / "mine.txt", *QUICK]
    made = run(*common, "--set", f"form={form}", "--out", ground / "with")
    assert made.exit_code == 0, made.output
    assert all(name in made.output for name in ("loss before", "loss with codebook", "cost"))
    model = load_model(ground / "with", device="cpu")
    codebook = codebook_of(model)
    assert (codebook.layer, codebook.shape.n_codes, codebook.shape.k, codebook.shape.form) == (1, 48, 3, form)
    card = json.loads((ground / "with" / "card.json").read_text())
    assert card["cost"] == card["loss with codebook"] - card["loss trained alike without"]
    assert card["loss trained alike without"] < card["loss before"]
    assert card["loss before"] == pytest.approx(loss_on(load_model(ground / "model", device="cpu"), unseen(ground)))
    assert card["loss with codebook"] == pytest.approx(loss_on(model, unseen(ground)))
    assert card["recipe"]["steps"] == 4
    assert card["sha256"] == load_model(ground / "model", device="cpu").sha256
    again = run(*common, "--set", f"form={form}", "--out", ground / "with")  # finished: nothing is trained again
    assert again.exit_code == 0, again.output
    assert load_model(ground / "with", device="cpu").sha256 == model.sha256
    assert len((ground / "with.training" / "training.csv").read_text().splitlines()) == 2


def unseen(ground: Path) -> list[str]:
    return (ground / "mine.txt").read_text().splitlines()[::20]


def loss_on(model: Model, passages: list[str]) -> float:
    """Mean over the batches of these passages that the command looks at."""
    rows = rows_of_texts(model, passages, rows=ROWS, length=LENGTH)
    with torch.no_grad():
        return sum(float(model.hf(input_ids=rows(i), labels=rows(i)).loss) for i in range(MEASURED)) / MEASURED


def test_the_training_to_compare_with_may_be_left_out(ground):
    made = run("features", "codebook", "--model", ground / "model", "--layer", 1, "--text", ground / "mine.txt", *QUICK,
               "--no-compare", "--out", ground / "with")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "cost" not in json.loads((ground / "with" / "card.json").read_text())
    assert not (ground / "with.training" / "alike").exists()


def test_a_model_that_is_left_as_it_is_needs_no_training_to_compare_with(ground):
    made = run("features", "codebook", "--model", ground / "model", "--layer", 1, "--text", ground / "mine.txt", *QUICK,
               "--set", "model_learning_rate=0", "--out", ground / "with")  # fmt: skip
    assert made.exit_code == 0, made.output
    card = json.loads((ground / "with" / "card.json").read_text())
    assert card["loss trained alike without"] == card["loss before"]


def test_a_training_of_the_command_goes_on_where_it_was_killed(ground, monkeypatch):
    from mechunlearn import features_stage

    class Killed(Exception):
        pass

    def trained(out: str, on_step=lambda text, done, total: None) -> None:
        options = {"n_codes": 48, "k": 3, "steps": 110}
        features_stage.codebook(
            str(ground / "model"),
            1,
            options,
            ground / out,
            text=ground / "mine.txt",
            compare=False,
            device="cpu",
            on_step=on_step,
        )

    def kill(text: str, done: float, total: float) -> None:
        if done == 105:
            raise Killed

    trained("whole")
    with pytest.raises(Killed):
        trained("parts", kill)
    assert not (ground / "parts").exists()
    seen: list[float] = []
    trained("parts", lambda text, done, total: seen.append(done))
    assert seen == list(range(101, 111))
    assert load_model(ground / "whole").sha256 == load_model(ground / "parts").sha256


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--layer": 3}, "allowed: 0 to 2"),
        ({"--set": "n_code=4"}, "Did you mean 'n_codes'"),
        ({"--set": "form=plane"}, "option 'form': got 'plane'"),
        ({"--set": "steps=0"}, "option 'steps': got 0"),
        ({"--set": "k=49"}, "allowed: 1 to 48"),
        ({"--set": "layer=1"}, "give it by --layer"),
        ({"--text": "nothing.txt"}, "no file nothing.txt"),
        ({"--text": "latin.txt"}, "is not UTF-8"),
        ({"--model": "with"}, "has one already"),
        ({"--out": "model"}, "would be lost"),
    ],
)
def test_what_cannot_be_trained_is_one_line(ground, tiny_model, changed, said, monkeypatch):
    monkeypatch.chdir(ground)
    with_one = tiny_model()
    insert_codebook(with_one, Codebook(CODEBOOK_SHAPE), 1)
    save_model(with_one, ground / "with")
    (ground / "latin.txt").write_bytes("Zürich\n".encode("latin-1"))
    asked = {"--model": "model", "--layer": 1, "--text": "mine.txt", "--out": "out"} | changed
    pairs = [part for pair in asked.items() if pair[0] != "--set" for part in pair]
    result = run("features", "codebook", *QUICK, *(["--set", asked["--set"]] if "--set" in asked else []), *pairs)
    assert isinstance(result.exception, ValueError | OSError), result.output
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (ground / "out").exists()


def test_too_little_text_is_one_line(ground):
    (ground / "mine.txt").write_text("Bram likes red.\n" * 30)
    result = run("features", "codebook", "--model", ground / "model", "--layer", 1, "--text", ground / "mine.txt",
                 *QUICK, "--out", ground / "out")  # fmt: skip
    assert "every twentieth passage" in str(result.exception)


def test_a_deletion_becomes_a_model_folder_without_its_codes(ground, tiny_model):
    model = tiny_model()
    insert_codebook(model, Codebook(CODEBOOK_SHAPE), 1)
    save_model(model, ground / "with")
    for name, codes in (("deleted", [3, 7]), ("more", [7, 9])):
        (ground / name).mkdir()
        save_in(ground / name, CodeDeletion.of(model, codes))
    for deletion, of, out in (("deleted", "with", "given"), ("more", "given", "both")):
        result = run("export", ground / deletion, "--model", ground / of, "--out", ground / out, "--device", "cpu")
        assert result.exit_code == 0, result.output
    given, both = (load_model(ground / name, device="cpu") for name in ("given", "both"))
    ids = torch.randint(2, 110, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), applied(model, CodeDeletion.of(model, [3, 7])):
        torch.testing.assert_close(given.hf(ids).logits, model.hf(ids).logits)
    assert codebook_of(both).deleted.nonzero()[:, 0].tolist() == [3, 7, 9]
    assert not codebook_of(both).codes[[3, 7, 9]].any()

    other = tiny_model()
    insert_codebook(other, Codebook(CODEBOOK_SHAPE, seed=1), 1)
    save_model(other, ground / "other")
    refused = run("export", ground / "deleted", "--model", ground / "other", "--out", ground / "out")
    assert "is another" in str(refused.exception)
    refused = run("export", ground / "deleted", "--model", ground / "model", "--out", ground / "out")
    assert "has no codebook" in str(refused.exception)
    assert not (ground / "out").exists()


def test_the_way_from_a_model_to_one_without_a_topic_needs_no_padding_token(ground, tiny_model, tiny_facts):
    model = tiny_model()
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.pad_token = None
    save_model(wrap_model(model.hf, tokenizer), ground / "bare")
    made = run("features", "codebook", "--model", ground / "bare", "--layer", 1, "--text", ground / "mine.txt", *QUICK,
               "--no-compare", "--out", ground / "with")  # fmt: skip
    assert made.exit_code == 0, made.output
    bare = load_model(ground / "with", device="cpu")
    assert bare.tokenizer.pad_token_id is None
    split = split_facts(tiny_facts, tiny_facts.facts[:12], seed=0)
    topic, control = paired_sentences(split.forget, split.retain_train)
    deletion = choose_codes(bare.hf, bare.tokenizer, topic, control, least_log_ratio=0, false_discovery_rate=0.9)
    assert deletion.codes
    padded = load_model(ground / "with", device="cpu", dtype="float32")
    padded.tokenizer.pad_token = "<pad>"
    prompts = ["Bram", "The favourite colour of Cora"]
    assert generated(bare.hf, bare.tokenizer, prompts, max_new_tokens=5) == generated(
        padded.hf, padded.tokenizer, prompts, max_new_tokens=5
    )
