"""Edge attribution patching: what each component's output is worth to each later component that reads it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mechunlearn.activations import Change, Place, exact, hooked, last_logits, leaf, untouched
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.html_card import html_card
from mechunlearn.localize.backward_rules import Rule, relevance_rules
from mechunlearn.localize.first_order import SIGN, between, difference, midpoints, run
from mechunlearn.localize.pairs import PairBatch, batches, build_pairs, describe_pairs, fact_means
from mechunlearn.models import Model, NotSupported, block, has_parallel_blocks, oriented, projection_columns

Part = Literal["query", "key", "value"]


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeScores:
    """What each writer's output is worth to each reader. Shapes: per_fact [fact writer reader]."""

    metric: str
    sign: str
    writers: tuple[str, ...]
    """"embed", heads (a5.h2) and MLPs (m3), in the order of layers."""
    readers: tuple[str, ...]
    """Heads' queries (a5.h2.q), keys and values (a5.h2.k; a5.g1.k where several heads share them), MLPs, "logits"."""
    per_fact: Float[np.ndarray, "fact writer reader"]
    """0 where the reader is not after the writer."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    facts_sha256: str = ""
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def values(self) -> Float[np.ndarray, "writer reader"]:
        """Mean over facts."""
        return self.per_fact.mean(axis=0)

    def to_frame(self) -> pd.DataFrame:
        """One row an edge, largest size first: writer, reader, value, standard_error."""
        at = np.argwhere((self.per_fact != 0).any(axis=0))
        error = self.per_fact.std(axis=0, ddof=1) / np.sqrt(len(self.per_fact)) if len(self.per_fact) > 1 else None
        rows = [
            (self.writers[w], self.readers[r], self.values[w, r], float("nan") if error is None else error[w, r])
            for w, r in at
        ]
        frame = pd.DataFrame(rows, columns=pd.Index(["writer", "reader", "value", "standard_error"]))
        return frame.sort_values("value", key=np.abs, ascending=False, ignore_index=True)

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        lines = {
            "metric": self.metric,
            "sign": self.sign,
            "facts": len(self.per_fact),
            "edges": f"{len(frame)}, the largest:",
        }
        rows = frame.head(8).itertuples(index=False, name=None)
        return html_card("edges", lines, [("writer", "reader", "score", "standard error"), *rows])


def edge_attribution_patching(
    model: Model,
    facts: Sequence[Fact],
    *,
    steps: Annotated[int, Field(ge=0)] = 0,
    rules: tuple[Rule, ...] = (),
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    batch_size: Annotated[int, Field(ge=1)] = 8,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> EdgeScores:
    """Estimate with few backward passes what every edge of the graph of heads and MLPs carries.

    score(u -> v) = sum over tokens and d_model of (output of u, clean - corrupt) * d metric / d (input of v), the
    gradient taken on the corrupt run, or averaged on the way from there to the clean run, at the residual stream as v
    reads it: through its norm and, for a head, its own query, key or value projection. A writer's outgoing edges sum to
    its score by attribution patching, or by integrated gradients over inputs.

    Sign and units: logits; positive: the writer's clean output, seen by this reader alone, supports the true answer.
    Grouped-query attention: keys and values are read once for the heads that share them.
    Cost: 2 forward passes, and one forward and backward pass for every step (for one, if there are none).
    Memory: [batch pos writer d_model] in float32 beside the graph, so the default batch is small.

    Args:
        steps: 0 takes the gradient on the corrupt run (EAP); more average it over the middles of so many parts of the
            line between the two runs' embeddings (EAP-IG, over inputs), so that saturation misleads it less.
        rules: local derivatives that are replaced as in `relevance_patching`; without any, gradients are plain.

    Raises:
        ValueError: no facts, fewer than no steps, or a fact that cannot be paired.
        NotSupported: a norm stands between sublayers and the residual stream (Gemma), so that heads do not add up; or a
            norm or an MLP that the rules do not cover.

    Differs from the sources: midpoints in place of EAP-IG's left-hand points; tokens without a partner in the other
        prompt stay as they are in the corrupt run; each head's query, key and value is a reader of its own.
    Source: Syed et al. 2023, arXiv:2310.10348; with steps Hanna et al. 2024, arXiv:2403.17806.
    """
    if model.architecture.attention_write != model.architecture.attention:
        raise NotSupported(
            f"edges: {model.architecture.name} norms what attention writes, so heads do not add up; score components"
        )
    if steps < 0:
        raise ValueError(f"edges: option 'steps': got {steps}, allowed: 0 and up")
    pairs = build_pairs(model, facts, pairs_per_fact=pairs_per_fact, seed=seed)
    heads, kv = range(model.n_heads), range(model.n_kv_heads)
    writers = ["embed"]
    readers: list[str] = []
    for layer in range(model.n_layers):
        shared = "h" if model.n_kv_heads == model.n_heads else "g"
        readers += [f"a{layer}.h{h}.q" for h in heads]
        readers += [f"a{layer}.{shared}{g}.{part}" for part in "kv" for g in kv]
        readers += [f"m{layer}"]
        writers += [*(f"a{layer}.h{h}" for h in heads), f"m{layer}"]
    with untouched(model), relevance_rules(model, rules):
        scored = ((batch, edge_scores(model, batch, steps)) for batch in batches(model, pairs, batch_size))
        per_fact = fact_means(len(facts), scored)
    return EdgeScores(
        metric="logit_diff", sign=SIGN.replace("component's value", "writer's value, as this reader sees it,"),
        writers=tuple(writers), readers=(*readers, "logits"), per_fact=per_fact,
        options={"steps": steps, "rules": list(rules), "pairs_per_fact": pairs_per_fact, "batch_size": batch_size,
                 "seed": seed},
        facts_sha256=hash_facts(facts), notes=describe_pairs(pairs),
    )  # fmt: skip


def edge_scores(model: Model, batch: PairBatch, steps: int = 0) -> Float[Tensor, "batch writer reader"]:
    """Scores of one batch; call inside `untouched`, and inside `relevance_rules` for their gradients."""
    written: list[Place] = [("stream", 0), *((kind, i) for i in range(model.n_layers) for kind in ("head", "mlp"))]
    embedded: list[Tensor] = []
    keep: Change = lambda output: embedded.append(output) or output  # noqa: E731
    clean = run(model, batch, batch.clean, written, gradient=False, change=keep).activations
    corrupt = run(model, batch, batch.corrupt, written, gradient=False, change=keep).activations
    moved = _moved(model, batch, clean, corrupt)
    shares = midpoints(steps) if steps else [0.0]
    total = moved.new_zeros(())
    for share in shares:
        total = total + _edges_at(model, batch, between(batch, embedded[0], embedded[1], share), moved) / len(shares)
    return total


def _moved(
    model: Model, batch: PairBatch, clean: Mapping[Place, Tensor], corrupt: Mapping[Place, Tensor]
) -> Float[Tensor, "batch aligned writer d_model"]:
    """Clean minus corrupt output of all writers, in their order, at the tokens both prompts have."""
    weight = batch.roles.any(dim=2)[..., None]
    by_place = {place: difference(batch, clean[place], corrupt[place]) * weight for place in clean}
    start, n_heads = by_place["stream", 0], model.n_heads
    moved = start.new_empty(*start.shape[:2], 1 + model.n_layers * (n_heads + 1), model.d_model)
    moved[:, :, 0] = start
    for layer in range(model.n_layers):
        after = 1 + layer * (n_heads + 1) + n_heads
        moved[:, :, after - n_heads : after] = _heads(model, layer, by_place["head", layer])
        moved[:, :, after] = by_place["mlp", layer]
    return moved


def _edges_at(
    model: Model,
    batch: PairBatch,
    embedded: Float[Tensor, "batch corrupt_pos width"],
    moved: Float[Tensor, "batch aligned writer d_model"],
) -> Float[Tensor, "batch writer reader"]:
    """What every writer's difference is worth to every reader where the corrupt prompt has these embeddings."""
    n, n_heads, parallel = model.n_layers, model.n_heads, has_parallel_blocks(model)
    with ExitStack() as stack, torch.enable_grad():
        taps = [_tap(model, layer, stack) for layer in range(n)]
        start: Change = lambda _: leaf(embedded)  # noqa: E731
        seen = stack.enter_context(hooked(model, record=[("block", n - 1)], change_embedding=start))
        metric = batch.logit_diff(last_logits(model, batch.corrupt))
        wanted = [tensor for tap in taps for tensor in tap.outputs.values()]
        *found, end = torch.autograd.grad(metric.sum(), [*wanted, seen["block", n - 1]])
    gradients = iter(found)
    columns: list[Tensor] = []
    for layer, tap in enumerate(taps):
        before = 1 + layer * (n_heads + 1)
        after = before + n_heads
        at = {name: exact(batch.take(next(gradients), batch.corrupt_positions)) for name in tap.outputs}
        wanted_of_heads = _attention_inputs(model, layer, at)
        columns.append(_read(model, batch, tap, moved[:, :, :before], wanted_of_heads, "attention_norm"))
        seen_by_mlp = moved[:, :, : before if parallel else after]
        columns.append(_read(model, batch, tap, seen_by_mlp, at["mlp_norm"][None], "mlp_norm"))
    last = exact(batch.take(end, batch.corrupt_positions))
    columns.append(torch.einsum("bawd,bad->bw", moved, last)[:, :, None])
    n_writers = moved.shape[2]
    return torch.cat([nn.functional.pad(c, (0, 0, 0, n_writers - c.shape[1])) for c in columns], dim=2)


@dataclass(frozen=True, kw_only=True)
class _Tap:
    """What one block reads: inputs of its two norms, and the outputs whose gradients say what readers want."""

    layer: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def _tap(model: Model, layer: int, stack: ExitStack) -> _Tap:
    tap = _Tap(layer=layer, inputs={}, outputs={})
    architecture = model.architecture

    def watch(name: str, *, with_input: bool) -> None:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            tap.outputs[name] = output
            if with_input:
                tap.inputs[name] = inputs[0].detach()

        path = getattr(architecture, name)
        stack.callback(block(model, layer).get_submodule(path).register_forward_hook(hook).remove)

    for name in dict.fromkeys(_projections(model)):
        watch(name, with_input=False)
    watch("mlp_norm", with_input=True)

    def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tap.inputs["attention_norm"] = inputs[0].detach()

    norm = block(model, layer).get_submodule(architecture.attention_norm)
    stack.callback(norm.register_forward_pre_hook(note).remove)
    return tap


def _projections(model: Model) -> tuple[Part, ...]:
    return ("query", "key", "value") if model.architecture.layout == "separate" else ("query",)


def _attention_inputs(model: Model, layer: int, at: dict[str, Tensor]) -> Float[Tensor, "reader batch pos d_model"]:
    """What each head's queries, keys and values want of the norm's output: their gradient through their own weights."""
    architecture = model.architecture
    wanted: list[Tensor] = []
    counts: dict[Part, int] = {"query": model.n_heads, "key": model.n_kv_heads, "value": model.n_kv_heads}
    for part, count in counts.items():
        name = f"{architecture.blocks}.{layer}.{getattr(architecture, part)}.weight"
        weight = exact(oriented(model, name, model.hf.get_parameter(name).detach()))
        gradient = at[part if architecture.layout == "separate" else "query"]
        for head in range(count):
            columns = projection_columns(model, part, head)
            wanted.append(gradient[..., columns] @ weight[columns])
    return torch.stack(wanted)


def _heads(model: Model, layer: int, moved: Float[Tensor, "batch aligned width"]) -> Tensor:
    """What every head writes: its part of z through its part of the output projection, [batch aligned head d_model]."""
    name = f"{model.architecture.blocks}.{layer}.{model.architecture.output}.weight"
    weight = exact(oriented(model, name, model.hf.get_parameter(name).detach()))
    z, of_heads = (tensor.unflatten(-1, (model.n_heads, -1)) for tensor in (moved, weight))
    return torch.einsum("bahe,dhe->bahd", z, of_heads)


def _read(
    model: Model,
    batch: PairBatch,
    tap: _Tap,
    moved: Float[Tensor, "batch aligned writer d_model"],
    wanted: Float[Tensor, "reader batch aligned d_model"],
    norm: str,
) -> Float[Tensor, "batch writer reader"]:
    """Edges from all earlier writers to the readers behind one norm."""
    module = block(model, tap.layer).get_submodule(getattr(model.architecture, norm))
    x = batch.take(tap.inputs[norm], batch.corrupt_positions)
    pull = torch.func.vjp(module, x)[1]  # the module and not its forward, for a backward rule is a hook of it
    (at_stream,) = torch.vmap(pull)(wanted.to(x.dtype))
    return torch.einsum("bawd,rbad->bwr", moved, exact(at_stream))
