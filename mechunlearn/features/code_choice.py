"""The codes of a topic, chosen from sentences about it and the same about something else, for any codebook model."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechunlearn.codebook_model import codebook_of
from mechunlearn.features.deletion import CodeDeletion
from mechunlearn.features.selection import NothingFound
from mechunlearn.features.topics import Enrichment, codes_in, enriched_codes


def choose_codes(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    topic: Sequence[str],
    control: Sequence[str],
    *,
    paired: bool = True,
    least_log_ratio: float = 1.0,
    false_discovery_rate: float = 0.05,
    n_closest: int | None = None,
    most_codes: int | None = None,
    rounds: int = 1,
) -> CodeDeletion:
    """The deletion of the codes that are on in a topic's sentences and not in those of its control.

    The model is a plain one of transformers, causal or encoder-decoder. No gradient step is taken, and outside of
    `CodeDeletion.entered` the model stays as it is.

    Args:
        control: paired, sentence i of the topic about something else (`features.topics.substituted` makes such).
        least_log_ratio, false_discovery_rate: see `features.topics.enriched_codes`.
        n_closest: count so many closest codes of every token, which would step in one after another, in place of the
            k that it passes as.
        most_codes: take at most so many, the most enriched first.
        rounds: count again with what was found deleted, and delete what has stepped in.

    Raises:
        ValueError: the model has no codebook; too few codes would be left; pairs of different number, or none.
        NothingFound: no code is enriched.
    """
    options = {name: value for name, value in locals().items() if name not in ("hf", "tokenizer", "topic", "control")}
    codebook, codes = codebook_of(hf), list[int]()
    if rounds < 1 or not 1 <= (n_closest or 1) <= codebook.shape.n_codes:
        raise ValueError(
            f"codes: got rounds = {rounds}, n_closest = {n_closest}, allowed: 1 or more, {codebook.shape.n_codes} codes"
        )
    enrichments: list[Enrichment] = []
    for _ in range(rounds):
        with codebook.without(codes):
            on = [codes_in(hf, tokenizer, codebook, texts, n_closest=n_closest) for texts in (topic, control)]
        enrichment = enriched_codes(
            *on, paired=paired, least_log_ratio=least_log_ratio, false_discovery_rate=false_discovery_rate
        )
        room = None if most_codes is None else most_codes - len(codes)
        new = enrichment.codes[:room]
        enrichments.append(enrichment)
        if not new:
            break
        codes.extend(new)
    if not codes:
        raise NothingFound(
            f"codes: of {enrichments[0].n_tested} none is on {2**least_log_ratio:g} times as often in the topic's "
            "sentences at this false discovery rate; give more sentences, lower least_log_ratio, or count by n_closest"
        )
    return CodeDeletion.of(hf, codes, method="choose_codes", options=options, notes=_notes(enrichments))


def _notes(enrichments: Sequence[Enrichment]) -> dict[str, Any]:
    return {
        "enriched by round": [list(found.codes) for found in enrichments],
        "log2 ratios by round": [[round(value, 4) for value in found.log_ratio] for found in enrichments],
        "q values by round": [[float(f"{value:.3g}") for value in found.q_value] for found in enrichments],
        "sentences": enrichments[0].n_sentences, "codes tested": enrichments[0].n_tested,
    }  # fmt: skip
