"""Running text as rows of tokens, step by step: what dictionaries and codebooks are trained on."""

import random
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechunlearn.models import Model
from mechunlearn.prompts import encode, max_positions

TokenRows = Callable[[int], Int[Tensor, "row pos"]]
"""Step -> its rows. The same step always gives the same rows, so that a training that was killed goes on alike."""


def rows_of_texts(model: Model, texts: Sequence[str], *, rows: int = 16, length: int = 128, seed: int = 0) -> TokenRows:
    """The texts packed one after another into whole rows, every text once an epoch, in an order drawn for each epoch.

    Args:
        length: tokens of a row; fewer where the model has fewer positions.

    Raises:
        ValueError: less text than one batch of rows.
    """
    length = max_positions(model, length)
    encoded = encode(model, texts)
    a_step = rows * length
    if (n_tokens := sum(map(len, encoded))) < a_step:
        raise ValueError(f"text: got {n_tokens} tokens in {len(texts)} texts, allowed: at least {a_step}, one batch")
    steps = n_tokens // a_step  # an epoch
    epoch: dict[int, Tensor] = {}

    def batch(step: int) -> Tensor:
        number, within = divmod(step, steps)
        if number not in epoch:
            order = random.Random(f"{seed}|{number}").sample(range(len(encoded)), len(encoded))
            flat = torch.tensor(list(chain.from_iterable(encoded[i] for i in order)))
            epoch.clear()
            epoch[number] = flat[: steps * a_step].view(steps, rows, length)
        return epoch[number][within]

    return batch


def is_content(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
    """Which tokens are text: the activations of special ones (BOS, padding) are far larger in many models."""
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), device=ids.device)
    return ~torch.isin(ids, special)
