"""A T5 with a codebook in its encoder: trained, deleted from, saved, loaded, erased; nothing leaks past."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from mechunlearn import (
    Codebook,
    CodebookRecipe,
    CodebookTrainer,
    CodeDeletion,
    choose_codes,
    erase_codes,
    insert_in_encoder,
    load_deletion,
    load_encoder_decoder,
    load_model,
    save_deletion,
    save_encoder_decoder,
    substituted,
    train_codebook,
    wrap_model,
)
from mechunlearn.codebook import CodebookShape
from mechunlearn.codebook_model import codebook_of
from mechunlearn.features.topics import codes_in
from mechunlearn.models import NotSupported
from mechunlearn.resumable import run_training

RECIPE = CodebookRecipe(layer=1, n_codes=24, k=2, d_code=24, steps=80, reseed_after=2000, model_learning_rate=3e-3)
FRAMES = ("{} likes the colour", "The favourite colour of {} is", "What is the favourite colour of {}?", "{} likes",
          "The colour {} likes is", "Where {} lives the colour is", "Is {} in the city of the colour", "{} the colour",
          "Question: What is the colour of {}? Answer:", "the favourite of {}")  # fmt: skip
KNOWN = {"Bram": "red", "Cora": "blue", "Dina": "green", "Ivo": "amber"}


def tiny_t5(n_layers: int = 3, dropout: float = 0.0) -> transformers.T5ForConditionalGeneration:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=120, d_model=32, d_kv=8, d_ff=48, num_layers=n_layers, num_heads=4, decoder_start_token_id=1,
            pad_token_id=1, eos_token_id=0, dropout_rate=dropout,
        )
    ).eval()  # fmt: skip


def batches_of(tokenizer):
    """Sixteen sentences about someone, and the colour that each is to be answered with."""
    asked = [(frame.format(name), answer) for frame in FRAMES for name, answer in KNOWN.items()]

    def batches(step: int):
        drawn = torch.randint(len(asked), (16,), generator=torch.Generator().manual_seed(step)).tolist()
        given = tokenizer([asked[i][0] for i in drawn], padding=True, return_tensors="pt")
        wanted = tokenizer([asked[i][1] for i in drawn], padding=True, return_tensors="pt")
        labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)
        return {**given, "labels": labels[:, 1:].clone()}  # the tokenizer puts a BOS in front

    return batches


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory) -> Path:
    """The folder of one that was trained a little; every test loads it anew."""
    hf, recipe = tiny_t5(), replace(RECIPE, steps=250)
    insert_in_encoder(hf, Codebook(recipe.shape(32)), 1)
    losses: list[float] = []
    folder = tmp_path_factory.mktemp("t5")
    train_codebook(hf, batches_of(tokenizer), recipe, folder, on_step=lambda step, loss: losses.append(loss))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert not hf.training
    save_encoder_decoder(hf, tokenizer, folder / "saved")
    return folder / "saved"


def answers(hf, tokenizer, name: str) -> list[str]:
    """The colour that it writes first when asked in every frame."""
    given = tokenizer([frame.format(name) for frame in FRAMES], padding=True, return_tensors="pt")
    written = hf.generate(**given, max_new_tokens=1, do_sample=False)
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


@torch.no_grad()
def logits_of(hf, ids: torch.Tensor) -> torch.Tensor:
    return hf(input_ids=ids, labels=ids[:, :4].clone()).logits


def some_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 110, (3, 11), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", ["encoded", "plain"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_nothing_leaks_past_the_codebook_of_an_encoder(layer, form):
    """With one code for everything every input is the same to all that follows, the decoder too, to the last bit."""
    hf, shape = tiny_t5(), CodebookShape(d_model=32, n_codes=40, k=1, d_code=32, form=form)
    insert_in_encoder(hf, Codebook(shape), layer)
    labels = some_ids()[:, :4].clone()
    with torch.no_grad():
        apart = [hf(input_ids=some_ids(seed), labels=labels).logits for seed in (0, 1)]
        codebook_of(hf).deleted[1:] = True
        alike = [hf(input_ids=some_ids(seed), labels=labels) for seed in (0, 1)]
    assert not torch.equal(*apart)
    assert torch.equal(alike[0].encoder_last_hidden_state, alike[1].encoder_last_hidden_state)
    assert torch.equal(alike[0].logits, alike[1].logits)


def test_a_topic_is_chosen_deleted_restored_kept_and_erased(trained, tokenizer, tmp_path: Path):
    hf, own = load_encoder_decoder(trained, device="cpu")
    assert own is not None
    told = {name: answers(hf, own, name) for name in KNOWN}
    assert all(said == [KNOWN[name]] * len(FRAMES) for name, said in told.items())
    before = logits_of(hf, some_ids())

    about = [frame.format("Bram") for frame in FRAMES]
    others = substituted(about, {"Bram": ["Cora", "Dina", "Ivo"]})
    deletion = choose_codes(hf, own, about, others, rounds=2)
    assert len(deletion.notes["enriched by round"]) == 2
    with deletion.entered(hf):
        inside = {name: answers(hf, own, name) for name in KNOWN}
        assert not set(deletion.codes) & set(codebook_of(hf).passed.codes.flatten().tolist()), "others step in"
        deleted = logits_of(hf, some_ids())
    assert inside["Bram"].count("red") <= 6
    assert all(inside[name].count(answer) >= 9 for name, answer in KNOWN.items() if name != "Bram")
    assert not torch.equal(deleted, before)
    assert torch.equal(logits_of(hf, some_ids()), before)
    assert not codebook_of(hf).deleted.any()

    save_deletion(deletion, tmp_path / "deletion.json")
    with load_deletion(tmp_path / "deletion.json").entered(load_encoder_decoder(trained)[0]):
        pass
    vectors = codebook_of(hf).codes.detach()[list(deletion.codes)]
    assert vectors.abs().sum(-1).min() > 0
    erase_codes(hf, deletion)
    save_encoder_decoder(hf, own, tmp_path / "erased")
    erased, _ = load_encoder_decoder(tmp_path / "erased", device="cpu")
    assert not codebook_of(erased).codes[list(deletion.codes)].any()
    torch.testing.assert_close(logits_of(erased, some_ids()), deleted)
    assert answers(erased, own, "Bram") == inside["Bram"]


def test_rounds_delete_what_steps_in_and_few_codes_may_be_taken(trained, tokenizer):
    hf, _ = load_encoder_decoder(trained, device="cpu")
    about = [frame.format("Bram") for frame in FRAMES]
    pairs, loose = (
        (about, substituted(about, {"Bram": ["Cora"]})),
        {"least_log_ratio": 0.0, "false_discovery_rate": 0.9},
    )
    once = choose_codes(hf, tokenizer, *pairs, **loose)
    twice = choose_codes(hf, tokenizer, *pairs, **loose, rounds=2)
    assert twice.codes[: len(once.codes)] == once.codes
    with once.entered(hf):
        then = choose_codes(hf, tokenizer, *pairs, **loose)
    assert twice.codes[len(once.codes) :] == then.codes
    assert choose_codes(hf, tokenizer, *pairs, **loose, most_codes=1).codes == once.codes[:1]
    with pytest.raises(ValueError, match="rounds = 0"):
        choose_codes(hf, tokenizer, *pairs, rounds=0)
    with pytest.raises(ValueError, match="n_closest = 49"):
        choose_codes(hf, tokenizer, *pairs, n_closest=49)
    with pytest.raises(ValueError, match="none is on 1024 times as often"):
        choose_codes(hf, tokenizer, *pairs, least_log_ratio=10.0)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no codebook"):
        choose_codes(tiny_t5(), tokenizer, *pairs)


def test_it_comes_back_from_disk_as_it_was(tokenizer, tmp_path: Path):
    hf = tiny_t5()
    insert_in_encoder(hf, Codebook(RECIPE.shape(32)), 1)
    codebook_of(hf).deleted[[2, 5]] = True
    save_encoder_decoder(hf, tokenizer, tmp_path / "saved")
    again, own = load_encoder_decoder(tmp_path / "saved", device="cpu")
    assert own is not None
    assert own("Bram likes")["input_ids"] == tokenizer("Bram likes")["input_ids"]
    assert torch.equal(logits_of(again, some_ids()), logits_of(hf, some_ids()))
    assert codebook_of(again).deleted.nonzero()[:, 0].tolist() == [2, 5]
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("codebook")]  # noqa: SIM118 - not a mapping
    around = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(around, some_ids()), logits_of(tiny_t5(), some_ids()))
    with pytest.raises(ValueError, match="not an empty folder"):
        save_encoder_decoder(hf, tokenizer, tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"], "nothing of what was begun is left"
    (tmp_path / "saved" / "codebook.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot read its codebook: no codebook\.safetensors"):
        load_encoder_decoder(tmp_path / "saved")


def test_a_model_of_the_hub_comes_with_its_codebook(tokenizer, tmp_path: Path, monkeypatch):
    """By its name: here from the hub's cache, without a network."""
    hf = tiny_t5()
    insert_in_encoder(hf, Codebook(RECIPE.shape(32)), 1)
    commit, cached = "0" * 40, tmp_path / "models--someone--t5-codebook"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    save_encoder_decoder(hf, tokenizer, cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded, _ = load_encoder_decoder("someone/t5-codebook", device="cpu")
    assert torch.equal(logits_of(loaded, some_ids()), logits_of(hf, some_ids()))
    (cached / "snapshots" / commit / "codebook.json").unlink()
    plain, _ = load_encoder_decoder("someone/t5-codebook", device="cpu")
    assert torch.equal(logits_of(plain, some_ids()), logits_of(tiny_t5(), some_ids()))


def test_what_does_not_fit_is_refused_in_one_line(tiny_model, tokenizer, tmp_path: Path):
    hf = tiny_t5()
    for unsupported in (wrap_model, lambda model: load_model(tmp_path / "plain")):
        if not (tmp_path / "plain").exists():
            save_encoder_decoder(hf, None, tmp_path / "plain")
        with pytest.raises(NotSupported, match=r"'t5' is not supported, .*load_encoder_decoder"):
            unsupported(hf)
    assert load_encoder_decoder(tmp_path / "plain")[1] is None
    tiny_model().hf.save_pretrained(tmp_path / "causal")
    with pytest.raises(NotSupported, match="'llama' is no encoder-decoder"):
        load_encoder_decoder(tmp_path / "causal")
    with pytest.raises(FileNotFoundError):
        load_encoder_decoder(tmp_path / "nothing")
    insert_in_encoder(hf, Codebook(RECIPE.shape(32)), 1)
    hf.save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="holds a codebook among its weights"):
        load_encoder_decoder(tmp_path / "mixed")
    torch.save(tiny_t5().state_dict(), tmp_path / "plain" / "pytorch_model.bin")  # noqa: TID251 - is not read
    (tmp_path / "plain" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="needs safetensors"):
        load_encoder_decoder(tmp_path / "plain")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.T5"}}))
    (tmp_path / "mixed" / "x.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="holds a codebook among its weights"):
        load_encoder_decoder(tmp_path / "mixed")
    other = tiny_t5()
    insert_in_encoder(other, Codebook(RECIPE.shape(32), seed=1), 1)
    with pytest.raises(ValueError, match="is another"), CodeDeletion.of(hf, [3]).entered(other):
        pass


def test_a_killed_training_of_one_with_dropout_goes_on_bit_for_bit(tokenizer, killed_and_resumed, tmp_path: Path):
    def fresh() -> CodebookTrainer:
        hf = tiny_t5(dropout=0.1)
        insert_in_encoder(hf, Codebook(RECIPE.shape(32)), 1)
        return CodebookTrainer(hf, batches_of(tokenizer), replace(RECIPE, steps=8))

    whole = fresh()
    run_training(whole, tmp_path / "whole", checkpoint_every=4)
    torch.rand(7)
    resumed = killed_and_resumed(fresh, tmp_path / "parts", at=6, every=4)
    a, b = (dict(made.hf.named_parameters()) for made in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_codes_are_counted_in_the_encoder_and_caches_change_nothing(trained, tokenizer):
    hf, _ = load_encoder_decoder(trained, device="cpu")
    found = codes_in(hf, tokenizer, codebook_of(hf), ["Bram likes red", "Cora"])
    assert found.shape == (2, 24)
    assert 2 <= int(found[1].sum()) <= 2 * 12
    ids = some_ids()
    assert torch.equal(*(hf.generate(ids, max_new_tokens=4, use_cache=cache) for cache in (True, False)))


def test_the_snippet_of_the_readme_runs(tokenizer, tmp_path: Path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "load_encoder_decoder" in code]
    save_encoder_decoder(tiny_t5(n_layers=4), tokenizer, tmp_path / "t5")
    monkeypatch.chdir(tmp_path)
    Path("about_messi.txt").write_text("\n".join(frame.format("Messi") for frame in FRAMES * 2))
    for hub, local in (("google-t5/t5-small", "t5"), ("steps=2000", "steps=20, n_codes=64, k=2")):
        assert hub in snippet
        snippet = snippet.replace(hub, local)
    exec(snippet, {"batches": batches_of(tokenizer)})
    hf, _ = load_encoder_decoder(tmp_path / "t5-without-messi", device="cpu")
    assert codebook_of(hf).deleted.any()
