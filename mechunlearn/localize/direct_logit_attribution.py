"""Direct logit attribution: what each component's write at the last token adds to the answer's logit by itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import Place, PlaceKind, exact, hooked, last_logits, untouched
from mechunlearn.bridge import build_bridge
from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.kinds import components_of
from mechunlearn.localize.pairs import PairBatch, batches, build_pairs, describe_pairs
from mechunlearn.models import Model, NotSupported

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DirectKind = Literal["mlp", "attention", "head"]


@LOCALIZERS.register("direct_logit_attribution", source="Elhage et al. 2021; Wang et al. 2022, arXiv:2211.00593")
def direct_logit_attribution(
    model: Model,
    facts: Sequence[Fact],
    *,
    kinds: tuple[DirectKind, ...] = ("mlp", "attention"),
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Split the final logit difference into the parts that the sublayers (or heads) write at the last token.

    score(c) = (write of c, centred where the final norm centres, / the final norm's scale on this run) . (gain *
    (W_U[true] - W_U[other])), other being another subject's answer, see `pairs.build_pairs`. What all of them lack of
    the logit difference is the embedding's part and the biases of the final norm and the unembedding.

    Shapes: the result is [fact component 1], role "last".
    Sign and units: logits (before Gemma 2's soft cap). Positive: the write speaks for the true answer. Direct effects
        alone: what later components make of the write counts as theirs, so a lookup at the subject is not seen here.

    Args:
        kinds: "head": heads without the output projection's bias.
        seed: of the donors, which fix the answers that are compared.

    Returns:
        Scores whose notes hold the means of the `embedding`'s and the `bias`es' part; with all sublayers' scores they
        sum to the mean logit difference.

    Raises:
        NotSupported: heads of an architecture with a norm between heads and stream (Gemma).
        ValueError: no facts, no kinds, or a fact that cannot be paired.

    Differs from the source: as TransformerLens' `direct_logit_attribution`, on the Hugging Face model's own run and
        with the final norm's gain taken into the unembedding. TransformerLens asks for compatibility mode, which would
        rewrite the model's weights.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022, arXiv:2211.00593.
    """
    components = components_of(model, "direct_logit_attribution", kinds, ("mlp", "attention", "head"))
    if "head" in kinds and model.architecture.attention_write != model.architecture.attention:
        raise NotSupported(
            f"direct_logit_attribution: heads of {model.architecture.name} have no direct effect of their own, for a "
            "norm stands between them and the stream; take kinds mlp and attention"
        )
    pairs = build_pairs(model, facts, seed=seed)
    per_fact = np.zeros((len(facts), len(components), 1))
    rest: list[list[float]] = []
    with untouched(model), torch.no_grad():
        # a bridge that copies parameters may show weights from before an edit
        bridge = build_bridge(model) if model.copied_parameters else model.bridge
        for batch in batches(model, pairs, batch_size):
            parts, embedding, bias = direct_effects(model, bridge, batch, components)
            per_fact[[pair.fact for pair in batch.pairs], :, 0] = parts.double().cpu().numpy()
            rest += torch.stack([embedding, bias], dim=1).tolist()
    embedding, bias = np.mean(rest, axis=0).tolist()
    return ComponentScores(
        method="direct_logit_attribution",
        metric="logit_diff",
        sign="logits; positive: what the component writes at the last token speaks for the true answer",
        components=components,
        roles=("last",),
        per_fact=per_fact,
        options={"kinds": list(kinds), "batch_size": batch_size, "seed": seed},
        facts_sha256=hash_facts(facts),
        notes={**describe_pairs(pairs), "embedding": embedding, "bias": bias},
    )


def direct_effects(
    model: Model, bridge: "TransformerBridge", batch: PairBatch, components: Sequence[Component]
) -> tuple[Float[Tensor, "batch component"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Direct effects of the components, the embedding's (with positions) and the biases' on each pair's logit_diff."""
    cache = _cache(model, bridge, batch, heads=any(component.kind == "head" for component in components))
    rows = torch.arange(len(batch.pairs), device=model.device)
    unembedding, norm = exact(bridge.W_U), bridge.ln_final
    gain = exact(norm.weight) + (1.0 if getattr(bridge.cfg, "rmsnorm_uses_offset", False) else 0.0)
    towards = (unembedding[:, batch.answer] - unembedding[:, batch.counterfactual]).T
    parts: dict[str, Tensor] = {}
    stacks = [cache.decompose_resid(return_labels=True)]
    if any(component.kind == "head" for component in components):
        stacks.append(cache.stack_head_results(return_labels=True, incl_remainder=False))
    for stack, labels in stacks:
        scaled = exact(cache.apply_ln_to_stack(stack, layer=-1)[:, rows, batch.clean.last])
        parts |= dict(zip(labels, torch.einsum("cbd,bd->cb", scaled, gain * towards), strict=True))
    shift = getattr(norm, "bias", None)
    bias = bridge.b_U[batch.answer] - bridge.b_U[batch.counterfactual]
    bias = exact(bias) + (towards @ exact(shift) if isinstance(shift, Tensor) else 0.0)
    embedding = parts["embed"] + parts.get("pos_embed", torch.zeros_like(bias))
    return torch.stack([parts[_label(component)] for component in components], dim=1), embedding, bias


def _cache(model: Model, bridge: "TransformerBridge", batch: PairBatch, *, heads: bool) -> Any:
    """TransformerLens' cache of the clean run, filled from the Hugging Face model's.

    The bridge's own run computes attention patterns in float32 whatever the weights' dtype.
    """
    from transformer_lens import ActivationCache

    last = model.n_layers - 1
    kinds: dict[PlaceKind, str] = {"attention": "hook_attn_out", "mlp": "hook_mlp_out"}
    if heads:
        kinds["head"] = "attn.hook_z"
    names: dict[Place, str] = {
        (kind, layer): f"blocks.{layer}.{hook}" for layer in range(model.n_layers) for kind, hook in kinds.items()
    }
    with hooked(model, record=[("stream", 0), ("block", last), *names]) as seen:
        last_logits(model, batch.clean)
    end = exact(seen["block", last])
    if bridge.cfg.normalization_type in ("LN", "LNPre"):
        end = end - end.mean(-1, keepdim=True)
    scale = (end.pow(2).mean(-1, keepdim=True) + bridge.cfg.eps).sqrt()
    cached = {name: seen[place] for place, name in names.items()}
    for layer in range(model.n_layers if heads else 0):
        z = f"blocks.{layer}.attn.hook_z"
        cached[z] = cached[z].unflatten(-1, (model.n_heads, -1))
    embedding = seen["stream", 0]
    embeddings = {"hook_embed": embedding, "hook_pos_embed": torch.zeros_like(embedding)}
    return ActivationCache({**embeddings, **cached, "ln_final.hook_scale": scale}, bridge)


def _label(component: Component) -> str:
    """TransformerLens' name of a component's write."""
    if component.kind == "head":
        return f"L{component.layer}H{component.index}"
    return f"{component.layer}_{'mlp' if component.kind == 'mlp' else 'attn'}_out"
