"""Shared fixtures: tiny seeded models of every architecture, a tokenizer, a fact set and its split."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach the hub
if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, and what they start, have one thread each
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mechunlearn.edit.losses import Term, answer_loss, batches, fact_tokens, weighted_sum
from mechunlearn.edit.training import masked_trainable, train
from mechunlearn.facts import Fact, FactSet, FactSplit, split_facts, with_edit_targets
from mechunlearn.masks import mask_of
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model, all_components, wrap_model
from mechunlearn.resumable import Training, run_training

ARCHITECTURES = ("gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")

FIRST = ("Bram", "Cora", "Dina", "Edwin", "Fenna", "Gustav", "Hilda", "Ivo")
LAST = ("Lindqvist", "Marlowe", "Norberg", "Okafor", "Petrov")
COLOURS = ("red", "blue", "green", "amber")
CITIES = ("Oslo", "Rome", "Lima")

N_LAYERS, D_MODEL, N_HEADS, N_KV_HEADS, D_HEAD, D_MLP = 3, 32, 4, 2, 8, 48


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: answers are one token each, names are several; BOS is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    text = [
        "The favourite colour of likes the colour lives in the city of was born in Question: Answer: What Where is? ."
    ]
    text = text * 20 + [f"{answer} A B C D" for answer in (*COLOURS, *CITIES)] * 50 + [*FIRST, *LAST]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "<pad>"], show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>", model_max_length=64
    )


_TOKENIZER = _tokenizer()


def _config(architecture: str, n_layers: int) -> transformers.PretrainedConfig:
    vocab = {"vocab_size": len(_TOKENIZER), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    llama = vocab | {
        "hidden_size": D_MODEL,
        "num_hidden_layers": n_layers,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "intermediate_size": D_MLP,
        "max_position_embeddings": 64,
    }
    gpt = {"hidden_size": D_MODEL, "max_position_embeddings": 64, "intermediate_size": D_MLP}
    # head_dim differs from hidden_size / heads where the family allows it, so that no code may assume it
    match architecture:
        case "gpt2":
            return transformers.GPT2Config(
                **vocab, n_embd=D_MODEL, n_layer=n_layers, n_head=N_HEADS, n_positions=64, n_inner=D_MLP
            )
        case "gpt_neo":
            kinds = [[["global"], 1], [["local"], n_layers - 1]]
            return transformers.GPTNeoConfig(
                **vocab, **gpt, num_layers=n_layers, num_heads=N_HEADS, attention_types=kinds, window_size=16
            )
        case "gpt_neox":
            return transformers.GPTNeoXConfig(**vocab, **gpt, num_hidden_layers=n_layers, num_attention_heads=N_HEADS)
        case "llama":
            return transformers.LlamaConfig(**llama)
        case "mistral":
            return transformers.MistralConfig(**llama, sliding_window=32)
        case "gemma":
            return transformers.GemmaConfig(**llama, head_dim=12)
        case "gemma2":
            return transformers.Gemma2Config(**llama, head_dim=12, query_pre_attn_scalar=12, sliding_window=32)
        case "gemma3_text":
            return transformers.Gemma3TextConfig(**llama, head_dim=12, query_pre_attn_scalar=12, sliding_window=32)
        case "qwen2":
            return transformers.Qwen2Config(**llama)
        case "qwen3":
            return transformers.Qwen3Config(**llama, head_dim=12)
    raise ValueError(f"no tiny {architecture}; known: {', '.join(ARCHITECTURES)}")


def make_tiny_model(architecture: str = "llama", seed: int = 0, n_layers: int = N_LAYERS) -> Model:
    """A seeded random model; weights are larger than the usual initialisation, so that every part matters."""
    config = _config(architecture, n_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in hf.named_parameters():
                if parameter.ndim == 1:  # biases and norms would start at 0 or 1 and hide mistakes
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif "emb" not in name and "wte" not in name and "lm_head" not in name:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return wrap_model(hf, _TOKENIZER, name=f"tiny-{architecture}-{seed}")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests keep on disk is kept for this session, and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHUNLEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Model]:
    """`tiny_model(architecture="llama", seed=0, n_layers=3)` makes a fresh random model with a tokenizer."""
    return make_tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny models' tokenizer."""
    return _TOKENIZER


@pytest.fixture(params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> Model:
    """One tiny model of each architecture in turn."""
    return make_tiny_model(request.param)


@pytest.fixture(scope="session")
def tiny_facts() -> FactSet:
    """40 invented people with a colour and a city each."""
    people = [f"{first} {last}" for last in LAST for first in FIRST]
    facts = []
    for i, person in enumerate(people):
        colour, city = COLOURS[(i * 7 + i // 5) % len(COLOURS)], CITIES[(i * 5 + i // 4) % len(CITIES)]
        colour_question = "What is the favourite colour of {}?"
        facts += [
            Fact(
                subject=person, relation="colour", prompt="The favourite colour of {} is", target_true=colour,
                paraphrases=("{} likes the colour",), questions=(colour_question,), choices=COLOURS,
            ),
            Fact(
                subject=person, relation="city", prompt="{} lives in the city of", target_true=city,
                paraphrases=("{} was born in",), questions=("Where is {} born?",), choices=CITIES,
            ),
        ]  # fmt: skip
    return FactSet(name="tiny", facts=tuple(facts))


@pytest.fixture(scope="session")
def tiny_split(tiny_facts: FactSet) -> FactSplit:
    """The colours of 24 people are to be forgotten."""
    people = list(dict.fromkeys(fact.subject for fact in tiny_facts))[:24]
    forget = tiny_facts.where(lambda fact: fact.relation == "colour" and fact.subject in people)
    return split_facts(tiny_facts, forget, seed=0)


@pytest.fixture(scope="session")
def split(tiny_split: FactSplit) -> FactSplit:
    """The same with a wrong answer for everything that is to be forgotten."""
    parts = ("forget_shown", "forget_hidden", "attack_dev")
    return replace(tiny_split, **{part: with_edit_targets(getattr(tiny_split, part)) for part in parts})


@pytest.fixture(scope="session")
def knowing(tiny_model: Callable[..., Model], tiny_facts: FactSet) -> Model:
    """A tiny model taught all facts in prompt and paraphrase."""
    model = tiny_model("llama", seed=0)
    with torch.no_grad():  # the tiny unembedding is not trained, and logits through it could not be certain
        model.hf.get_output_embeddings().weight.mul_(10)
    trainable = masked_trainable(model, mask_of(model, all_components(model)))
    tokens = fact_tokens(model, tiny_facts.facts, forms="all")
    loss = weighted_sum([Term(weight=1.0, objective=answer_loss, batches=batches(tokens, 80, seed=0))])
    train(model, trainable, loss, steps=100, learning_rate=1e-2)
    with torch.no_grad():
        for name, value in trainable.overrides().items():
            dict(model.hf.named_parameters())[name].copy_(value)
    assert score_facts(model, tiny_facts.facts)["p_true"].mean() > 0.9
    return model


class _Unscored(FactSplit):
    """A split whose parts for scoring are not to be read."""

    def __getattribute__(self, name: str) -> object:
        if name in ("retain_test", "same_subject"):
            raise AssertionError(f"{name} was read")
        return super().__getattribute__(name)


@pytest.fixture(scope="session")
def unscored() -> Callable[[FactSplit], FactSplit]:
    """Makes a split without the parts that only score: reading one of them fails the test."""

    def guard(split: FactSplit) -> FactSplit:
        guarded = object.__new__(_Unscored)
        kept = {name: part for name, part in vars(split).items() if name not in ("retain_test", "same_subject")}
        guarded.__dict__.update(kept)
        return guarded

    return guard


class Killed(Exception):
    """What ends a training in the middle of a step."""


@pytest.fixture(scope="session")
def killed_and_resumed() -> Callable[..., Training]:
    """`killed_and_resumed(make, folder, at=3, every=2)` trains, is killed at a step, goes on anew; the finished one."""

    def run(make: Callable[[], Training], folder: Path, *, at: int, every: int) -> Training:
        def kill(step: int, loss: float) -> None:
            if step == at:
                raise Killed

        with pytest.raises(Killed):
            run_training(make(), folder, checkpoint_every=every, on_step=kill)
        resumed = make()
        run_training(resumed, folder, checkpoint_every=every)
        return resumed

    return run
