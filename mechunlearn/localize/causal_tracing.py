"""Causal tracing: corrupt the subject, give a few layers their own values back, see how much of the fact returns."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import Change, Place, exact, place_of, untouched
from mechunlearn.components import ROLES, ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.kinds import each_once
from mechunlearn.localize.pairs import Pair, PairBatch, batches, build_pairs, describe_pairs, to_batch
from mechunlearn.localize.patching import Exchange, exchange
from mechunlearn.localize.scoring import RoleGroup, exact_scores, whole
from mechunlearn.models import Model, all_components, embedding


@LOCALIZERS.register(
    "causal_tracing", source="Meng et al. 2022, arXiv:2202.05262; Zhang & Nanda 2023, arXiv:2309.16042"
)
def causal_tracing(
    model: Model,
    facts: Sequence[Fact],
    *,
    corruption: Literal["replacement", "noise"] = "replacement",
    metric: Literal["logit_diff", "probability"] = "logit_diff",
    kinds: tuple[Literal["mlp", "attention"], ...] = ("mlp", "attention"),
    roles: tuple[RoleGroup, ...] = ROLES,
    window: Annotated[int, Field(ge=1)] = 3,
    noise: Annotated[float, Field(ge=0)] = 3.0,
    draws: Annotated[int, Field(ge=1)] = 10,
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Restore a window of layers in a run whose subject is corrupted: how much of the metric comes back?

    score(c, role) = m(corrupted run with the clean outputs of c's kind in the `window` layers around c at the role's
    tokens) - m(corrupted run), averaged over a fact's pairs, or draws of noise.

    Shapes: [fact component role].
    Sign and units: logits, or probability in [-1, 1]. Positive: the layers' values on the fact's own run support the
        true answer. Exact, but windows overlap, so neighbouring layers are not told apart and effects do not add up.

    Args:
        corruption: "replacement": another subject's tokens, as in `activation_patching`; "noise": Gaussian noise on the
            embeddings of the subject's tokens, the same draws for every fact and component.
        metric: logit(true answer) - logit(donor's answer), or P(true answer), at the first token where they differ.
        window: the layers [l - window // 2, l + (window + 1) // 2) are restored together; 1 is a single layer.
        noise: standard deviation of the noise, in standard deviations of all entries of the facts' subject embeddings.
        draws: draws of noise.
        batch_size: pairs (with noise: pairs x draws) recorded at once, and half the changed runs at once.

    Raises:
        ValueError: no facts, no or repeated kinds or roles, or a fact that cannot be paired.

    Differs from the source: by default the subject is replaced (noise takes a model off its distribution, Zhang &
        Nanda) and 3 layers are restored; Meng et al. use noise, P(answer) and 10 layers of 48, and trace single tokens.
    Source: Meng et al. 2022, arXiv:2202.05262, section 2.1 and appendix B; Zhang & Nanda 2023, arXiv:2309.16042.
    """
    each_once("causal_tracing", kinds=kinds, roles=roles)
    pairs = build_pairs(model, facts, pairs_per_fact=pairs_per_fact, seed=seed)
    components = all_components(model, kinds)
    places = [place_of(component) for component in components]
    notes: dict[str, float | int] = {**describe_pairs(pairs)}
    with untouched(model), torch.no_grad():
        if corruption == "replacement":
            prepared = (exchange(model, batch, places, restore=True) for batch in batches(model, pairs, batch_size))
        else:
            notes["noise_standard_deviation"] = noise * subject_embedding_std(model, pairs)
            prepared = _noised(model, pairs, places, notes["noise_standard_deviation"], draws, batch_size, seed)
        per_fact, means = exact_scores(
            model, len(facts), prepared, components, roles, metric=metric, batch_size=2 * batch_size, window=window
        )
    return ComponentScores(
        method="causal_tracing",
        metric=metric,
        sign=f"{'logits' if metric == 'logit_diff' else 'probability'} restored; positive: the values of the layers "
        "around the component on the fact's own run support the true answer",
        components=components,
        roles=roles,
        per_fact=per_fact,
        options={
            "corruption": corruption,
            "metric": metric,
            "kinds": list(kinds),
            "roles": list(roles),
            "window": window,
            "noise": noise,
            "draws": draws,
            "pairs_per_fact": pairs_per_fact,
            "batch_size": batch_size,
            "seed": seed,
        },
        facts_sha256=hash_facts(facts),
        notes={**notes, **means},
    )


def subject_embedding_std(model: Model, pairs: Sequence[Pair]) -> float:
    """Standard deviation over all entries of the embeddings of every fact's subject tokens."""
    clean = {pair.fact: pair for pair in pairs}.values()
    ids = [pair.clean[position] for pair in clean for position in pair.subject]
    return exact(embedding(model)(torch.tensor(ids, device=model.device))).std().item()


def _noised(
    model: Model,
    pairs: Sequence[Pair],
    places: Sequence[Place],
    standard_deviation: float,
    draws: int,
    batch_size: int,
    seed: int,
) -> Iterator[Exchange]:
    """Batches whose corrupt runs are the clean prompts with noise, every pair once a draw."""
    longest = max(len(pair.subject) for pair in pairs)
    # token first: then a longer subject elsewhere does not change what shorter ones get
    drawn = np.random.default_rng(seed).standard_normal((longest, draws, model.d_model)) * standard_deviation
    ordered = sorted(map(whole, pairs), key=lambda pair: len(pair.clean))
    size = max(1, batch_size // draws)
    for start in range(0, len(ordered), size):
        batch = to_batch(model, [pair for pair in ordered[start : start + size] for _ in range(draws)])
        added = _placed(batch, torch.tensor(drawn, device=model.device, dtype=model.dtype))
        yield exchange(model, batch, places, restore=True, embed=_plus(added))


def _placed(batch: PairBatch, drawn: Float[Tensor, "token draw d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """The noise at the subjects' tokens; row i of the batch has draw i modulo the number of draws."""
    added = drawn.new_zeros(*batch.clean.ids.shape, drawn.shape[2])
    for row, pair in enumerate(batch.pairs):
        added[row, list(pair.subject)] = drawn[: len(pair.subject), row % drawn.shape[1]]
    return added


def _plus(added: Tensor) -> Change:
    return lambda output: output + added
