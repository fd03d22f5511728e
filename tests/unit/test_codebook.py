"""Codebooks: nothing leaks past, deletion falls through, training resumes, topics are found."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mechunlearn import applied, attack, load_model, save_model, split_facts
from mechunlearn.activations import read
from mechunlearn.codebook import Codebook, CodebookShape
from mechunlearn.codebook_model import codebook_of, insert_codebook, insert_in_encoder
from mechunlearn.features.code_deletion import code_deletion, paired_sentences
from mechunlearn.features.codebook_training import CodebookRecipe, CodebookTrainer, train_codebook
from mechunlearn.features.deletion import CodeDeletion, erase_codes, load_deletion, save_deletion
from mechunlearn.features.texts import statements
from mechunlearn.features.token_rows import rows_of_texts
from mechunlearn.features.topics import codes_in, enriched_codes, substituted
from mechunlearn.models import Model, NotSupported
from mechunlearn.resumable import run_training

FAMILIES = ("gpt2", "gpt_neo", "gpt_neox", "llama", "gemma2", "qwen3")
RECIPE = CodebookRecipe(layer=1, n_codes=48, k=3, d_code=24, steps=8, reseed_after=2000)


def with_codebook(model: Model, layer: int = 1, **changed) -> Model:
    shape = CodebookShape(d_model=model.d_model, **{"n_codes": 40, "k": 3, "d_code": 16, **changed})
    insert_codebook(model, Codebook(shape), layer)
    return model


def some_ids(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 110, (rows, 11), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(hf, ids: torch.Tensor) -> torch.Tensor:
    return hf(ids, use_cache=False).logits


def test_the_bottleneck_by_hand():
    made = Codebook(CodebookShape(d_model=2, n_codes=3, k=2, d_code=2))
    with torch.no_grad():
        made.codes.copy_(torch.tensor([[2.0, 0], [0, 1], [1, 1]]))
        made.encoder.weight.copy_(torch.eye(2))
        made.encoder.bias.zero_()
        made.decoder.weight.copy_(10 * torch.eye(2))
        made.decoder.bias.fill_(0.5)
    x = torch.tensor([[[3.0, 1.0]]])  # cosines .95, .32, .89
    assert made(x)[0, 0].tolist() == pytest.approx([15.5, 5.5])  # mean of codes 0 and 2
    assert made.passed.z[0, 0].tolist() == pytest.approx([3 / 5**0.5, 1 / 5**0.5])  # length sqrt(2)
    made.scale.fill_(3.0)
    assert made(x)[0, 0].tolist() == pytest.approx([46.5, 16.5])  # the same codes in other units
    assert made(7 * x)[0, 0].tolist() == pytest.approx([46.5, 16.5])
    made.scale.fill_(1.0)
    assert made.passed.codes.tolist() == [[[0, 2]]]
    made.deleted[0] = True
    assert made(x)[0, 0].tolist() == pytest.approx([5.5, 10.5])  # code 1 steps in
    assert made.closest(made.passed.z, 2).tolist() == [[[2, 1]]]
    plain = Codebook(CodebookShape(d_model=2, n_codes=3, k=1, d_code=2, form="plain"))
    assert torch.equal(plain(x)[0, 0], plain.codes[plain.passed.codes[0, 0, 0]])


@pytest.mark.parametrize("width", [10, 13])
def test_only_length_and_codes_lose_anything_at_the_start(width):
    made = Codebook(CodebookShape(d_model=5, n_codes=9, k=2, d_code=width))
    x = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.nn.functional.cosine_similarity(made.decode(made.encode(x)), x, dim=-1).min() > 1 - 1e-6
    assert CodebookRecipe().shape(5).d_code == 10
    assert CodebookRecipe(form="plain").shape(5).d_code == 5


@pytest.mark.parametrize("form", ["encoded", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_leaks_past(tiny_model, family, form):
    """With one code for everything, every text is the same to what follows, to the last bit."""
    model = tiny_model(family)
    width = model.d_model if form == "plain" else 16
    with_codebook(model, form=form, d_code=width, k=1)
    codebook_of(model).deleted[1:] = True
    alike = [read(model, some_ids(seed=seed), ("block", 1)) for seed in (0, 1)]
    assert torch.equal(*alike)
    codebook_of(model).deleted[1:] = False
    assert not torch.equal(*(read(model, some_ids(seed=seed), ("block", 1)) for seed in (0, 1)))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_codebook_model_comes_back_from_disk_with_its_deletions(tiny_model, family, tmp_path: Path):
    model = with_codebook(tiny_model(family))
    codebook_of(model).deleted[[2, 5]] = True
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert codebook_of(again).deleted.nonzero()[:, 0].tolist() == [2, 5]
    assert codebook_of(again).layer == 1
    assert torch.equal(logits_of(again.hf, some_ids()), logits_of(model.hf, some_ids()))
    assert again.sha256 == model.sha256
    around = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # without this package: without it
    assert torch.equal(logits_of(around, some_ids()), logits_of(tiny_model(family).hf, some_ids()))
    (tmp_path / "saved" / "codebook.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="cannot read its codebook"):
        load_model(tmp_path / "saved")


def test_generation_with_a_cache_is_as_without(tiny_model):
    model = with_codebook(tiny_model())
    options = {"max_new_tokens": 10, "do_sample": False}
    ids = some_ids()
    assert torch.equal(*(model.hf.generate(ids, use_cache=cache, **options) for cache in (True, False)))


def test_what_does_not_fit_is_refused(tiny_model):
    model = with_codebook(tiny_model())
    with pytest.raises(ValueError, match="has one already"):
        with_codebook(model)
    with pytest.raises(ValueError, match="made for a width of 8"):
        insert_codebook(tiny_model(), Codebook(CodebookShape(d_model=8, n_codes=4, k=1)), 1)
    with pytest.raises(ValueError, match="has no codebook"):
        codebook_of(tiny_model())
    with pytest.raises(ValueError, match="allowed: 1 to 4"):
        CodebookShape(d_model=8, n_codes=4, k=5)
    with pytest.raises(ValueError, match="as wide as the activation"):
        CodebookShape(d_model=8, form="plain")
    with pytest.raises(NotSupported, match=r"no encoder\.block"):
        insert_in_encoder(tiny_model().hf, Codebook(CodebookShape(d_model=32)), 0)
    with pytest.raises(NotSupported, match="without its codebook"):
        _ = model.bridge
    with pytest.raises(ValueError, match="2 codes would be left"):
        codebook_of(model).usable(range(38))
    with pytest.raises(ValueError, match="got code 40"):
        codebook_of(model).usable([40])


def causal_batches(model: Model, facts):
    rows = rows_of_texts(model, statements(facts.facts), rows=8, length=24)
    return lambda step: {"input_ids": rows(step), "labels": rows(step)}


def a_trainer(model: Model, facts, recipe: CodebookRecipe = RECIPE) -> CodebookTrainer:
    insert_codebook(model, Codebook(recipe.shape(model.d_model), seed=recipe.seed), recipe.layer)
    return CodebookTrainer(model.hf, causal_batches(model, facts), recipe, text="facts")


def test_a_killed_training_goes_on_bit_for_bit(tiny_model, tiny_facts, killed_and_resumed, tmp_path: Path):
    whole = a_trainer(tiny_model(), tiny_facts)
    run_training(whole, tmp_path / "whole", checkpoint_every=4)

    resumed = killed_and_resumed(lambda: a_trainer(tiny_model(), tiny_facts), tmp_path / "parts", at=6, every=4)
    a, b = (dict(made.hf.named_parameters()) for made in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="another recipe"):
        run_training(a_trainer(tiny_model(), tiny_facts, replace(RECIPE, seed=3)), tmp_path / "parts")


@pytest.mark.parametrize("model_rate", [0.0, 3e-3])
def test_training_learns_the_task_through_the_codebook(tiny_model, tiny_facts, model_rate, tmp_path: Path):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    made = a_trainer(model, tiny_facts, replace(RECIPE, steps=150, model_learning_rate=model_rate))
    losses: list[float] = []
    run_training(made, tmp_path, checkpoint_every=150, on_step=lambda step, loss: losses.append(loss))
    assert not model_rate or np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.8
    moved = [name for name, p in model.hf.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert bool(moved) == (model_rate > 0)

    def left(codebook: Codebook) -> float:
        with torch.no_grad():
            codebook(x)
        passed = codebook.passed
        return float(1 - torch.nn.functional.cosine_similarity(passed.decoded, passed.x, dim=-1).mean())

    x = codebook_of(model).passed.x.detach() * codebook_of(model).scale
    assert left(codebook_of(model)) < 0.45 < left(Codebook(RECIPE.shape(32), seed=1))


def test_dead_codes_start_again_where_vectors_are(tiny_model, tiny_facts):
    made = a_trainer(tiny_model(), tiny_facts, replace(RECIPE, steps=40, reseed_after=400))
    for _ in range(31):
        made.train_step()
    assert int((made.unused_for > 400 + 192).sum()) == 0, "no code stays unused for longer than that"
    never = a_trainer(tiny_model(), tiny_facts, replace(RECIPE, steps=40, reseed_after=10**9))
    never.unused_for[:] = 0
    for _ in range(31):
        never.train_step()
    assert int((made.unused_for < 400).sum()) > int((never.unused_for < 400).sum())


def test_counting_codes_is_the_same_in_any_batch_and_wider_when_asked(tiny_model, tiny_facts):
    model = with_codebook(tiny_model())
    texts = statements(tiny_facts.facts)[:30]
    found = [codes_in(model.hf, model.tokenizer, codebook_of(model), texts, batch_size=size) for size in (1, 30)]
    assert torch.equal(*found)
    wider = codes_in(model.hf, model.tokenizer, codebook_of(model), texts, n_closest=6)
    assert (wider | ~found[0]).all(), "the closest ones are among them"
    assert wider.sum() > found[0].sum()


def test_codes_are_those_of_a_text_alone_wherever_the_tokenizer_pads_and_however_long_it_is(tiny_model):
    model = with_codebook(tiny_model("gpt2"))  # absolute positions, 64 of them
    texts = ["Bram", "Cora Lindqvist likes red and lives in Oslo", "What colour? " * 60]
    alone = torch.cat([codes_in(model.hf, model.tokenizer, codebook_of(model), [text]) for text in texts])
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        assert torch.equal(codes_in(model.hf, model.tokenizer, codebook_of(model), texts), alone)
    model.tokenizer.padding_side = "right"


def test_padding_is_nothing_to_learn_from(tiny_model, tiny_facts):
    """Rows padded 40 wider, under a mask, train the same model."""
    rows = rows_of_texts(tiny_model(), statements(tiny_facts.facts), rows=8, length=24)

    def wider(step: int, by: int) -> dict[str, torch.Tensor]:
        ids = torch.nn.functional.pad(rows(step), (0, by), value=5)
        mask = torch.nn.functional.pad(torch.ones_like(rows(step)), (0, by))
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    trained = []
    for by in (0, 40):
        model = tiny_model()
        insert_codebook(model, Codebook(RECIPE.shape(32)), RECIPE.layer)
        trainer = CodebookTrainer(model.hf, partial(wider, by=by), replace(RECIPE, steps=8, reseed_after=400))
        for _ in range(8):
            trainer.train_step()
        trained.append(trainer)
    narrow, wide = trained
    assert torch.equal(narrow.unused_for, wide.unused_for)
    torch.testing.assert_close(narrow.codebook.scale, wide.codebook.scale)
    torch.testing.assert_close(narrow.codebook.codes, wide.codebook.codes, atol=2e-3, rtol=1e-2)


def test_a_recipe_of_another_codebook_or_of_no_steps_is_refused(tiny_model, tiny_facts, tmp_path: Path):
    model = tiny_model()
    insert_codebook(model, Codebook(RECIPE.shape(32)), RECIPE.layer)
    for other in (replace(RECIPE, layer=2), replace(RECIPE, n_codes=RECIPE.n_codes + 1)):
        with pytest.raises(ValueError, match="the recipe is of layer"):
            train_codebook(model.hf, causal_batches(model, tiny_facts), other, tmp_path)
    with pytest.raises(ValueError, match="got steps 0"):
        replace(RECIPE, steps=0)
    with pytest.raises(ValueError, match="give a list"):
        substituted(["a Messi"], {"Messi": "Nadal"})


def test_a_codebook_that_is_taken_out_lets_everything_pass(tiny_model):
    model = tiny_model()
    plain = logits_of(model.hf, some_ids())
    coded = with_codebook(model)
    assert not torch.equal(logits_of(coded.hf, some_ids()), plain)
    with codebook_of(coded).taken_out():
        assert torch.equal(logits_of(coded.hf, some_ids()), plain)
    assert not torch.equal(logits_of(coded.hf, some_ids()), plain)


def test_training_leaves_the_models_flags_as_they_were(tiny_model, tiny_facts, tmp_path: Path):
    model = tiny_model()
    insert_codebook(model, Codebook(RECIPE.shape(32)), RECIPE.layer)
    recipe = replace(RECIPE, steps=2, model_learning_rate=0.0)
    train_codebook(model.hf, causal_batches(model, tiny_facts), recipe, tmp_path)
    assert all(parameter.requires_grad for parameter in model.hf.parameters())


def a_split(tiny_facts):
    return split_facts(tiny_facts, tiny_facts.facts[:12], seed=0)


def knowing_by_code(model: Model, split) -> tuple[int, ...]:
    """Make codes 30 and up answer to tokens of forgotten subjects alone; returns the codes that do."""
    codebook = codebook_of(model)
    topic, control = paired_sentences(split.forget, split.retain_train)
    on = [codes_in(model.hf, model.tokenizer, codebook, texts) for texts in (topic, control)]
    return enriched_codes(*on, least_log_ratio=0.0, false_discovery_rate=0.9).codes


def test_deleting_codes_changes_the_model_inside_alone_and_nests(tiny_model):
    model, ids = with_codebook(tiny_model()), some_ids()
    before = logits_of(model.hf, ids)
    used = codebook_of(model).passed.codes.flatten().unique().tolist()
    first, second = (CodeDeletion.of(model, [code]) for code in used[:2])
    with applied(model, first):
        once = logits_of(model.hf, ids)
        assert used[0] not in codebook_of(model).passed.codes
        with applied(model, second):
            logits_of(model.hf, ids)
            assert not set(used[:2]) & set(codebook_of(model).passed.codes.flatten().tolist())
        assert torch.equal(logits_of(model.hf, ids), once)
    assert not torch.equal(once, before)
    assert torch.equal(logits_of(model.hf, ids), before)
    most = CodeDeletion.of(model, range(1, 20)), CodeDeletion.of(model, range(20, 39))
    with pytest.raises(ValueError, match="2 codes would be left"), applied(model, most[0]), applied(model, most[1]):
        pass
    with pytest.raises(ValueError, match="2 codes would be left"):
        CodeDeletion.of(model, range(38))
    assert not codebook_of(model).deleted.any()
    with pytest.raises(ValueError, match="has no codebook"), applied(tiny_model(), first):
        pass


def test_code_deletion_finds_the_codes_of_the_facts(tiny_model, tiny_facts, tmp_path: Path):
    model, split = with_codebook(tiny_model(), n_codes=200, k=2), a_split(tiny_facts)
    loose = {"least_log_ratio": 0.0, "false_discovery_rate": 0.9}
    found = code_deletion(model, split, **loose)
    assert set(found.codes) == set(knowing_by_code(model, split))
    assert code_deletion(model, split, **loose) == found
    few = code_deletion(model, split, most_codes=1, **loose)
    assert few.codes == found.codes[:1]
    twice = code_deletion(model, split, rounds=2, **loose)
    assert twice.codes[: len(found.codes)] == found.codes
    assert len(twice.notes["enriched by round"]) == 2
    others = code_deletion(model, split, at_random=True, **loose)
    assert len(others.codes) == len(found.codes)
    assert not set(others.codes) & set(found.codes)
    assert not codebook_of(model).deleted.any()
    save_deletion(found, tmp_path / "deletion.json")
    assert load_deletion(tmp_path / "deletion.json") == found
    with pytest.raises(ValueError, match="none is on 1024 times as often"):
        code_deletion(model, split, least_log_ratio=10.0)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a saved deletion"):
        load_deletion(tmp_path / "bad.json")


def test_pairs_differ_in_the_subject_alone(tiny_facts):
    split = a_split(tiny_facts)
    topic, control = paired_sentences(split.forget, split.retain_train)
    retained = {fact.subject for fact in split.retain_train}
    assert len(topic) == len(control) > len(split.forget)
    for fact in split.forget:
        for one, other in zip(topic, control, strict=True):
            if fact.subject in one:
                rest = one.split(fact.subject)
                assert any(other == subject.join(rest) for subject in retained)
    with pytest.raises(ValueError, match="no retained fact of"):
        paired_sentences(split.forget, [])


def test_sentences_are_substituted_by_whole_words():
    words = {"Ann": ["Bea"], "Ann Lee": ["Cy Dee"]}
    assert substituted(["Ann Lee met Ann, not Anna."], words) == ["Cy Dee met Bea, not Anna."]
    many = substituted(["hockey"] * 50, {"hockey": ["golf", "polo"]})
    assert set(many) == {"golf", "polo"}
    assert many == substituted(["hockey"] * 50, {"hockey": ["golf", "polo"]})
    with pytest.raises(ValueError, match="sentence 2 has none"):
        substituted(["Ann", "no one"], {"Ann": ["Bea"]})
    with pytest.raises(ValueError, match="give a list"):
        substituted(["Ann"], {"Ann": []})


@pytest.mark.parametrize("paired", [True, False])
def test_topic_codes_are_found_and_few_others(paired):
    rng = np.random.default_rng(0)
    common = rng.random((60, 200)) < 0.2
    topic, control = common.copy(), common ^ (rng.random((60, 200)) < 0.05)
    topic[:, :5] |= rng.random((60, 5)) < 0.8
    control[:, :5] = rng.random((60, 5)) < 0.05
    found = enriched_codes(torch.from_numpy(topic), torch.from_numpy(control), paired=paired)
    assert set(range(5)) <= set(found.codes)
    assert len(found.codes) <= 6
    assert list(found.log_ratio) == sorted(found.log_ratio, reverse=True)
    assert max(found.q_value) <= 0.05


def test_where_nothing_is_a_topics_nothing_is_found():
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(100):
        topic, control = (torch.from_numpy(rng.random((40, 80)) < 0.3) for _ in range(2))
        wrong += bool(enriched_codes(topic, control, least_log_ratio=0.0).codes)
    assert wrong <= 5 + 3 * (100 * 0.05 * 0.95) ** 0.5
    with pytest.raises(ValueError, match="pairs of them"):
        enriched_codes(topic[:3], control)


def test_the_paired_test_by_hand():
    """6 sentences gain the code, none loses it: P = 1/64; of one code no correction."""
    topic, control = torch.ones(6, 1, dtype=torch.bool), torch.zeros(6, 1, dtype=torch.bool)
    found = enriched_codes(topic, control)
    assert found.q_value == pytest.approx([1 / 64])
    assert found.log_ratio == pytest.approx([np.log2(13)])
    assert enriched_codes(topic, control, paired=False).q_value == pytest.approx([1 / 924])


def test_erased_codes_are_not_in_the_saved_model(tiny_model, tmp_path: Path):
    model = with_codebook(tiny_model())
    codes = torch.tensor([3, 7])
    vectors = codebook_of(model).codes.detach()[codes].clone()
    deletion = CodeDeletion.of(model, [3, 7])
    with applied(model, deletion), torch.no_grad():
        wanted = model.hf(some_ids()).logits
    erase_codes(model, deletion)
    save_model(model, tmp_path / "erased")
    loaded = load_model(str(tmp_path / "erased"))
    assert float(vectors.abs().min(-1).values.max()) > 0
    assert not codebook_of(loaded).codes[codes].any()
    with torch.no_grad():
        torch.testing.assert_close(loaded.hf(some_ids()).logits, wanted)
    others = CodeDeletion.of(with_codebook(tiny_model()), [3, 9])  # chosen before, and one of them is erased
    erase_codes(loaded, others)
    assert codebook_of(loaded).deleted.nonzero()[:, 0].tolist() == [3, 7, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_deletion_fits_its_own_codebook_in_any_dtype_and_no_other(tiny_model, dtype, tmp_path: Path):
    model = with_codebook(tiny_model())
    save_deletion(CodeDeletion.of(model, [3, 7]), tmp_path / "deletion.json")
    deletion = load_deletion(tmp_path / "deletion.json")
    model.hf.to(dtype)
    with applied(model, deletion):
        assert codebook_of(model).deleted.nonzero()[:, 0].tolist() == [3, 7]
    other = tiny_model()
    insert_codebook(other, Codebook(codebook_of(model).shape, seed=1), 1)
    other.hf.to(dtype)
    with pytest.raises(ValueError, match="code 3 is another"), applied(other, deletion):
        pass
    with pytest.raises(ValueError, match="code 3 is another"):
        erase_codes(other, deletion)
    assert not codebook_of(other).deleted.any()
    with torch.no_grad():
        codebook_of(model).codes[[7, 9]] = codebook_of(model).codes[[9, 7]]  # the same vectors under other numbers
    with pytest.raises(ValueError, match="code 7 is another"), applied(model, deletion):
        pass


def test_a_deletion_stays_on_while_weights_are_relearned_and_rounded(tiny_model, split):
    """What attacks change is around the codebook: its own tensors are the same before and after, and inside."""
    model = with_codebook(tiny_model())
    codebook, deletion = codebook_of(model), CodeDeletion.of(with_codebook(tiny_model()), [1, 2, 3])
    before = {name: value.clone() for name, value in codebook.state_dict().items()}
    inside: list[list[int]] = []
    codebook.register_forward_hook(lambda module, given, output: inside.append(module.passed.codes.unique().tolist()))
    quick = {"kinds": ["full"], "learning_rates": [1e-3], "steps": 2}
    with applied(model, deletion):
        attack.relearning(model, split, **quick)
        attack.quantization(model, split, bits=[8], group_sizes=[0])
        with applied(model, deletion):
            logits_of(model.hf, some_ids())
    assert not {1, 2, 3} & {code for codes in inside for code in codes}
    assert all(torch.equal(value, before[name]) for name, value in codebook.state_dict().items())
    with applied(model, deletion):
        logits_of(model.hf, some_ids())


def test_a_deletion_that_does_not_say_of_which_codebook_is_refused(tiny_model, tmp_path: Path):
    by_hand = CodeDeletion(codes=(3, 7), base_name="tiny", base_sha256="0")
    with pytest.raises(ValueError, match="does not say which codebook"), applied(with_codebook(tiny_model()), by_hand):
        pass
    with pytest.raises(ValueError, match="1 marks of 2 codes"):
        replace(by_hand, marks=("0",))
    save_deletion(by_hand, tmp_path / "old.json")
    old = (tmp_path / "old.json").read_text().replace("deletion 2", "deletion 1")
    (tmp_path / "old.json").write_text(old)
    with pytest.raises(ValueError, match="another format"):
        load_deletion(tmp_path / "old.json")
