"""Quantization: round the weights, so that an edit smaller than the rounding steps falls away."""

from collections.abc import Sequence
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field
from torch import Tensor

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.by_form import in_every_form
from mechunlearn.attack.health import Judge
from mechunlearn.attack.results import AttackResult, fact_rows
from mechunlearn.edit.training import substituted
from mechunlearn.facts import FactSplit
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model, all_components, oriented, weight_matrices
from mechunlearn.rounding import round_to_nearest

NONE = "none"


@ATTACKS.register("quantization", source="Zhang et al. 2024, arXiv:2410.16454")
def quantization(
    model: Model,
    split: FactSplit,
    *,
    bits: Annotated[Sequence[Literal[4, 8]], Field(min_length=1)] = (8, 4),
    group_sizes: Annotated[Sequence[Annotated[int, Field(ge=0)]], Field(min_length=1)] = (0, 128, 64, 32),
    max_health_facts: Annotated[int, Field(ge=1)] = 128,
    report_all_forms: bool = True,
    drop_targets: bool = False,
    seed: int = 0,
) -> AttackResult:
    """Round every attention and MLP matrix to int8 or int4, by row and by group; score the unseen `forget_hidden`.

    The setting with the highest mean P(true | candidates) on `attack_dev` among the healthy ones is chosen (first in
    order when equal). Healthy: `retain_test` down <= 5 points, perplexity on neutral text <= 1.2x. One setting is
    "none", the weights as they are, always healthy: where every rounding breaks the model or brings nothing back, the
    attack is asking by the prompt, which is what an attacker would be left with. A model too small for int4 thus makes
    the attack weak, not the verdict `invalid`; that it was weak shows in the positive control. The notes keep what
    each setting did. The model is not changed at any time; embeddings, biases and norms are not rounded.

    Args:
        group_sizes: inputs that share a scale; 0 is a whole row (output channel).
        max_health_facts: retained facts that health is measured on.
        report_all_forms: also ask for the hidden facts in every form with the chosen setting (`by_form`).
        drop_targets: leave `target_new` out of the candidates (for injections, on edited model and twin alike).
        seed: draws the options of multiple choice in `by_form`; rounding draws nothing.

    Returns:
        Rows of the hidden facts for every setting (`setting`), step 0.

    Raises:
        ValueError: the dev or the hidden part is empty.

    Differs from the source: plain round-to-nearest only, no data-driven kind (GPTQ, AWQ); "none" among the settings.
    Source: Zhang et al. 2024, arXiv:2410.16454.
    """
    options = {
        "bits": list(bits), "group_sizes": list(group_sizes), "max_health_facts": max_health_facts,
        "report_all_forms": report_all_forms, "drop_targets": drop_targets,
    }  # fmt: skip
    if not split.attack_dev:
        raise ValueError("quantization: attack_dev is empty; split with a dev part")
    settings: dict[str, tuple[int, int] | None] = {NONE: None}
    settings |= {f"int{n} {f'group {size}' if size else 'per row'}": (n, size) for n in bits for size in group_sizes}
    judge = Judge.of(model, split, max_facts=max_health_facts, drop_targets=drop_targets)
    dev, health = {}, {}
    for name, how in settings.items():
        with substituted(model, _rounded(model, how)):
            dev[name], health[name] = judge.dev(model), judge.health(model, ())
    chosen = max(settings, key=lambda name: (health[name].healthy, dev[name]))
    hidden = split.forget_hidden  # first access: everything is chosen
    if not hidden:
        raise ValueError("quantization: forget_hidden is empty; there is nothing to recover")
    rows, by_form = [], None
    for name, how in settings.items():
        with substituted(model, _rounded(model, how)):
            scores = score_facts(model, hidden, drop_targets=drop_targets)
            rows.append(fact_rows(hidden, scores, part="forget_hidden", setting=name))
            if name == chosen and report_all_forms:
                by_form = in_every_form(model, hidden, drop_targets=drop_targets, seed=seed)
    return AttackResult(
        attack="quantization",
        access="weights",
        decides=True,
        rows=pd.concat(rows, ignore_index=True),
        before=rows[0].assign(setting="before"),
        chosen=chosen,
        health=health[chosen],
        options=options,
        seed=seed,
        model=model.name,
        facts_sha256=split.sha256,
        by_form=by_form,
        notes={
            "dev_p_true": dev,
            "retained_accuracy": {name: one.retained_after for name, one in health.items()},
            "perplexity_ratio": {name: one.perplexity_ratio for name, one in health.items()},
            "unhealthy": {name: one.reason for name, one in health.items() if not one.healthy},
        },
    )


def _rounded(model: Model, how: tuple[int, int] | None) -> dict[str, Tensor]:
    """What stands in for the weights at these bits and this group size; nothing for None."""
    if how is None:
        return {}
    bits, group_size = how
    parameters = dict(model.hf.named_parameters())
    made = {}
    for name in weight_matrices(model, all_components(model)):
        matrix = oriented(model, name, parameters[name])
        made[name] = oriented(model, name, round_to_nearest(matrix, bits=bits, group_size=group_size))
    return made
