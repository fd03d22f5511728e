"""Logit lens: how much closer to the true answer each sublayer brings what the stream says."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import exact, hooked, last_logits, stream_places, streams, untouched
from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.pairs import PairBatch, batches, build_pairs, describe_pairs
from mechunlearn.models import Model, all_components, has_parallel_blocks

LensMetric = Literal["log_prob", "logit_diff"]
_ROLES = ("subject_last", "last")


@LOCALIZERS.register("logit_lens", source="nostalgebraist 2020, lesswrong.com/posts/AcKRB8wDpdaN6v6ru")
def logit_lens(
    model: Model,
    facts: Sequence[Fact],
    *,
    metric: LensMetric = "log_prob",
    units: Literal["sublayer", "block"] = "sublayer",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Score a sublayer by how much further the stream after it says the true answer than the stream before it.

    score(c) = reading(stream after c) - reading(stream before c), where the stream is read through the model's own
    final norm and unembedding, at the subject's last token and at the prompt's last token. The scores of all components
    at the last token sum to the model's own metric minus the embedding's reading.

    Shapes: the result is [fact component role], roles "subject_last" and "last" (0 where the prompt ends with its
        subject: that token is then "subject_last").
    Sign and units: nats (log_prob) or logits. Positive: the sublayer brings the stream towards the true answer.

    Args:
        metric: "log_prob": log P(true answer) among the fact's candidates; "logit_diff": logit(true) - logit(answer of
            another subject), see `pairs.build_pairs`. Both at the first token where the answers differ.
        units: "block" scores blocks, credited to their MLPs. So do parallel blocks (GPT-NeoX) always, whose sublayers
            read the same stream; the notes say which was scored.
        seed: of the donors, which fix the answers that are compared.

    Returns:
        Scores whose notes hold `readings`: the mean reading by stream (embedding first), at each role.

    Raises:
        ValueError: no facts, or a fact that cannot be paired.

    Differs from the source: candidates instead of the whole vocabulary; gains instead of levels.
    Source: nostalgebraist 2020; reading: TransformerLens' `logit_readout`.
    """
    mid = units == "sublayer" and not has_parallel_blocks(model)
    components = all_components(model, ("attention", "mlp") if mid else ("mlp",))
    pairs = build_pairs(model, facts, seed=seed)
    readings = np.zeros((len(facts), len(components) + 1, len(_ROLES)))
    with untouched(model), torch.no_grad():
        for batch in batches(model, pairs, batch_size):
            found = lens_readings(model, batch, metric, mid=mid)
            readings[[pair.fact for pair in batch.pairs]] = found.double().cpu().numpy()
    return ComponentScores(
        method="logit_lens",
        metric=metric,
        sign="gain of the metric over the component; positive: it brings the stream towards the true answer",
        components=components,
        roles=_ROLES,
        per_fact=np.diff(readings, axis=1),
        options={"metric": metric, "units": units, "batch_size": batch_size, "seed": seed},
        facts_sha256=hash_facts(facts),
        notes={
            **describe_pairs(pairs),
            "scored": "sublayers" if mid else "blocks",
            "readings": {role: readings[:, :, i].mean(axis=0).tolist() for i, role in enumerate(_ROLES)},
        },
    )


def lens_readings(
    model: Model, batch: PairBatch, metric: LensMetric, *, mid: bool
) -> Float[Tensor, "batch stream role"]:
    """What the streams say at the subject's last and at the last token; call inside `untouched`.

    Streams are those of `activations.streams`, the one before the first block first. Where the prompt ends with its
    subject, the reading at "last" is 0.
    """
    from transformer_lens.tools.analysis import logit_readout

    rows = torch.arange(len(batch.pairs), device=model.device)
    subject = torch.tensor([max(pair.subject) for pair in batch.pairs], device=model.device)
    positions = torch.stack([subject, batch.clean.last], dim=1)
    with hooked(model, record=stream_places(model, mid=mid)) as seen:
        last_logits(model, batch.clean)
    read = torch.stack([s[rows[:, None], positions] for s in streams(model, seen, mid=mid)], dim=1)
    listed = [*pair_tokens(batch)]
    vocab = sorted({token for tokens in listed for token in tokens})
    logits = exact(logit_readout(model.bridge, read, vocab=vocab).values)
    column = {token: i for i, token in enumerate(vocab)}
    answer, other = (
        torch.tensor([column[int(token)] for token in tokens], device=model.device)
        for tokens in (batch.answer, batch.counterfactual)
    )
    if metric == "logit_diff":
        found = logits[rows, :, :, answer] - logits[rows, :, :, other]
    else:
        rival = torch.zeros(len(rows), len(vocab), dtype=torch.bool, device=model.device)
        for row, tokens in enumerate(listed):
            rival[row, [column[token] for token in tokens]] = True
        found = logits.masked_fill(~rival[:, None, None], -torch.inf).log_softmax(dim=-1)[rows, :, :, answer]
    return found * torch.stack([torch.ones_like(subject), subject != batch.clean.last], dim=1)[:, None]


def pair_tokens(batch: PairBatch) -> list[list[int]]:
    """The tokens that compete for each pair's answer."""
    return [list(dict.fromkeys((*pair.candidates, pair.answer, pair.counterfactual))) for pair in batch.pairs]
