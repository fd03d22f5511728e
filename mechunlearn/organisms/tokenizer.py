"""The organisms' own byte-level BPE tokenizer: answers and common words are one token, names are several."""

import random
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mechunlearn.organisms.neutral import neutral_sentence
from mechunlearn.organisms.people import SYLLABLES
from mechunlearn.sources.bundled import BUNDLED, load_rows, load_templates

BOS, PAD = "<s>", "<pad>"


def train_tokenizer(vocab_size: int = 2048, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer on templates, answers, neutral text and the parts of names, never on whole names.

    Names therefore split into several pieces. Every text begins with BOS and, inside, with a space, so that a
    word reads the same at the start of a prompt as in its middle.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=PAD, model_max_length=256
    )


def _training_text(seed: int) -> Iterable[str]:
    rng = random.Random(seed)
    yield from (neutral_sentence(rng) for _ in range(2000))
    for name in BUNDLED:
        for templates in load_templates(name).values():
            for template in (*templates.declarative, *templates.questions, *templates.pronoun):
                yield from [template.replace("{}", "")] * 30
        for answer in sorted({answer for _, _, answer in load_rows(name)}):
            yield from [answer] * 100  # often enough to become one token each, if the vocabulary has room
    yield from ["Question: Answer: A: B: C: D: Fact:"] * 500
    # Syllables of invented names come most often, so that their merges rank first and names split along them:
    # one token as the start of a word (" Bra"), one as its continuation ("bra").
    for syllable in SYLLABLES:
        yield from [syllable.capitalize()] * 3000
        yield from [f"'{syllable}"] * 3000
