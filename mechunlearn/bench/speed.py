"""What localizing costs against what it must cost: ratios of times and of memory, measured side by side."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
import transformers
from torch import Tensor

from mechunlearn.activations import Place, hooked, last_logits, leaf, place_of, untouched
from mechunlearn.bench.memory import peak_bytes
from mechunlearn.components import ROLES
from mechunlearn.localize.first_order import first_order_scores
from mechunlearn.localize.integrated_gradients import over_inputs
from mechunlearn.localize.pairs import Pair, PairBatch, to_batch
from mechunlearn.localize.patching import component_effects, exchange
from mechunlearn.localize.scoring import measure_of
from mechunlearn.localize.streamed import block_again, block_inputs, streamed_scores
from mechunlearn.models import Model, all_components, wrap_model


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model with random weights, and how many prompts of how many tokens it is given."""

    name: str
    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    d_vocab: int
    batch: int = 8
    tokens: int = 32


_7B = Size(name="llama-7b", family="llama", n_layers=32, d_model=4096, n_heads=32, n_kv_heads=32, d_mlp=11008,
           d_vocab=32000)  # fmt: skip
_SIZES = (
    Size(name="llama-8x128", family="llama", n_layers=8, d_model=128, n_heads=4, n_kv_heads=4, d_mlp=384, d_vocab=1699),
    Size(name="llama-4x256", family="llama", n_layers=4, d_model=256, n_heads=4, n_kv_heads=4, d_mlp=768, d_vocab=5000),
    Size(name="gpt2-12x768", family="gpt2", n_layers=12, d_model=768, n_heads=12, n_kv_heads=12, d_mlp=3072,
         d_vocab=50257),
    Size(name="llama-12x768", family="llama", n_layers=12, d_model=768, n_heads=12, n_kv_heads=4, d_mlp=2048,
         d_vocab=32000),
    _7B,
    replace(_7B, name="llama-7b-one-prompt", batch=1),
)  # fmt: skip
SIZES: Mapping[str, Size] = {size.name: size for size in _SIZES}


def random_model(size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """A seeded model of that size that has learnt nothing; costs do not depend on what weights say.

    Raises:
        ValueError: a family other than llama and gpt2.
    """
    shared: dict[str, Any] = {"vocab_size": size.d_vocab, "bos_token_id": 0, "eos_token_id": 0}
    if size.family == "llama":
        config: transformers.PretrainedConfig = transformers.LlamaConfig(
            **shared, hidden_size=size.d_model, intermediate_size=size.d_mlp, num_hidden_layers=size.n_layers,
            num_attention_heads=size.n_heads, num_key_value_heads=size.n_kv_heads, max_position_embeddings=512,
        )  # fmt: skip
    elif size.family == "gpt2":
        config = transformers.GPT2Config(
            **shared, n_embd=size.d_model, n_layer=size.n_layers, n_head=size.n_heads, n_inner=size.d_mlp,
            n_positions=512,
        )  # fmt: skip
    else:
        raise ValueError(f"bench speed: got family {size.family!r}, allowed: llama, gpt2")
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return wrap_model(hf, name=size.name)


def random_batch(model: Model, size: Size) -> PairBatch:
    """Pairs of random tokens of one length and one answer, as TransformerLens needs them to be compared."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, size.d_vocab, (2 * size.batch, size.tokens), generator=generator).tolist()
    first, last = ROLES.index("subject_first"), ROLES.index("last")
    roles = [first, *[ROLES.index("between")] * (size.tokens - 2), last]
    pairs = [
        Pair(fact=i, donor="x", clean=tuple(clean), corrupt=tuple(corrupt), answer=0, counterfactual=1,
             candidates=(1, 0), subject=(0,), end=size.tokens - 1,
             aligned=tuple((p, p, role) for p, role in enumerate(roles)))
        for i, (clean, corrupt) in enumerate(zip(tokens[: size.batch], tokens[size.batch :], strict=True))
    ]  # fmt: skip
    return to_batch(model, pairs)


def bench_speed(
    sizes: Sequence[str] = ("llama-4x256", "gpt2-12x768"), *, device: str = "cpu", dtype: torch.dtype = torch.float32,
    rounds: int = 5, memory_only: bool = False,
    on_progress: Callable[[str, float, float], None] = lambda text, done, total: None,
) -> pd.DataFrame:  # fmt: skip
    """Time and peak memory of first-order localizers over their floors; rounds go through all, so that noise hits all.

    The floor is one forward pass without gradients and one with, and its backward pass by activations alone, of the
    bare Hugging Face model. Times are medians over rounds of the ratio within a round.

    Args:
        sizes: names of `SIZES`.
        rounds: of all measurements but exact patching, which is measured once.
        memory_only: the streamed mode's memory and nothing else, for models that are too slow here for the rest.

    Returns:
        One row per size and measurement: size, what, ratio, against, goal ("<= 1.10"), met. "streamed, GB with the
        weights" is no ratio: what the streamed mode holds at its worst moment, weights included.

    Raises:
        ValueError: an unknown size.
    """
    if unknown := [name for name in sizes if name not in SIZES]:
        raise ValueError(f"bench speed: got size {unknown[0]!r}, allowed: {', '.join(SIZES)}")
    rows: list[tuple[str, str, float, str, str, bool]] = []
    for done, name in enumerate(sizes):
        on_progress(f"measuring {name}", done, len(sizes))
        model = random_model(SIZES[name], device=device, dtype=dtype)
        batch = random_batch(model, SIZES[name])
        with untouched(model):
            found = streamed_memory(model, batch)
            if not memory_only:
                found = measured_ratios(model, batch, rounds) | found
        rows += [
            (name, what, ratio, against, f"{sense} {goal:.2f}", ratio <= goal if sense == "<=" else ratio >= goal)
            for what, (ratio, against, sense, goal) in found.items()
        ]
    return pd.DataFrame(rows, columns=pd.Index(["size", "what", "ratio", "against", "goal", "met"]))


def measured_ratios(model: Model, batch: PairBatch, rounds: int) -> dict[str, tuple[float, str, str, float]]:
    """Times over their floors, and memory over the floor's: ratio, against, sense and goal by what was measured."""
    seconds = times(tasks(model, batch), rounds, model.device)
    patching = exact_patching_ratio(model, batch)
    return {
        "attribution patching, time": (_ratio(seconds, "AtP", "floor"), "floor", "<=", 1.10),
        "TransformerLens, time": (_ratio(seconds, "TransformerLens", "AtP"), "attribution patching", ">=", 5.0),
        "integrated gradients (5), time": (_ratio(seconds, "IG-5", "IG floor"), "12-forward floor", "<=", 1.10),
        "neurons, time": (_ratio(seconds, "neurons", "AtP"), "attribution patching", "<=", 1.25),
        "streamed, time": (_ratio(seconds, "streamed", "forward"), "one forward", "<=", 5.0),
        "cells x forward, time": (patching, "exact patching of MLPs by position", ">=", 3.5),
        "attribution patching, memory": (memory_ratio(model, batch), "floor and clean cache", "<=", 1.05),
    }


def tasks(model: Model, batch: PairBatch) -> dict[str, Callable[[], object]]:
    """What is measured, by name; call inside `untouched`."""
    components = all_components(model, ("mlp", "head"))
    neurons = all_components(model, ("mlp", "neuron"))
    return {
        "forward": lambda: forward(model, batch),
        "floor": lambda: (forward(model, batch), forward_backward(model, batch)),
        "IG floor": lambda: (forward(model, batch), forward(model, batch),
                             [forward_backward(model, batch) for _ in range(5)]),
        "AtP": lambda: first_order_scores(model, batch, components, "denoise"),
        "neurons": lambda: first_order_scores(model, batch, neurons, "denoise"),
        "IG-5": lambda: over_inputs(model, batch, components, 5),
        "streamed": lambda: streamed_scores(model, batch, components, "denoise"),
        "TransformerLens": lambda: transformer_lens_scores(model, batch),
    }  # fmt: skip


def times(
    measured: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of every task in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for count in range(rounds + 1):
        for name, task in measured.items():
            _wait(device)
            started = time.perf_counter()
            task()
            _wait(device)
            if count:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def forward(model: Model, batch: PairBatch) -> Tensor:
    """One forward pass without gradients."""
    with torch.no_grad():
        return last_logits(model, batch.clean)


def forward_backward(model: Model, batch: PairBatch) -> Tensor:
    """One forward pass and its backward pass down to the first block's input; no parameter has a gradient."""
    with torch.enable_grad(), hooked(model, record=[("stream", 0)], change_embedding=leaf) as seen:
        metric = batch.logit_diff(last_logits(model, batch.corrupt)).sum()
        return torch.autograd.grad(metric, seen["stream", 0])[0]


def memory_ratio(model: Model, batch: PairBatch) -> float:
    """Attribution patching's peak over the floor's with the clean run's MLPs and heads; call inside `untouched`."""
    named = tasks(model, batch)
    floor, patching = (peak_bytes(named[what], model.device) for what in ("floor", "AtP"))
    stream = _stream_bytes(model, batch)
    return patching / (floor + model.n_layers * (stream + stream // model.d_model * model.n_heads * model.d_head))


def streamed_memory(model: Model, batch: PairBatch) -> dict[str, tuple[float, str, str, float]]:
    """The streamed mode's peak over what it must hold, and in GB with the weights; call inside `untouched`."""
    peak = peak_bytes(tasks(model, batch)["streamed"], model.device)
    one = block_inputs(model, batch, batch.corrupt)
    places: list[Place] = [("mlp", 0), ("head", 0)]
    gradient = torch.ones_like(one.calls[0][0])
    block = peak_bytes(lambda: block_again(model, one, 0, places, gradient), model.device)
    streams = 2 * (model.n_layers + 1) * _stream_bytes(model, batch) + block
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters())
    return {
        "streamed, memory": (peak / streams, "2 (L + 1) streams and a block", "<=", 1.05),
        "streamed, GB with the weights": ((weights + peak) / 1e9, "a 24 GB card", "<=", 24.0),
    }


def _stream_bytes(model: Model, batch: PairBatch) -> int:
    return batch.clean.ids.numel() * model.d_model * model.dtype.itemsize


def transformer_lens_scores(model: Model, batch: PairBatch) -> object:
    """TransformerLens's own attribution patching of the batch."""
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    answer, other = int(batch.answer[0]), int(batch.counterfactual[0])
    flags = [parameter.requires_grad_(True) for parameter in model.hf.parameters()]
    try:
        return attribution_patch(
            model.bridge, batch.clean.ids, batch.corrupt.ids,
            lambda logits: (logits[:, -1, answer] - logits[:, -1, other]).mean(),
        )  # fmt: skip
    finally:
        for parameter in flags:
            parameter.requires_grad_(False)


def exact_patching_ratio(model: Model, batch: PairBatch) -> float:
    """Seconds of as many forward passes as there are cells (layer x position) over those of patching all MLPs there."""
    selected = torch.eye(batch.roles.shape[1], dtype=torch.bool, device=model.device)[:, None] & batch.roles.any(dim=2)
    components = all_components(model, ("mlp",))

    def patch() -> None:
        with torch.no_grad():
            given = exchange(model, batch, [place_of(component) for component in components], restore=True)
            component_effects(model, given, components, selected, measure_of(batch, "logit_diff"))

    patching = times({"patching": patch}, 1, model.device)["patching"][0]
    one = statistics.median(times({"forward": lambda: forward(model, batch)}, 9, model.device)["forward"])
    return len(components) * len(selected) * one / patching


def _ratio(seconds: Mapping[str, Sequence[float]], what: str, against: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[what], seconds[against], strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
