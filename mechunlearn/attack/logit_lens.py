"""Logit lens: read the answers off every layer with the model's own unembedding."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import Place, exact, hooked, last_logits, pad, untouched
from mechunlearn.attack import ATTACKS
from mechunlearn.attack.results import AttackResult, Health, fact_rows
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model, final_norm, unembedding
from mechunlearn.prompts import candidates, encode_answers, token_roles

Stream = Literal["block", "attention", "mlp"]
LensSite = Literal["last", "subject_last"]


@ATTACKS.register(
    "logit_lens",
    source="nostalgebraist 2020, lesswrong.com/posts/AcKRB8wDpdaN6v6ru; Patil et al. 2023, arXiv:2309.17410; "
    "Lucki et al. 2024, arXiv:2409.18025",
)
def logit_lens(
    model: Model,
    split: FactSplit,
    *,
    streams: Annotated[Sequence[Stream], Field(min_length=1)] = ("block", "attention", "mlp"),
    sites: Annotated[Sequence[LensSite], Field(min_length=1)] = ("last", "subject_last"),
    drop_targets: bool = False,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    seed: int = 0,
) -> AttackResult:
    """Decode every layer through the final norm and the unembedding; the best place on `attack_dev` counts.

    P(candidate) is the softmax over the first tokens of the fact's candidates, see `lens_scores`. Stream, site and
    layer are chosen once for all facts, by the mean P(true | candidates) on the dev facts. Nothing is trained and the
    model is not changed. Settings are named "block last layer 3": what the third block, counted from 1, left in the
    residual stream; "attention" and "mlp" are what that block's sublayers added to it (a2 and m2).

    Args:
        streams: the residual stream after each block, and the writes of its sublayers.
        sites: the prompt's last token, the subject's last token.
        drop_targets: leave `target_new` out of the candidates (for injections, on edited model and twin alike).
        batch_size: prompts a forward pass.
        seed: recorded only; nothing is drawn.

    Returns:
        Rows of the hidden facts for every place (`setting`), step 0. `notes`: dev_p_true by place; shared_first_token,
        the share of hidden facts whose true answer cannot be told from another candidate by its first token.

    Raises:
        ValueError: the dev or the hidden part is empty, or a fact has fewer than two candidates.

    Differs from the sources: answers are scored among candidates, and the place is chosen on a dev part instead of
        reporting the best of all layers (Lucki et al. 2024) or a union over layers (Patil et al. 2023).
    """
    options = {"streams": list(streams), "sites": list(sites), "drop_targets": drop_targets, "batch_size": batch_size}
    if not split.attack_dev:
        raise ValueError("logit_lens: attack_dev is empty; split with a dev part")

    def read(facts: Sequence[Fact]) -> dict[str, pd.DataFrame]:
        return lens_scores(model, facts, streams=streams, sites=sites, drop_targets=drop_targets, batch_size=batch_size)

    dev = {setting: float(scores["p_true"].to_numpy().mean()) for setting, scores in read(split.attack_dev).items()}
    chosen = max(dev, key=lambda setting: dev[setting])
    hidden = split.forget_hidden  # first and only access: everything is chosen
    if not hidden:
        raise ValueError("logit_lens: forget_hidden is empty; there is nothing to recover")
    read_hidden = read(hidden)
    rows = [fact_rows(hidden, s, part="forget_hidden", setting=setting) for setting, s in read_hidden.items()]
    before = score_facts(model, hidden, drop_targets=drop_targets)
    return AttackResult(
        attack="logit_lens",
        access="activations",
        decides=True,
        rows=pd.concat(rows, ignore_index=True),
        before=fact_rows(hidden, before, part="forget_hidden", setting="before"),
        chosen=chosen,
        health=Health(),
        options=options,
        seed=seed,
        model=model.name,
        facts_sha256=split.sha256,
        notes={"dev_p_true": dev, "shared_first_token": float(read_hidden[chosen]["shared"].to_numpy().mean())},
    )


def lens_scores(
    model: Model,
    facts: Sequence[Fact],
    *,
    streams: Sequence[Stream] = ("block",),
    sites: Sequence[LensSite] = ("last", "subject_last"),
    drop_targets: bool = False,
    batch_size: int = 64,
) -> dict[str, pd.DataFrame]:
    """P(true answer | candidates) of each fact's prompt as every place of the model would say it now.

    logits = unembedding(final_norm(h)), softly capped where the model does so; P(first token) is their softmax over
    the different first tokens of the fact's candidates, and candidates that share one get equal parts of it. A lens
    sees one position, hence first tokens alone: where the true answer shares its own it is never `correct`, and its
    p_true is at most 1 / (candidates that share it).

    Sign and units: p_true is in [0, 1], on average over a relation's candidates 1 / n for a place that says nothing.

    Returns:
        By place ("block last layer 1", ...) one row per fact, in their order: p_true, correct, top (the best
        candidate), shared (whether the true answer shares its first token).

    Raises:
        ValueError: a fact has fewer than two candidates.
    """
    among = [candidates(fact, drop_targets=drop_targets) for fact in facts]
    if few := [fact for fact, listed in zip(facts, among, strict=True) if len(listed) < 2]:
        raise ValueError(f"fact {few[0].key}: fewer than two candidate answers, needs 2 or more; give it choices")
    ids = encode_answers(model, (answer for listed in among for answer in listed))
    firsts = [{answer: ids[answer][0] for answer in listed} for listed in among]
    tokens = [list(dict.fromkeys(first.values())) for first in firsts]
    logits = _lens_logits(model, facts, tokens, streams, sites, batch_size)
    return {
        setting: pd.DataFrame([_judged(*row) for row in zip(facts, firsts, tokens, read, strict=True)])
        for setting, read in logits.items()
    }


def _judged(
    fact: Fact, first: dict[str, int], tokens: list[int], logits: Float[np.ndarray, " token"]
) -> dict[str, object]:
    weight = np.exp(logits.astype(np.float64) - logits.max())
    of_token = dict(zip(tokens, weight / weight.sum(), strict=True))
    sharing = {token: sum(other == token for other in first.values()) for token in tokens}
    p = {answer: float(of_token[token] / sharing[token]) for answer, token in first.items()}
    p_true = p.pop(fact.target_true)
    best = max(p, key=lambda answer: p[answer])
    correct = p_true > p[best]
    shared = sharing[first[fact.target_true]] > 1
    return {"p_true": p_true, "correct": correct, "top": fact.target_true if correct else best, "shared": shared}


def _lens_logits(
    model: Model,
    facts: Sequence[Fact],
    tokens: Sequence[Sequence[int]],
    streams: Sequence[Stream],
    sites: Sequence[LensSite],
    batch_size: int,
) -> dict[str, list[Float[np.ndarray, " token"]]]:
    """Each fact's own tokens' logits at every place."""
    prompts = [token_roles(model, fact.ask(fact.prompt), fact.subject) for fact in facts]
    where = [
        {"last": len(ids) - 1, "subject_last": max(i for i, role in enumerate(roles) if role.startswith("subject"))}
        for ids, roles in prompts
    ]
    places: list[Place] = [(stream, layer) for stream in streams for layer in range(model.n_layers)]
    result = {
        f"{stream} {site} layer {layer + 1}": [np.empty(0)] * len(facts) for stream, layer in places for site in sites
    }
    order = sorted(range(len(facts)), key=lambda i: len(prompts[i][0]))
    with untouched(model), torch.no_grad():
        for rows in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
            with hooked(model, record=places) as seen:
                last_logits(model, pad(model, [prompts[i][0] for i in rows]))
            for (stream, layer), site in ((place, site) for place in places for site in sites):
                stream_at = seen[stream, layer][torch.arange(len(rows)), [where[i][site] for i in rows]]
                logits = _unembed(model, stream_at).cpu().numpy()
                for i, read in zip(rows, logits, strict=True):
                    result[f"{stream} {site} layer {layer + 1}"][i] = read[list(tokens[i])]
    return result


def _unembed(model: Model, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """What the model would say if this were its last residual stream; in float32 or better."""
    logits = exact(unembedding(model)(final_norm(model)(stream)))
    cap = getattr(model.hf.config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)
