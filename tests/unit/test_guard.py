"""Guards: gates that see no future, clamps that change nothing else, and the same text with and without a cache."""

import gc
import math
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from mechunlearn import applied
from mechunlearn.activations import hooked, read
from mechunlearn.edit.losses import answer_log_probs, answer_tokens, batches, joined, predict
from mechunlearn.features.attached import Seen, attached
from mechunlearn.features.clamp import Clamp
from mechunlearn.features.code_deletion import CodeDeletion
from mechunlearn.features.dictionary import Dictionary, Kind, fold_decoder_norm
from mechunlearn.features.gate import Gate, calibrated
from mechunlearn.features.guard import Guard, attach, load_guard, narrowed, save_guard, without_clamp
from mechunlearn.features.guard_files import load_from, save_in
from mechunlearn.features.hook_points import KINDS, place_of_hook, width_at
from mechunlearn.features.statistics import feature_statistics
from mechunlearn.metrics import candidate_log_probs, perplexity
from mechunlearn.models import Model, NotSupported, wrap_model
from mechunlearn.prompts import padding_token
from mechunlearn.report.gates import gate_figure

HOOK = "blocks.1.hook_resid_post"
FAMILIES = ("gpt2", "gpt_neo", "gpt_neox", "llama", "gemma2", "qwen3")
GATES = [Gate(kind=kind, threshold=t) for kind, t in (("share", 0.3), ("window", 0.3), ("cusum", 3.0))]
SEQUENCE = [replace(gate, scope="sequence") for gate in GATES]
MADE_ON = {"base_name": "tiny", "base_sha256": "0", "method": "by hand"}


def a_dictionary(width: int = 32, kind: Kind = "relu", hook_point: str = HOOK, d_sae: int = 24) -> Dictionary:
    """Random directions; biases such that a feature is on at about one token in ten."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, width, generator=g), dim=-1)
    weights = {"W_enc": directions.T.clone(), "W_dec": directions, "b_dec": torch.zeros(width)}
    weights |= {"b_enc": torch.full((d_sae,), -1.2)}
    if kind == "jumprelu":
        weights |= {"b_enc": torch.zeros(d_sae), "threshold": torch.full((d_sae,), 1.2)}
    return Dictionary(
        kind=kind, weights=weights, hook_point=hook_point, is_folded=True, k=4 if kind == "topk" else None
    )


def a_guard(dictionary: Dictionary | None = None, features: tuple[int, ...] = (1, 4, 7, 9), **changed) -> Guard:
    whole = dictionary or a_dictionary()
    clamp = Clamp(strength=3.0, units="features")
    made = Guard(dictionary=narrowed(whole, features), features=features, gate=GATES[0], clamp=clamp, **MADE_ON)
    return replace(made, **changed)


def some_ids(model: Model, rows: int = 3, length: int = 14, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(2, model.hf.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0  # BOS
    return ids


def logits_of(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(ids, use_cache=False).logits


def stepwise(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """The same logits, one token at a time with a cache of keys and values."""
    cache, found = None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            out = model.hf(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("gate", [*GATES, None], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_guarded_alike_with_and_without_a_cache(tiny_model: Callable[..., Model], family: str, gate):
    model = tiny_model(family)
    ids, guard = some_ids(model), a_guard(gate=gate)
    plain = logits_of(model, ids)
    with applied(model, guard):
        guarded, cached = logits_of(model, ids), stepwise(model, ids)
        alone = logits_of(model, ids[1:2])
        split = model.hf(ids[:, :6], use_cache=True)
        rest = model.hf(ids[:, 6:], past_key_values=split.past_key_values, use_cache=True).logits
    torch.testing.assert_close(guarded, cached, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(guarded[:, 6:], rest, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(guarded[1:2], alone, atol=2e-4, rtol=1e-3)
    changed = (guarded - plain).abs().amax((1, 2)) > 0.05
    assert changed.any(), "the gate must fire on some text"
    assert torch.equal(logits_of(model, ids), plain)


@pytest.mark.parametrize("gate", [*GATES, *SEQUENCE], ids=str)
def test_generations_agree_with_and_without_a_cache_and_in_a_padded_batch(tiny_model, gate):
    """But for the scope "sequence", without a cache: see where its decision turns, below."""
    model, guard = tiny_model(), a_guard(gate=gate)
    model.tokenizer.padding_side = "left"
    prompts = ["The favourite colour of Bram", "Cora Lindqvist lives in the city of", "What colour?"]
    options = {"max_new_tokens": 12, "do_sample": False}
    batch = model.tokenizer(prompts, return_tensors="pt", padding=True)
    plain = model.hf.generate(**batch, **options)
    with applied(model, guard):
        together = [model.hf.generate(**batch, use_cache=cache, **options) for cache in (True, False)]
        for row, prompt in enumerate(prompts):
            one = model.tokenizer(prompt, return_tensors="pt")
            alone = model.hf.generate(**one, **options)[0]
            n = len(one["input_ids"][0])
            assert torch.equal(alone[n:], together[0][row, batch["input_ids"].shape[1] :])
    assert torch.equal(*together) or gate.scope == "sequence"
    assert not torch.equal(together[0], plain)
    model.tokenizer.padding_side = "right"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("gate", SEQUENCE, ids=str)
def test_token_by_token_a_sequence_opens_where_the_score_of_all_so_far_passes(tiny_model, family, gate):
    model = tiny_model(family)
    ids = some_ids(model, rows=8)
    on, content = flags(model, ids)
    wanted = torch.stack([decided(gate, on, content, n) for n in range(1, ids.shape[1] + 1)], dim=1) & on
    assert wanted.any(), "the gate must open in some text"
    assert (on & ~wanted).any(), "and be shut at some hit"
    plain, cache, clamped = read(model, ids, ("block", 1)), None, []
    with applied(model, a_guard(gate=gate)), hooked(model, record=[("block", 1)]) as seen, torch.no_grad():
        for position in range(ids.shape[1]):
            out = model.hf(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            clamped.append((seen["block", 1][:, 0] - plain[:, position]).abs().amax(-1) > 0.01)
    assert torch.equal(torch.stack(clamped, dim=1), wanted)


@pytest.mark.parametrize("gate", SEQUENCE, ids=str)
def test_a_cache_goes_on_as_the_text_read_anew_until_the_decision_turns(tiny_model, gate):
    model, first = tiny_model(), 4
    ids = some_ids(model, rows=12, length=16)
    on, content = flags(model, ids)
    with applied(model, a_guard(gate=gate)), torch.no_grad():
        out = model.hf(ids[:, :first], use_cache=True)
        cached, anew = [out.logits[:, -1]], [logits_of(model, ids[:, :first])[:, -1]]
        for n in range(first, ids.shape[1]):
            out = model.hf(ids[:, n : n + 1], past_key_values=out.past_key_values, use_cache=True)
            cached.append(out.logits[:, -1])
            anew.append(logits_of(model, ids[:, : n + 1])[:, -1])
    decisions = torch.stack([decided(gate, on, content, n) for n in range(first, ids.shape[1] + 1)], dim=1)
    same = (decisions == decisions[:, :1]).cumprod(1).bool()  # up to where it first turns
    apart = (torch.stack(cached, dim=1) - torch.stack(anew, dim=1)).abs().amax(-1)
    assert apart[same].max() < 2e-4
    assert same.all(1).any()
    assert apart[~same].max() > 0.01, "beyond, they differ as the docstring says"


def decided(gate: Gate, on: torch.Tensor, content: torch.Tensor, n: int) -> torch.Tensor:
    """Whether each text's first n tokens, read at once, are past the threshold."""
    return gate.scores(on[:, :n], content[:, :n])[:, -1] > gate.threshold


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gate", [*GATES, *SEQUENCE], ids=str)
def test_padding_under_a_mask_changes_no_text_on_either_side(tiny_model, gate, side):
    model = tiny_model()  # rotary positions: padding on the left shifts them all alike
    texts = [some_ids(model, rows=1, length=n, seed=n)[0] for n in (14, 9, 6)]
    batch, mask = torch.full((3, 14), 5), torch.zeros(3, 14, dtype=torch.long)  # padded with a word: the mask decides
    spans = [slice(14 - len(one), 14) if side == "left" else slice(0, len(one)) for one in texts]
    for row, (one, span) in enumerate(zip(texts, spans, strict=True)):
        batch[row, span], mask[row, span] = one, 1
    with applied(model, a_guard(gate=gate)), torch.no_grad():
        together = model.hf(batch, attention_mask=mask, use_cache=False).logits
        for row, (one, span) in enumerate(zip(texts, spans, strict=True)):
            torch.testing.assert_close(together[row, span], logits_of(model, one[None])[0], atol=2e-4, rtol=1e-3)


def test_scores_of_texts_are_those_alone_where_token_0_is_a_word():
    """As in GPT-2, Llama 3 and Qwen: padded with "!", a sequence gate would take padding for text."""
    model = a_model_of_words()
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS[1:], k=n)) for n in [4] * 10 + [30] * 2]
    assert padding_token(model) == len(WORDS)
    guard = a_guard(a_dictionary(hook_point="blocks.0.hook_resid_post"), gate=Gate(threshold=0.25, scope="sequence"))
    plain = candidate_log_probs(model, texts, [["w1", "w2"]] * 12)
    with applied(model, guard):
        together = candidate_log_probs(model, texts, [["w1", "w2"]] * 12)
        alone = [candidate_log_probs(model, [text], [["w1", "w2"]])[0] for text in texts]
        each = [math.log(perplexity(model, [text])) * (len(text.split()) - 1) for text in texts]
        assert math.log(perplexity(model, texts)) == pytest.approx(sum(each) / (10 * 3 + 2 * 29), rel=1e-5)
        counted = [feature_statistics(model, guard.dictionary, texts, batch_size=n).mean_norm for n in (1, 12)]
        batch = answer_tokens(model, [(text, "w1") for text in texts])
        both = next(joined(batches(batch.take(torch.arange(10)), 10, seed=0), batches(batch, 12, seed=0)))
        losses = [answer_log_probs(*predict(partial(forward, model), one)) for one in (batch, both)]
    assert counted[0] == pytest.approx(counted[1], rel=1e-5)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses[0], torch.stack([one[0] for one in alone]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses[1], losses[0][[*range(10), *range(12)]], atol=1e-4, rtol=1e-4)
    opened = [not torch.allclose(one, before, atol=1e-3) for one, before in zip(alone[:10], plain[:10], strict=True)]
    assert 0 < sum(opened) < 10


WORDS = ["!", *(f"w{i}" for i in range(60))]


def forward(model: Model, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return model.hf(ids, use_cache=False, logits_to_keep=keep).logits.float()


def a_model_of_words() -> Model:
    """A GPT-2 whose only special token is its last one."""
    end = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
    whole = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*WORDS, end["eos_token"]])}, end["unk_token"])
    )
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = transformers.GPT2Config(vocab_size=62, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.GPT2LMHeadModel(config).eval()
        for parameter in hf.parameters():
            parameter.data.mul_(5)
    return wrap_model(hf, transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **end), name="of-words")


def flags(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = a_dictionary().only((1, 4, 7, 9)).encode(read(model, ids, ("block", 1)))
    content = ids > 1
    return (features > 0).any(-1) & content, content


@pytest.mark.parametrize("gate", [*GATES, *SEQUENCE], ids=str)
def test_conversations_may_take_turns_and_beams_be_reordered(tiny_model, gate):
    model = tiny_model()
    ids = some_ids(model, rows=8)
    with applied(model, a_guard(gate=gate)), torch.no_grad():
        expected = []
        for row in ids:
            begun = model.hf(row[None, :7], use_cache=True).past_key_values
            expected.append(model.hf(row[None, 7:], past_key_values=begun, use_cache=True).logits[0])
        first = [model.hf(ids[i : i + 1, :7], use_cache=True).past_key_values for i in (0, 1)]
        for i in (0, 1):
            out = model.hf(ids[i : i + 1, 7:], past_key_values=first[i], use_cache=True).logits
            torch.testing.assert_close(out[0], expected[i], atol=2e-4, rtol=1e-3)
        cache, order = model.hf(ids[:, :7], use_cache=True).past_key_values, [3, 1, 1, 0, 7, 6, 5, 4]
        cache.reorder_cache(torch.tensor(order))
        swapped = model.hf(ids[order, 7:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(swapped, torch.stack(expected)[order], atol=2e-4, rtol=1e-3)
        if gate.scope == "token":
            torch.testing.assert_close(torch.stack(expected), logits_of(model, ids)[:, 7:], atol=2e-4, rtol=1e-3)
        cache = model.hf(ids[:, :7], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 6]))
        some = model.hf(ids[[0, 1, 3], 7:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(some, torch.stack(expected)[[0, 1, 3]], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("gate", [*GATES, *SEQUENCE], ids=str)
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been(tiny_model, gate):
    model = tiny_model()
    ids, other = some_ids(model, rows=6), some_ids(model, rows=6, seed=7)
    with applied(model, a_guard(gate=gate)), torch.no_grad():
        begun = model.hf(ids[:, :7], use_cache=True).past_key_values
        expected = model.hf(ids[:, 7:], past_key_values=begun, use_cache=True).logits
        tried = model.hf(ids[:, :7], use_cache=True).past_key_values
        model.hf(other[:, :5], past_key_values=tried, use_cache=True)
        tried.crop(-5)
        again = model.hf(ids[:, 7:], past_key_values=tried, use_cache=True).logits
    torch.testing.assert_close(again, expected, atol=2e-4, rtol=1e-3)


def test_guarding_keeps_no_cache_alive(tiny_model):
    model = tiny_model()
    with applied(model, a_guard()), torch.no_grad():
        gc.disable()
        try:
            cache = model.hf(some_ids(model), use_cache=True).past_key_values
            itself = weakref.ref(cache)
            del cache
            assert itself() is None
        finally:
            gc.enable()


def test_a_cache_that_was_begun_outside_is_an_error(tiny_model):
    model = tiny_model()
    ids = some_ids(model)
    cache = model.hf(ids, use_cache=True).past_key_values
    with applied(model, a_guard()), pytest.raises(ValueError, match="begun without"):
        model.hf(ids[:, :1], past_key_values=cache)
    with applied(model, a_guard()), pytest.raises(ValueError, match="needs input_ids"):
        model.hf(inputs_embeds=torch.zeros(1, 2, 32))
    logits_of(model, ids)  # nothing stays attached after an error


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_a_clamp_to_the_value_that_is_there_changes_nothing_and_another_does(tiny_model, kind):
    model, whole = tiny_model(), a_dictionary(kind=kind)
    ids = some_ids(model)
    plain = logits_of(model, ids)
    quiet = a_guard(whole, gate=replace(GATES[0], threshold=1.0))  # no share exceeds 1
    for unchanged in (quiet, without_clamp(a_guard(whole, gate=None))):
        with applied(model, unchanged):
            assert torch.equal(logits_of(model, ids), plain)
    with applied(model, a_guard(whole, gate=None)):
        assert not torch.allclose(logits_of(model, ids), plain, atol=0.05)


def test_what_the_dictionary_does_not_explain_stays(tiny_model):
    model, whole = tiny_model(), a_dictionary()
    ids, guard = some_ids(model), a_guard(gate=None, clamp=Clamp(mode="only_fired", strength=2.0, units="features"))
    before = read(model, ids, ("block", 1))
    with applied(model, guard), hooked(model, record=[("block", 1)]) as seen:
        logits_of(model, ids)
    chosen = list(guard.features)
    features = whole.encode(before)[..., chosen]
    clamped = torch.where((features > 0) & (ids > 1)[..., None], torch.tensor(-2.0), features)
    expected = before + (clamped - features) @ whole.weights["W_dec"][chosen]
    torch.testing.assert_close(seen["block", 1], expected, atol=1e-5, rtol=1e-5)


def test_clamps_do_what_they_are_called():
    features = torch.tensor([[0.0, 2.0], [3.0, 0.0], [1.0, 1.0]])
    hot = torch.tensor([True, True, False])
    made = {mode: Clamp(mode=mode, strength=5.0, units="features", means=(0.1, 0.2))(features, hot)
            for mode in ("all_on_hot", "only_fired", "zero", "mean")}  # fmt: skip
    assert made["all_on_hot"].tolist() == [[-5, -5], [-5, -5], [1, 1]]
    assert made["only_fired"].tolist() == [[0, -5], [-5, 0], [1, 1]]
    assert made["zero"].tolist() == [[0, 0], [0, 0], [1, 1]]
    assert torch.allclose(made["mean"], torch.tensor([[0, 0.2], [0.1, 0], [1, 1]]))
    assert Clamp(strength=0.5, units="residual", residual_norm=8.0).value == -4


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_scores_see_neither_the_future_nor_padding_nor_other_texts(gate, scope):
    g = torch.Generator().manual_seed(1)
    on, content = (torch.rand(5, 30, generator=g) < p for p in (0.4, 0.9))
    whole = gate.scores(on, content)
    memory: dict[str, torch.Tensor] = {}
    cut = replace(gate, scope="token", threshold=float(whole.median()) + 1e-6)
    parts = [cut.is_open(on[:, a:b], content[:, a:b], memory) for a, b in ((0, 1), (1, 9), (9, 10), (10, 30))]
    assert torch.equal(torch.cat(parts, dim=1), whole > cut.threshold)
    assert torch.allclose(gate.scores(on[2:3, :17], content[2:3, :17]), whole[2:3, :17])
    pad = torch.zeros(5, 6, dtype=torch.bool)
    right = gate.scores(*(torch.cat([flags, pad], dim=1) for flags in (on, content)))
    left = gate.scores(*(torch.cat([pad, flags], dim=1) for flags in (on, content)))
    assert torch.allclose(right[:, :30], whole)
    assert torch.allclose(left[:, 6:], whole)
    given = replace(gate, scope=scope)
    peaks = given.peaks([(on[0], content[0])])
    padded = given.peaks([(torch.cat([on[0], pad[0]]), torch.cat([content[0], pad[0]]))])
    assert peaks == padded


def test_scores_by_hand():
    on = torch.tensor([[False, True, True, False]])
    content = torch.tensor([[False, True, True, True]])
    assert Gate(kind="share", scope="sequence").scores(on, content).tolist() == [[0, 1, 1, 2 / 3]]
    assert Gate(kind="share").scores(on, content).tolist() == [[0, 1 / 8, 2 / 8, 2 / 8]]
    assert Gate(kind="share", width=2).scores(on, content).tolist() == [[0, 1 / 2, 1, 2 / 3]]
    assert Gate(kind="window", width=2).scores(on, content).tolist() == [[0, 0.5, 1, 0.5]]
    gate = Gate(kind="cusum", rates=(0.8, 0.2))
    gain, loss = np.log(4), np.log(0.25)
    assert gate.scores(on, content)[0].numpy() == pytest.approx([0, gain, 2 * gain, 2 * gain + loss])
    assert gate.scores(~on, content)[0].numpy() == pytest.approx([0, 0, 0, gain])


def test_a_hit_among_the_first_tokens_does_not_cost_a_share_its_threshold():
    """A tenth of the texts to retain begins with a hit; the texts to forget have one at every third token."""
    content = torch.ones(24, dtype=torch.bool)
    early, none, every_third = (torch.zeros(24, dtype=torch.bool) for _ in range(3))
    early[0], every_third[2::3] = True, True
    gate = calibrated(Gate(kind="share"), [(early, content)] * 10 + [(none, content)] * 90, rate=0.05)
    assert gate.threshold == 1 / 8
    assert not gate.is_open(early[None], content[None], {}).any()
    assert gate.is_open(every_third[None], content[None], {})[0, 5:].all()


@pytest.mark.parametrize("scaling", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_a_strength_in_residual_norms_is_a_step_of_that_length_however_activations_are_scaled(kind, scaling):
    """From where the feature is off: what it added itself comes off besides."""
    whole = a_dictionary(kind=kind)
    weights = whole.weights | {"W_dec": 3 * whole.weights["W_dec"], "b_enc": whole.weights["b_enc"] + 1.2}
    whole = fold_decoder_norm(replace(whole, weights=weights, scaling=scaling, is_folded=False, scales_by_norm=True))
    x = 20 * torch.randn(40, 8, 32, generator=torch.Generator().manual_seed(1))
    norm = float(x.norm(dim=-1).mean())
    seen = Seen(content=torch.ones(40, 8, dtype=torch.bool), memory={})
    found = {}
    for mode, strength in (("only_fired", 0.3), ("only_fired", 2.0), ("zero", 1.0)):
        clamp = Clamp(mode=mode, strength=strength, units="residual", residual_norm=norm)
        found[mode, strength] = a_guard(whole, features=(4,), gate=None, clamp=clamp).change("cpu")(x, seen)
    hot = whole.encode(x)[..., 4] > 0
    assert 0.05 < hot.float().mean() < 0.95
    for strength in (0.3, 2.0):
        step = (found["only_fired", strength] - found["zero", 1.0])[hot]
        torch.testing.assert_close(step.norm(dim=-1), torch.full((len(step),), strength * norm), rtol=1e-3, atol=0)
        assert torch.equal(found["only_fired", strength][~hot], x[~hot])


@pytest.mark.parametrize("method", ["quantile", "conformal"])
def test_a_calibrated_gate_opens_on_new_texts_as_often_as_it_says(method):
    """Mean over draws of the rate on new texts; conformal promises at most the target for every distribution."""
    rng, rates = np.random.default_rng(0), []
    for _ in range(60):
        texts = [torch.from_numpy(rng.random(12) < rng.beta(1, 8)) for _ in range(300)]
        given = [(on, torch.ones(12, dtype=torch.bool)) for on in texts]
        gate = calibrated(
            Gate(kind="share", scope="sequence"), given[:99], rate=0.1, method=method, held_out=given[99:]
        )
        assert gate.n_calibrated == 99
        rates.append(gate.achieved_rate)
    assert np.mean(rates) < 0.1 + (0.02 if method == "quantile" else 0.005)
    assert np.mean(rates) > 0.04


def test_bad_gates_are_one_clear_line():
    few = [(torch.ones(3, dtype=torch.bool),) * 2] * 5
    with pytest.raises(ValueError, match=r"cannot vouch for a rate of 0\.05; give 20"):
        calibrated(Gate(), few, rate=0.05)
    with pytest.raises(ValueError, match="0 texts"):
        calibrated(Gate(), [], rate=0.05)
    with pytest.raises(ValueError, match="got rates"):
        Gate(rates=(0.1, 0.2))
    with pytest.raises(ValueError, match="got no features"):
        a_guard(features=())


@pytest.mark.parametrize("gate", [*GATES, None], ids=str)
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_guard_comes_back_from_disk_as_it_was(tiny_model, tmp_path: Path, gate, kind):
    model = tiny_model()
    guard = a_guard(a_dictionary(kind=kind), gate=gate, notes={"a": 1.5}, options={"n": 4})
    save_guard(guard, tmp_path / "guard.safetensors")
    assert load_guard(tmp_path).features == guard.features  # a folder as the command line writes
    again = load_guard(tmp_path / "guard.safetensors")
    unlike = ("dictionary",)
    assert {k: v for k, v in vars(again).items() if k not in unlike} == {
        k: v for k, v in vars(guard).items() if k not in unlike
    }
    ids = some_ids(model)
    with applied(model, guard):
        expected = logits_of(model, ids)
    with applied(model, again):
        assert torch.equal(logits_of(model, ids), expected)


def test_bad_files_and_models_that_do_not_fit_are_refused(tiny_model, tmp_path: Path):
    (tmp_path / "bad").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a saved guard"):
        load_guard(tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="no guard file"):
        load_guard(tmp_path / "none")
    with pytest.raises(ValueError, match="made for a width of 16"), applied(tiny_model(), a_guard(a_dictionary(16))):
        pass
    with (
        pytest.raises(ValueError, match="layers 0 to 2"),
        applied(tiny_model(), a_guard(a_dictionary(hook_point="blocks.7.hook_resid_post"))),
    ):
        pass


def test_a_guard_works_on_a_plain_transformers_model(tiny_model):
    model, ids = tiny_model(), some_ids(tiny_model())
    with applied(model, a_guard()):
        expected = logits_of(model, ids)
    plain = logits_of(model, ids)
    detach = attach(a_guard(), model.hf, model.tokenizer)
    assert torch.equal(logits_of(model, ids), expected)
    detach()
    assert torch.equal(logits_of(model, ids), plain)


def test_a_guard_stays_on_though_nobody_keeps_what_takes_it_off(tiny_model):
    model, ids = tiny_model(), some_ids(tiny_model())
    with applied(model, a_guard()):
        expected = logits_of(model, ids)
    attach(a_guard(), model.hf, model.tokenizer)
    gc.collect()
    assert torch.equal(logits_of(model, ids), expected)
    itself = weakref.ref(model.hf)
    del model
    gc.collect()
    assert itself() is None, "and goes with the model"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_point_is_what_transformer_lens_calls_so(tiny_model, family, kind):
    model = tiny_model(family)
    name = f"blocks.1.{kind}"
    if family == "gpt_neox" and kind == "hook_resid_mid":
        with pytest.raises(NotSupported, match="parallel"):
            place_of_hook(model, name)
        return
    ids = some_ids(model)
    found = read(model, ids, place_of_hook(model, name))
    _, cache = model.bridge.run_with_cache(ids, names_filter=name)
    theirs = cache[name].flatten(2) if cache[name].ndim == 4 else cache[name]
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)
    assert found.shape[-1] == width_at(model, place_of_hook(model, name))


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pots", "block1", "blocks.9.hook_mlp_out"])
def test_unknown_hook_points_are_errors(tiny_model, name):
    with pytest.raises(ValueError, match="hook point: got") as refused:
        place_of_hook(tiny_model(), name)
    assert "\n" not in str(refused.value)


def test_a_replaced_middle_stream_is_all_that_later_layers_see(tiny_model):
    model = tiny_model()
    a, b = some_ids(model, seed=1), some_ids(model, seed=2)
    seen_alike = torch.randn(1, 1, 32)
    with hooked(model, change={("mid", 1): lambda x: seen_alike.expand_as(x)}):
        assert torch.equal(logits_of(model, a), logits_of(model, b))
    with attached(model, ("mid", 1), lambda x, seen: x):
        same = logits_of(model, a)
    assert torch.equal(same, logits_of(model, a))


def test_a_folder_holds_a_guard_or_a_deletion_or_neither(tmp_path: Path):
    deletion = CodeDeletion(codes=(3, 1), base_name="tiny", base_sha256="0")
    for name, made in (("guard", a_guard()), ("deletion", deletion)):
        (tmp_path / name).mkdir()
        save_in(tmp_path / name, made)
    assert load_from(tmp_path / "deletion") == deletion
    loaded = load_from(tmp_path / "guard")
    assert isinstance(loaded, Guard)
    assert load_guard(tmp_path / "guard").features == a_guard().features
    assert (loaded.features, loaded.gate, loaded.comes_off) == (a_guard().features, a_guard().gate, True)
    assert load_from(tmp_path) is None


def test_the_gate_is_drawn_as_it_decides(tiny_model):
    model, texts = tiny_model("llama"), ["The favourite colour of Bram Norberg is", "Cora Marlowe lives in the city of"]
    guard = a_guard(gate=Gate(kind="share", threshold=0.2))
    figure = gate_figure(model, guard, texts)
    place = place_of_hook(model, HOOK)
    for trace, text in zip(figure.data, texts, strict=True):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with hooked(model, change={place: lambda x: x}), torch.no_grad():
            plain = read(model, ids, place)
        with applied(model, guard):
            changed = read(model, ids, place)
        filled = [symbol == "circle" for symbol in trace.marker.symbol]
        assert filled == (plain != changed).any(-1)[0].tolist()
    assert any("circle" in trace.marker.symbol for trace in figure.data)
    with pytest.raises(ValueError, match="always open"):
        gate_figure(model, a_guard(gate=None), texts)
