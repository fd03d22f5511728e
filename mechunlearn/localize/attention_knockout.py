"""From which layer on the last token needs to see the subject: attention between the two, blocked."""

from collections.abc import Sequence

import torch

from mechunlearn.activations import blocked_attention, last_logits, untouched
from mechunlearn.facts import Fact
from mechunlearn.localize.pairs import batches, build_pairs
from mechunlearn.models import Model


def knock_out_attention(
    model: Model, facts: Sequence[Fact], layers: Sequence[int], *, batch_size: int = 32, seed: int = 0
) -> list[bool]:
    """Which facts survive when the prompt's last token cannot attend to any subject token in these layers.

    Nor can the answer's first tokens where these are given, see `pairs.build_pairs`.

    Correct: the true answer beats all other candidates at the first token where it differs from a donor's answer
    (see `pairs.build_pairs`; the donor only fixes that place). Tokens between subject and end still see the subject.

    Returns:
        One value per fact, in their order.

    Raises:
        ValueError: unknown layers, or a fact that cannot be paired.

    Source: Geva et al. 2023, arXiv:2304.14767, section 4.
    """
    if not set(layers) <= set(range(model.n_layers)):
        raise ValueError(f"attention knockout: got layers {list(layers)}, allowed: 0 to {model.n_layers - 1}")
    pairs = build_pairs(model, facts, seed=seed)
    correct = [False] * len(facts)
    with untouched(model), torch.no_grad():
        for batch in batches(model, pairs, batch_size):
            n, width = batch.clean.ids.shape
            blocked = torch.zeros(n, width, width, dtype=torch.bool, device=model.device)
            for row, pair in enumerate(batch.pairs):
                for query in range(pair.end, len(pair.clean)):
                    blocked[row, query, list(pair.subject)] = True
            with blocked_attention(model, layers, blocked):
                chosen = batch.chosen(last_logits(model, batch.clean))
            for pair, hit in zip(batch.pairs, (chosen == batch.answer).tolist(), strict=True):
                correct[pair.fact] = hit
    return correct
