"""Floating-point operations of the study's trainings and attacks.

Left out: attention patterns, what lm-eval asks, and all that runs on the CPU (loading, tokenizing, the fits of probes).
"""

from collections.abc import Mapping
from typing import Any

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.health import N_TEXTS
from mechunlearn.attack.relearning_search import checkpoint_steps, round_steps
from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.edit.budget import BISECTIONS, CHECKS, N_WATCHED
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model
from mechunlearn.study.memory import (
    KEPT,
    PROMPT_TOKENS,
    TEXT_TOKENS,
    Batch,
    control_batch,
    control_mask,
    d_vocab,
    lowest_layer,
    whole,
)

EVALUATED = 512  # prompts that look at an edit afterwards
READ_PROMPTS = 1000, 20  # asked by an attack that trains nothing: retained ones, and for every forgotten fact


def training_flops(model: Model, mask: ParameterMask, batch: Batch) -> float:
    """Forward and backward pass of one batch.

    2 operations a token and weight forward, 2 backward from the first trained block up, 2 for the gradient of what is
    masked; 4 a position whose logits are kept and weight of the unembedding.
    """
    n = whole(model).n_selected
    above = n * (model.n_layers - lowest_layer(mask)) // model.n_layers  # blocks are alike
    unembedding = 2 * 2 * model.d_model * d_vocab(model) * batch.kept
    return 2.0 * batch.tokens * (n + above + mask.n_selected) + unembedding


def reading_flops(model: Model, prompts: float, *, tokens: int = PROMPT_TOKENS, kept: int = KEPT) -> float:
    """Forward passes over so many prompts."""
    return 2.0 * prompts * (tokens * whole(model).n_selected + kept * model.d_model * d_vocab(model))


def edit_flops(
    model: Model, mask: ParameterMask, *, rows: int, steps: int, accumulation: int, resistant: bool = False
) -> float:
    """One edit: its training, the checks of its damage, and a look at what came of it.

    Args:
        resistant: of `resistant_inject`: with every batch an attacker takes a step, and the edit withstands it.
    """
    each = training_flops(model, mask, Batch.of(rows))
    if resistant:
        shown = Batch.of_attacker(rows)
        each += training_flops(model, whole(model), shown) + training_flops(model, mask, shown)
    looked = (CHECKS + BISECTIONS) * N_WATCHED + EVALUATED
    return steps * accumulation * each + reading_flops(model, looked)


def control_flops(model: Model, kind: str, options: Mapping[str, Any]) -> float:
    """One positive control: its training, for which the original reads what is kept, and a look at what came of it."""
    filled = SUPPRESSIONS.get(kind).validate(options)
    each = training_flops(model, control_mask(model, filled), control_batch(filled))
    each += reading_flops(model, filled["batch_size"], kept=0)
    return filled["steps"] * each + reading_flops(model, EVALUATED)


def localizing_flops(model: Model, n_facts: int) -> float:
    """Each localizer once: exact ones a pass for every head and MLP, paths and tracing; a dozen passes for the others.

    An upper bound: exact methods skip the blocks below a change.
    """
    return reading_flops(model, n_facts * (12 + 2 * model.n_layers * (model.n_heads + 1)))


def attack_flops(model: Model, name: str, options: Mapping[str, Any], n_facts: int) -> float:
    """One attack on one model; those that train nothing are counted as so many prompts."""
    filled = ATTACKS.get(name).validate(options)
    retained, each = READ_PROMPTS
    facts = 2 * filled.get("max_health_facts", 0) + n_facts
    look = reading_flops(model, facts) + reading_flops(model, N_TEXTS, tokens=TEXT_TOKENS, kept=TEXT_TOKENS)
    if name == "quantization":
        return 2 * look * (1 + len(filled["bits"]) * len(filled["group_sizes"]))
    if name != "relearning":
        return reading_flops(model, retained + each * n_facts)
    step = training_flops(model, whole(model), Batch.of(filled["batch_size"], kinds=1, texts=0))
    total, n = 0.0, len(filled["kinds"]) * len(filled["learning_rates"]) * len(filled["sources"])
    for i, steps in enumerate(round_steps(filled["steps"], n, filled["halving"])):
        left = n if i == 0 else min(n, -(-n // filled["halving"] ** i) + 1)  # and the one that fits best
        total += left * (steps * step + len(checkpoint_steps(steps, filled["eval_every"])) * look)
    return total
