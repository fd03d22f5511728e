"""What a localized training step costs against a step of ordinary fine-tuning, measured side by side on one batch."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mechunlearn.bench.memory import peak_bytes
from mechunlearn.bench.speed import SIZES, random_model
from mechunlearn.components import Component
from mechunlearn.edit.losses import Loss, Tokens, predict, text_loss
from mechunlearn.edit.training import Forward, Trainable, low_rank_trainable, masked_trainable, train
from mechunlearn.masks import ParameterMask, mask_of
from mechunlearn.models import Model, mlp_neurons, unembedding

BATCH, TOKENS = 32, 32  # a trained editor's rows by default, and about as many tokens as facts and text have
STEPS = 3  # a measurement; the first of them, which fills caches and makes the optimizer's state, does not count
RANK = 8
LEARNING_RATE = 1e-6  # costs do not depend on it

Steps = Callable[[Callable[[int], object]], object]
"""Trains `STEPS` steps and calls back after each."""

FULL = "full fine-tuning"
PLAIN, CACHED = "localized step", "prefix cached"
LOW_RANK, CHECKPOINTED = f"prefix cached, low-rank ({RANK})", "prefix cached, checkpointed"
NEURONS = "prefix cached, a tenth of the neurons"
PREDECESSOR = "all gradients, masked matrices stepped"
GOALS = {PLAIN: 0.75, CACHED: 0.60}
DEFAULT_SIZES = ("llama-8x128", "llama-4x256")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, the MLPs of a quarter of its layers in mid-depth, and a batch of which all tokens are predicted."""

    model: Model
    layers: range
    batch: Tokens

    @classmethod
    def of(cls, model: Model, d_vocab: int) -> "Setting":
        """The setting for a model, with random tokens."""
        n = max(1, model.n_layers // 4)
        first = (model.n_layers - n) // 2
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, d_vocab, (BATCH, TOKENS), generator=generator).to(model.device)
        batch = Tokens(
            ids=ids, is_target=(torch.arange(TOKENS, device=model.device) > 0).expand(BATCH, -1),
            lengths=torch.full((BATCH,), TOKENS), starts=torch.ones(BATCH, dtype=torch.long),
        )  # fmt: skip
        return cls(model=model, layers=range(first, first + n), batch=batch)

    @property
    def mask(self) -> ParameterMask:
        """The MLPs."""
        return mask_of(self.model, [Component("mlp", layer) for layer in self.layers])

    @property
    def neurons(self) -> ParameterMask:
        """Every tenth neuron of these MLPs."""
        chosen = range(0, self.model.d_mlp, 10)
        return mask_of(self.model, [Component("neuron", layer, index) for layer in self.layers for index in chosen])

    @property
    def loss(self) -> Loss:
        """Negative log-likelihood of every token, the same for all methods."""
        return lambda _call, forward: text_loss(*predict(forward, self.batch))


def bench_edit_speed(
    sizes: Sequence[str] = DEFAULT_SIZES, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
    rounds: int = 5, on_progress: Callable[[str, float, float], None] = lambda text, done, total: None,
) -> pd.DataFrame:  # fmt: skip
    """Ways to train over full fine-tuning: time and memory of a step, the optimizer's included.

    Times are CPU seconds on a CPU, which other processes lengthen little, and seconds on a clock elsewhere.

    Args:
        sizes: names of `SIZES`.
        rounds: of all times, method after method, so that noise hits all of them.

    Returns:
        One row per size and method: size; what; time, the median over rounds of the ratio within a round; floor, what
        it would be if nothing but matrix products took time; goal ("<= 0.75", or nothing) and met, of the time; held,
        bytes of gradients and optimizer state; trained, the number of entries trained; peak, the most memory at once
        beyond the model's weights. All but the floor and the goal are ratios to full fine-tuning's.

    Raises:
        ValueError: an unknown size.
    """
    if unknown := [name for name in sizes if name not in SIZES]:
        raise ValueError(f"bench edit-speed: got size {unknown[0]!r}, allowed: {', '.join(SIZES)}")
    tables: list[pd.DataFrame] = []
    for done, name in enumerate(sizes):
        setting = Setting.of(random_model(SIZES[name], device=device, dtype=dtype), SIZES[name].d_vocab)

        def report(text: str, share: float, done: int = done, name: str = name) -> None:
            on_progress(f"{name}: {text}", done + share, len(sizes))

        table = compared(setting, rounds, report)
        table.insert(0, "size", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def compared(setting: Setting, rounds: int, on_progress: Callable[[str, float], None]) -> pd.DataFrame:
    """Every method but full fine-tuning, in a row each."""
    ways, device = methods(setting), setting.model.device
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for count in range(rounds):
        on_progress(f"round {count + 1} of {rounds}", count / (rounds + 1))
        for name, steps in ways.items():
            seconds[name].append(seconds_a_step(steps, device))
    on_progress("memory", rounds / (rounds + 1))
    sizes = {name: held_and_trained(setting.model, steps) for name, steps in ways.items()}
    peak = {name: peak_bytes(lambda steps=steps: steps(lambda _: None), device) for name, steps in ways.items()}
    rows: list[dict[str, Any]] = []
    for name, floor in floors(setting).items():
        time = statistics.median(a / b for a, b in zip(seconds[name], seconds[FULL], strict=True))
        goal = GOALS.get(name)
        held, trained = (own / whole for own, whole in zip(sizes[name], sizes[FULL], strict=True))
        rows.append({
            "what": name, "time": time, "floor": floor, "goal": "" if goal is None else f"<= {goal:.2f}",
            "met": "" if goal is None else time <= goal, "held": held, "trained": trained,
            "peak": peak[name] / peak[FULL],
        })  # fmt: skip
    return pd.DataFrame(rows)


def floors(setting: Setting) -> dict[str, float]:
    """Multiplications of matrices by method, over those of full fine-tuning; attention scores are left out.

    A forward pass takes one per entry and token, the gradient of a matrix's input another, that of its entries a third.
    In the earliest trained block only the output matrix of the MLP needs the second.
    """
    model, first = setting.model, setting.layers[0]
    attention, mlp = (mask_of(model, [Component(kind, first)]).n_selected for kind in ("attention", "mlp"))
    head, out = (module.get_parameter("weight").numel() for module in (unembedding(model), mlp_neurons(model, first)))
    block, above = attention + mlp, model.n_layers - first - 1
    full = 3 * (model.n_layers * block + head)
    plain = model.n_layers * block + head + (above * block + head + out) + len(setting.layers) * mlp
    cached = plain - first * block
    counts = {PLAIN: plain, CACHED: cached, LOW_RANK: cached, CHECKPOINTED: cached + (above + 1) * block,
              NEURONS: cached, PREDECESSOR: full}  # fmt: skip
    return {name: count / full for name, count in counts.items()}


def methods(setting: Setting) -> dict[str, Steps]:
    """Every way to train, by name."""
    model, mask = setting.model, setting.mask
    masked = [parameter for name, parameter in model.hf.named_parameters() if name in mask.entries]

    def localized(make: Callable[[], Trainable], *, prefix_cache_gb: float = 1.0, checkpoint: bool = False) -> Steps:
        return lambda after: train(
            model, make(), setting.loss, steps=STEPS, learning_rate=LEARNING_RATE, prefix_cache_gb=prefix_cache_gb,
            checkpoint=checkpoint, on_step=lambda step: (after(step), None)[1],
        )  # fmt: skip

    return {
        FULL: lambda after: fine_tune(setting, list(model.hf.parameters()), after),
        PLAIN: localized(lambda: masked_trainable(model, mask), prefix_cache_gb=0.0),
        CACHED: localized(lambda: masked_trainable(model, mask)),
        LOW_RANK: localized(lambda: low_rank_trainable(model, mask, RANK)),
        CHECKPOINTED: localized(lambda: masked_trainable(model, mask), checkpoint=True),
        NEURONS: localized(lambda: masked_trainable(model, setting.neurons)),
        PREDECESSOR: lambda after: fine_tune(setting, masked, after),
    }


def fine_tune(setting: Setting, stepped: Sequence[nn.Parameter], after: Callable[[int], object]) -> None:
    """Take every parameter's gradient and step some: all, or as magikarp01/mechanistic-unlearning does, the masked."""
    hf = setting.model.hf.requires_grad_(True)
    optimizer = torch.optim.AdamW(stepped, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for step in range(STEPS):
        setting.loss(step, Forward(setting.model, {})).backward()
        nn.utils.clip_grad_norm_(stepped, 1.0)
        optimizer.step()
        hf.zero_grad(set_to_none=True)
        after(step + 1)
    hf.requires_grad_(False)


def seconds_a_step(steps: Steps, device: torch.device) -> float:
    """Median over all steps but the first."""
    moments: list[float] = []
    steps(lambda _: moments.append(_now(device)))
    return statistics.median(b - a for a, b in pairwise(moments))


def held_and_trained(model: Model, steps: Steps) -> tuple[int, int]:
    """Bytes of all gradients and of the optimizer's state after its last step, and the number of entries it steps."""
    found: list[tuple[int, int]] = []

    def note(optimizer: torch.optim.Optimizer, _inputs: Any, _named: Any) -> None:
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        everything = {id(parameter): parameter for parameter in (*stepped, *model.hf.parameters())}.values()
        gradients = sum(parameter.grad.nbytes for parameter in everything if parameter.grad is not None)
        state = sum(value.nbytes for kept in optimizer.state.values() for value in kept.values())
        found.append((gradients + state, sum(parameter.numel() for parameter in stepped)))

    handle = register_optimizer_step_post_hook(note)
    try:
        steps(lambda _: None)
    finally:
        handle.remove()
    return found[-1]


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
