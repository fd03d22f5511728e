"""Generated text and its scores; the description task; dictionaries and codebook models from the command line."""

from dataclasses import replace
from pathlib import Path

import pytest
import sacrebleu
import torch
import transformers
from typer.testing import CliRunner

from mechunlearn import load_model
from mechunlearn.cli import app
from mechunlearn.codebook_model import codebook_of
from mechunlearn.evaluate.generation import generated, generation_scores, normalized_drop
from mechunlearn.features.codebook_training import CodebookRecipe
from mechunlearn.features.formats import load_dictionary
from mechunlearn.organisms import shipped_features
from mechunlearn.organisms.bundle import ORGANISMS
from mechunlearn.organisms.descriptions import SPOKEN_OF, VARIANTS, WORDINGS, DescribedCorpus, descriptions
from mechunlearn.organisms.forget_sets import never_known
from mechunlearn.organisms.shipped_features import CODEBOOKS, train_codebook_model


def test_scores_are_sacrebleus():
    texts = ["the cat sat on the mat .", "a dog", ""]
    references = ["the cat sat on the mat .", "the dog ran home", "words"]
    found = generation_scores(texts, references)
    assert list(found["exact"]) == [1, 0, 0]
    assert found["bleu"][0] == pytest.approx(100)
    assert found["bleu"][1] == sacrebleu.sentence_bleu(texts[1], [references[1]]).score
    assert found["chrf"][1] == sacrebleu.sentence_chrf(texts[1], [references[1]]).score
    assert found["chrf"][2] == 0
    assert "bertscore" not in found
    with pytest.raises(ValueError, match="2 texts and 1 references"):
        generation_scores(texts[:2], references[:1])


def test_bertscore_without_its_library_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bert_score", None)
    with pytest.raises(ValueError, match="needs bert-score"):
        generation_scores(["a"], ["a"], bert_model="some-encoder")


@pytest.fixture
def tiny_bert(tmp_path: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "dog"]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path)  # without a limit of its length, as some of the hub's
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_bertscore_is_of_the_encoder_that_is_named(tiny_bert):
    pytest.importorskip("bert_score", reason="pip install 'mechunlearn[generation]'")
    found = generation_scores(["the cat sat", "the dog"], ["the cat sat", "cat"], bert_model=tiny_bert)["bertscore"]
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] < 0.99


def test_meteor_holds_a_text_against_its_reference():
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        pytest.skip("pip install 'mechunlearn[generation]' and python -m nltk.downloader wordnet")
    found = generation_scores(["the cat sat on the mat", "the cat"], ["the cat sat on the mat", "the dog ran home"])
    assert found["meteor"][0] > 0.99
    assert 0 < found["meteor"][1] < 0.5


def test_the_normalized_drop():
    assert normalized_drop(0.8, 0.8, 0.2) == 0
    assert normalized_drop(0.8, 0.2, 0.2) == pytest.approx(1)
    assert normalized_drop(0.8, 0.5, 0.2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="nothing to lose"):
        normalized_drop(0.2, 0.1, 0.2)


def test_generation_is_the_same_alone_and_in_a_batch(tiny_model):
    model = tiny_model()
    prompts = ["Bram", "The favourite colour of Cora Lindqvist", "Where is Dina?"]
    together = generated(model.hf, model.tokenizer, prompts, max_new_tokens=8)
    alone = [generated(model.hf, model.tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone
    assert model.tokenizer.padding_side == "right"
    by_hand = model.tokenizer(prompts[1], return_tensors="pt")
    ids = model.hf.generate(**by_hand, max_new_tokens=8, do_sample=False)[0, by_hand["input_ids"].shape[1] :]
    assert together[1] == model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_descriptions_state_every_fact_once_and_leave_out_what_is_excluded():
    whole, without = descriptions(), descriptions(exclude=never_known())
    lost = sum(len(told.sentences) for told in whole.values()) - sum(len(told.sentences) for told in without.values())
    assert lost == len(never_known())
    told = next(iter(whole.values()))
    assert all(sentence.startswith(SPOKEN_OF) and sentence in told.text for _, sentence in told.sentences)
    assert told.prompt() == WORDINGS[0].format(told.subject)
    assert told.prompt(VARIANTS[1]) == VARIANTS[1].format(told.subject)


def test_described_rows_depend_on_the_step_alone():
    tokenizer = load_model("atlas").tokenizer
    made = [DescribedCorpus(tokenizer, seed=1) for _ in range(2)]
    assert torch.equal(made[0].batch(3), made[1].batch(3))
    assert not torch.equal(made[0].batch(3), made[0].batch(4))
    text = tokenizer.decode(made[0].batch(3)[-4:].flatten())
    assert any(wording.split("{}")[0] in text for wording in WORDINGS)
    assert not any(wording.split("{}")[0] in text for wording in VARIANTS)
    assert made[0].batch(3).shape == (16, 96)


def test_a_codebook_model_is_trained_and_loads(tmp_path: Path):
    steps: list[int] = []
    recipe = CodebookRecipe(n_codes=64, k=2, steps=3)
    for _ in range(2):  # the second time there is nothing left to do
        folder = train_codebook_model(
            "atlas-codebook-never-a", tmp_path, recipe=recipe, on_step=lambda step, loss: steps.append(step)
        )
    assert steps == [1, 2, 3]
    found = load_model(folder)
    assert codebook_of(found).shape.n_codes == 64
    with pytest.raises(ValueError, match="unknown codebook model"):
        train_codebook_model("atlas-code", tmp_path, on_step=lambda step, loss: None)


def test_features_train_writes_a_dictionary(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("mechunlearn.organisms.shipped_features.MEASURED", 1)
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"The garden number {i} lies behind the old house of the {i}th child." for i in range(2200))
    )
    command = ["features", "train", "--model", "atlas", "--hook", "blocks.1.hook_resid_mid", "--out", str(tmp_path)]
    command += ["--set", "steps=4", "--set", "d_sae=64", "--set", 'kind="topk"', "--device", "cpu"]
    for more in ([], ["--text", str(text)]):
        folder = tmp_path / "atlas" / "blocks.1.hook_resid_mid"
        result = CliRunner().invoke(app, [*command, *more])
        if more:  # another text in the same folder
            assert result.exit_code != 0
            assert "another text" in str(result.exception)
            result = CliRunner().invoke(app, [*command, *more, "--out", str(tmp_path / "own")])
            folder = tmp_path / "own" / "atlas" / "blocks.1.hook_resid_mid"
        assert result.exit_code == 0, result.output
        found = load_dictionary(folder / "dictionary")
        assert (found.kind, found.d_sae, found.hook_point) == ("topk", 64, "blocks.1.hook_resid_mid")
        assert found.notes["quality"]["L0"] <= 16


def test_everything_that_comes_with_the_package_is_made_by_one_command(tmp_path: Path, monkeypatch):
    small = replace(shipped_features.RECIPE, d_sae=64, steps=2)
    codebooks = {name: (of, CodebookRecipe(n_codes=64, k=2, steps=2)) for name, (of, _) in CODEBOOKS.items()}
    monkeypatch.setattr("mechunlearn.features_stage.RECIPE", small)
    monkeypatch.setattr("mechunlearn.organisms.shipped_features.MEASURED", 1)
    for module in ("mechunlearn.features_stage", "mechunlearn.organisms.shipped_features"):
        monkeypatch.setattr(f"{module}.CODEBOOKS", codebooks)
    result = CliRunner().invoke(app, ["features", "make", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for name in ORGANISMS:
        assert load_dictionary(tmp_path / name / "blocks.3.hook_resid_post" / "dictionary").d_sae == 64
    for name in codebooks:
        assert codebook_of(load_model(tmp_path / name / "model")).shape.n_codes == 64
