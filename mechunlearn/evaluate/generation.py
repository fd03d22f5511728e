"""What a model writes: generated text, held against references by the scores that the field reports."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import sacrebleu
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

NO_LIMIT = 10**6  # tokens; transformers' tokenizers that know none (DeBERTa's) say 10^30


@torch.no_grad()
def generated(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 96,
    stop: Sequence[int] = (),
    batch_size: int = 64,
) -> list[str]:
    """Greedy continuations of the prompts (of an encoder-decoder model: its outputs), with a cache, without specials.

    Args:
        stop: token ids that end a text, beside the ends of tokenizer and model.
    """
    own_ends = getattr(hf.generation_config, "eos_token_id", None)  # one, or several
    ends = [*stop, tokenizer.eos_token_id, *(own_ends if isinstance(own_ends, list) else [own_ends])]
    ends = list(dict.fromkeys(token for token in ends if isinstance(token, int)))
    filler = next((token for token in (tokenizer.pad_token_id, *ends) if isinstance(token, int)), 0)
    found: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        rows = [torch.tensor(row) for row in tokenizer([prompts[i] for i in numbers])["input_ids"]]
        ids = pad_sequence(rows, batch_first=True, padding_value=filler, padding_side="left").to(hf.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").to(hf.device)
        made = hf.generate(  # pyright: ignore[reportCallIssue]  # transformers types it as a tensor
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=ends or None, pad_token_id=filler,
        )  # fmt: skip
        own = made if hf.config.is_encoder_decoder else made[:, ids.shape[1] :]
        texts = tokenizer.batch_decode(own, skip_special_tokens=True)
        found |= dict(zip(numbers, (text.strip() for text in texts), strict=True))
    return [found[i] for i in range(len(prompts))]


def generation_scores(
    texts: Sequence[str], references: Sequence[str], *, bert_model: str | None = None
) -> pd.DataFrame:
    """Scores of each text against its reference, one row a text.

    bleu: sacrebleu's sentence BLEU with effective order, 0 to 100. chrf: 0 to 100. exact: 1 if they are the same.
    meteor (0 to 1): where nltk and its WordNet data are installed. bertscore (F1): with `bert_model`.

    Args:
        bert_model: folder or hub name of the encoder that BERTScore compares tokens with.

    Raises:
        ValueError: texts and references of different number, or `bert_model` without bert-score.

    Source: Post 2018 (sacrebleu), Popovic 2015 (chrF), Banerjee & Lavie 2005 (METEOR), Zhang et al. 2020 (BERTScore).
    """
    if len(texts) != len(references):
        raise ValueError(f"generation: got {len(texts)} texts and {len(references)} references, allowed: as many")
    columns: dict[str, list[float]] = {
        "bleu": [sacrebleu.sentence_bleu(text, [ref]).score for text, ref in zip(texts, references, strict=True)],
        "chrf": [sacrebleu.sentence_chrf(text, [ref]).score for text, ref in zip(texts, references, strict=True)],
        "exact": [float(text == ref) for text, ref in zip(texts, references, strict=True)],
    }
    if (meteor := _meteor(texts, references)) is not None:
        columns["meteor"] = meteor
    if bert_model is not None:
        columns["bertscore"] = _bertscore(texts, references, bert_model)
    return pd.DataFrame(columns)


def _meteor(texts: Sequence[str], references: Sequence[str]) -> list[float] | None:
    try:
        from nltk.corpus import wordnet  # pyright: ignore[reportMissingImports]  # an extra
        from nltk.translate.meteor_score import single_meteor_score  # pyright: ignore[reportMissingImports]

        wordnet.ensure_loaded()
    except (ImportError, LookupError):  # its data are a download of their own
        return None
    return [single_meteor_score(ref.split(), text.split()) for text, ref in zip(texts, references, strict=True)]


def _bertscore(texts: Sequence[str], references: Sequence[str], model: str) -> list[float]:
    try:
        from bert_score import BERTScorer  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        raise ValueError("generation: bert_model needs bert-score; pip install 'mechunlearn[generation]'") from None
    config = AutoConfig.from_pretrained(model)
    scorer = BERTScorer(model_type=model, num_layers=config.num_hidden_layers)
    tokenizer: Any = scorer._tokenizer
    if tokenizer.model_max_length > NO_LIMIT:  # which tokenizers refuse; RoBERTa's positions begin after padding's
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", 514) - 2
    return [float(value) for value in scorer.score(list(texts), list(references))[2]]


def normalized_drop(original: float, unlearned: float, untrained: float) -> float:
    """(original - unlearned) / (original - untrained): 0, nothing was lost; 1, as if it had never been learnt.

    Raises:
        ValueError: the original is no better than the untrained one, so that there is nothing to lose.

    Source: Wu et al. 2024, arXiv:2410.10866 (untrained: the model without tuning for the task).
    """
    if original <= untrained:
        raise ValueError(f"normalized drop: got {original:.3f} before and {untrained:.3f} untrained, nothing to lose")
    return (original - unlearned) / (original - untrained)
