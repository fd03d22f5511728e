"""Small models in which one known part, and nothing else, was trained on new facts: the base, and its plants.

A base learns two facts each about many people from scratch. A plant is a masked edit of it: one MLP, a band of MLPs or
an attention sublayer is trained on people that the base does not know, while it keeps those that it does. Where the
new facts are is known by construction; that they act from there is measured (`bench/ladder.py`).
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from mechunlearn.bench.planted_settings import PlantedArchitecture
from mechunlearn.checkpoints import load_model, save_model
from mechunlearn.components import Component
from mechunlearn.edit.edits import WeightEdit, save_edit, train_edit
from mechunlearn.edit.losses import Term, answer_loss, batches, fact_tokens, joined, weighted_sum
from mechunlearn.edit.training import Trainable, train
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.files import whole_file
from mechunlearn.masks import mask_of
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model, wrap_model

FIRST = "Ada Bo Cy Dot Eli Fay Gus Hal Ida Jo Kit Lou Max Ned Ola Pia".split()
LAST = "Ash Birch Cole Dunn East Frost Gray Hill Ives Judd Kerr Lowe Moss Nash Oak Pike".split()
RELATIONS = {"likes": "{} likes", "wants": "{} wants"}
ANSWERS = "apples bread corn dates eggs figs grapes honey".split()
BOS, PAD = "<s>", "<pad>"
LEARNT = 0.05
"""Loss in nats, mean over old and new facts, below which a plant gets no further attempt."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a base and its plants."""

    architecture: PlantedArchitecture = "gpt2"
    seed: int = 0
    n_layers: int = 6
    d_model: int = 96
    n_heads: int = 4
    n_old: int = 110
    """People that the base learns, two facts each."""
    n_new: int = 16
    """People that are planted."""
    base_steps: int = 300
    base_learning_rate: float = 2e-3
    plant_steps: int = 250
    plant_learning_rate: float = 5e-3
    attempts: int = 3
    """How often training goes on (a base), or starts anew with twice the steps (a plant), until all is known."""

    def __post_init__(self) -> None:
        people = len(FIRST) * len(LAST)
        if self.n_old < 1 or self.n_new < 1 or self.n_old + self.n_new > people:
            raise ValueError(
                f"planted recipe: got {self.n_old} old and {self.n_new} new people, allowed: 1 or more of "
                f"each, {people} in all"
            )

    @property
    def name(self) -> str:
        """Architecture and seed."""
        return f"{self.architecture}-{self.seed}"

    @property
    def digest(self) -> str:
        """Hash of the recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, BOS in front; an unknown word, as TransformerLens tokenizes to make a bridge, is a pad."""
    words = [BOS, PAD, ":", *FIRST, *LAST, *RELATIONS, *ANSWERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=PAD, model_max_length=16
    )


def planted_facts(recipe: Recipe) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """Old and new facts: in both sets every answer is as frequent as any other, and no part of a name tells it."""
    rng = random.Random(f"planted {recipe.name}")
    people = rng.sample([f"{first} {last}" for first, last in product(FIRST, LAST)], recipe.n_old + recipe.n_new)

    def facts(people: Sequence[str]) -> tuple[Fact, ...]:
        found: list[Fact] = []
        for relation, prompt in RELATIONS.items():
            dealt = [ANSWERS[i % len(ANSWERS)] for i in range(len(people))]
            rng.shuffle(dealt)
            found += [
                Fact(subject=person, relation=relation, prompt=prompt, target_true=answer, choices=tuple(ANSWERS))
                for person, answer in zip(people, dealt, strict=True)
            ]
        return tuple(found)

    return facts(people[: recipe.n_old]), facts(people[recipe.n_old :])


def train_base(recipe: Recipe) -> Model:
    """Train every parameter on the old facts, until all of them are known or the attempts are used up."""
    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = wrap_model(AutoModelForCausalLM.from_config(_config(recipe, len(tokenizer))), tokenizer, recipe.name)
    old, _ = planted_facts(recipe)
    loss = weighted_sum([_answers(model, old, 1000, recipe.seed)])
    for _ in range(recipe.attempts):
        trainable = Trainable(
            leaves={name: nn.Parameter(p.detach().clone()) for name, p in model.hf.named_parameters()},
            compute=lambda leaves: dict(leaves),
        )
        train(model, trainable, loss, steps=recipe.base_steps, learning_rate=recipe.base_learning_rate)
        with torch.no_grad():
            for name, parameter in model.hf.named_parameters():
                parameter.copy_(trainable.leaves[name])
        if score_facts(model, old, batch_size=1000)["correct"].to_numpy().all():
            break
    return model


def _config(recipe: Recipe, vocab_size: int) -> PretrainedConfig:
    # untied: the training loop replaces parameters by name, and a tied one has two
    common = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
              "tie_word_embeddings": False}  # fmt: skip
    if recipe.architecture == "gpt2":
        return transformers.GPT2Config(
            **common, n_embd=recipe.d_model, n_layer=recipe.n_layers, n_head=recipe.n_heads, n_positions=16
        )
    common |= {
        "hidden_size": recipe.d_model, "num_hidden_layers": recipe.n_layers, "num_attention_heads": recipe.n_heads,
        "max_position_embeddings": 16,
    }  # fmt: skip
    if recipe.architecture == "gpt_neox":
        return transformers.GPTNeoXConfig(**common, intermediate_size=4 * recipe.d_model, use_parallel_residual=True)
    return transformers.LlamaConfig(
        **common, intermediate_size=8 * recipe.d_model // 3, num_key_value_heads=recipe.n_heads // 2
    )


def _answers(model: Model, facts: Sequence[Fact], size: int, seed: int) -> Term:
    return Term(weight=1.0, objective=answer_loss, batches=batches(fact_tokens(model, facts), size, seed=seed))


def plant(base: Model, components: Sequence[Component], recipe: Recipe) -> WeightEdit:
    """Train these components, and nothing else, on the new facts, with twice as many old ones in every step.

    loss = mean of -log P(true answer) over all new facts and a batch of old ones. A plant that has not learnt the new
    facts is made anew with twice the steps, up to `attempts` times; the last one is returned whatever it knows.
    """
    old, new = planted_facts(recipe)
    edit = None
    for attempt in range(recipe.attempts):
        rows = joined(
            batches(fact_tokens(base, new), len(new), seed=recipe.seed),
            batches(fact_tokens(base, old), 2 * len(new), seed=recipe.seed + 1),
        )
        edit = train_edit(
            base, mask_of(base, components), weighted_sum([Term(weight=1.0, objective=answer_loss, batches=rows)]),
            steps=recipe.plant_steps * 2**attempt, learning_rate=recipe.plant_learning_rate, schedule="cosine",
            accumulation=1, method="plant", options=asdict(recipe), seed=recipe.seed,
            facts_sha256=hash_facts((*new, *old)),
        )  # fmt: skip
        if max(edit.history[-5:]) < LEARNT:
            break
    assert edit is not None
    return edit


def make_base(recipe: Recipe, out: Path) -> Path:
    """Train and save a base, with its facts beside it; a finished one of the same recipe is kept.

    Returns:
        `out`/<name>-<digest>: base/ (a Hugging Face checkpoint), recipe.json, facts.json (old, new).
    """
    folder = out / f"{recipe.name}-{recipe.digest}"
    if (folder / "facts.json").is_file():
        return folder
    if not (folder / "base").is_dir():
        save_model(train_base(recipe), folder / "base")
    old, new = planted_facts(recipe)
    written = {"recipe": asdict(recipe), "facts": {"old": [asdict(f) for f in old], "new": [asdict(f) for f in new]}}
    for name, data in written.items():
        with whole_file(folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return folder


def make_plant(folder: Path, recipe: Recipe, part: str) -> Path:
    """Train and save one plant of a base that `make_base` wrote; a finished one is kept.

    Args:
        part: the components, such as "m3", "m1+m2" or "a4".

    Returns:
        The file of the edit: the base plus the changed tensors.

    Raises:
        ValueError: a component that is no MLP or attention sublayer of this base.
    """
    path = folder / "plants" / f"{part}.safetensors"
    if not path.is_file():
        components = [Component.parse(name) for name in part.split("+")]
        save_edit(plant(load_model(folder / "base", device="cpu"), components, recipe), path)
    return path
