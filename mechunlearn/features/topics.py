"""Which codes belong to a topic: they are on in its sentences, and off in the same sentences about something else."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from scipy import stats
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechunlearn.codebook import Codebook
from mechunlearn.features.token_rows import is_content


@dataclass(frozen=True, kw_only=True)
class Enrichment:
    """Codes of a topic, the most enriched first, with what speaks for each."""

    codes: tuple[int, ...]
    log_ratio: tuple[float, ...]
    """log2 of (share of topic sentences with the code) / (share of control sentences with it), each + 1/2 sentence."""
    q_value: tuple[float, ...]
    """Of an exact test, corrected over all codes (Benjamini and Hochberg)."""
    n_sentences: int
    n_tested: int
    """Codes that are on in some sentence."""


def substituted(sentences: Sequence[str], words: Mapping[str, Sequence[str]], *, seed: int | str = 0) -> list[str]:
    """Each sentence with every topic word replaced by one of its substitutes: the paired control of the topic.

    Whole words, case as written; the same word has one substitute in a sentence.

    Raises:
        ValueError: a sentence without any of the words, or a word without substitutes.
    """
    if bad := [word for word, others in words.items() if not others or isinstance(others, str)]:
        raise ValueError(f"topic: the substitutes of {bad[0]!r} are {words[bad[0]]!r}; give a list of one or more")
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in sorted(words, key=len, reverse=True)))
    made: list[str] = []
    for number, sentence in enumerate(sentences):
        rng = random.Random(f"{seed}|{number}")
        chosen = {word: rng.choice(list(words[word])) for word in dict.fromkeys(pattern.findall(sentence))}
        if not chosen:
            raise ValueError(f"topic: sentence {number + 1} has none of the topic's words: {sentence!r}")
        made.append(pattern.sub(lambda found, chosen=chosen: chosen[found[0]], sentence))
    return made


@torch.no_grad()
def codes_in(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codebook: Codebook, texts: Sequence[str], *,
    n_closest: int | None = None, batch_size: int = 64, max_tokens: int = 256,
) -> Bool[Tensor, "text code"]:  # fmt: skip
    """Which codes some content token of each text passes as.

    Runs what holds the codebook: the encoder of an encoder-decoder model, else the model itself.

    Args:
        n_closest: count so many closest codes of every token, in place of the k that it passes as: those that would
            step in if the first ones were deleted, too.
    """
    encoder = hf.get_encoder() if hf.config.is_encoder_decoder else hf.base_model
    limit = min(max_tokens, getattr(hf.config, "max_position_embeddings", None) or max_tokens)
    found = torch.zeros(len(texts), codebook.shape.n_codes, dtype=torch.bool)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    was_training = hf.training
    hf.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        made = tokenizer([texts[i] for i in rows], truncation=True, max_length=limit)["input_ids"]
        # on the right, where it moves no position, and by hand, for not every tokenizer can
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in made], batch_first=True)
        ids = pad_sequence([torch.tensor(row) for row in made], batch_first=True)
        encoder(input_ids=ids.to(hf.device), attention_mask=mask.to(hf.device, torch.long))
        if (passed := codebook.passed) is None:
            raise RuntimeError("codebook: a forward pass of the model did not go through it")
        codes = passed.codes if n_closest is None else codebook.closest(passed.z, n_closest)
        content = mask & is_content(tokenizer, ids)
        for row, text in enumerate(rows):
            found[text, codes[row][content[row].to(codes.device)].flatten().cpu()] = True
    hf.train(was_training)
    return found


def enriched_codes(
    topic: Bool[Tensor, "text code"],
    control: Bool[Tensor, "text code"],
    *,
    paired: bool = True,
    least_log_ratio: float = 1.0,
    false_discovery_rate: float = 0.05,
) -> Enrichment:
    """Codes that are on in more sentences of a topic than of its control.

    Counted by sentence, for tokens of a sentence depend on each other. paired (sentence i of one is sentence i of the
    other, substituted): the exact test of McNemar, on the sentences in which a code is on in one of the two alone.
    Else Fisher's exact test. One-sided; corrected over all codes that are on anywhere.

    Args:
        least_log_ratio: log2; 1 is twice as often.

    Raises:
        ValueError: pairs of different number, or no sentences.

    Source: Wu et al. 2024, arXiv:2410.10866 (enrichment; theirs is a chi-squared test on tokens, uncorrected).
    """
    if not len(topic) or not len(control) or (paired and len(topic) != len(control)):
        raise ValueError(f"topic: got {len(topic)} sentences and {len(control)} controls, allowed: pairs of them")
    a, b = topic.sum(0).numpy(), control.sum(0).numpy()
    tested = np.flatnonzero(a + b)
    if paired:
        gained = (topic & ~control).sum(0).numpy()[tested]
        lost = (control & ~topic).sum(0).numpy()[tested]
        p = stats.binom.sf(gained - 1, gained + lost, 0.5)
    else:
        n = len(topic) + len(control)
        p = stats.hypergeom.sf(a[tested] - 1, n, (a + b)[tested], len(topic))
    q = stats.false_discovery_control(np.clip(p, 0, 1)) if len(tested) else np.zeros(0)
    ratio = np.log2(((a + 0.5) / (len(topic) + 1)) / ((b + 0.5) / (len(control) + 1)))[tested]
    kept = np.flatnonzero((q <= false_discovery_rate) & (ratio >= least_log_ratio))
    kept = kept[np.argsort(-ratio[kept], kind="stable")]
    return Enrichment(
        codes=tuple(int(c) for c in tested[kept]), log_ratio=tuple(map(float, ratio[kept])),
        q_value=tuple(map(float, q[kept])), n_sentences=len(topic), n_tested=len(tested),
    )  # fmt: skip
