"""Dynamic SAE guardrail: features of what is to be forgotten, clamped in texts that a gate says are about it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import read
from mechunlearn.facts import FactSplit, hash_facts
from mechunlearn.features import GUARDS
from mechunlearn.features.bundled import dictionary_of
from mechunlearn.features.clamp import Clamp, ClampMode, Units
from mechunlearn.features.dictionary import fold_decoder_norm
from mechunlearn.features.gate import Gate, GateKind, Scope, calibrated
from mechunlearn.features.guard import Guard, narrowed
from mechunlearn.features.hook_points import place_of_hook
from mechunlearn.features.selection import matched_at_random, select_features
from mechunlearn.features.statistics import batches_of_texts, feature_statistics
from mechunlearn.features.texts import retained_texts, statements
from mechunlearn.models import Model

Share = Annotated[float, Field(gt=0, le=1)]


@GUARDS.register("dynamic_guardrail", source="Muhamed et al. 2025, arXiv:2504.08192")
def dynamic_guardrail(
    model: Model,
    split: FactSplit,
    *,
    dictionary: str = "blocks.3.hook_resid_post",
    rule: str = "dsg",
    rule_options: Mapping[str, float | str] | None = None,
    n_features: Annotated[int, Field(ge=1)] = 20,
    at_random: bool = False,
    gate: GateKind | Literal["none"] = "share",
    scope: Scope = "token",
    width: Annotated[int, Field(ge=1)] = 8,
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05,
    calibration: Literal["quantile", "conformal"] = "conformal",
    mode: ClampMode = "all_on_hot",
    strength: Annotated[float, Field(ge=0)] = 1.0,
    units: Units = "residual",
    data_share: Share = 1.0,
    seed: int = 0,
) -> Guard:
    """Choose features on statements of the facts, calibrate the gate on retained text, and clamp what passes it.

    No weight changes and nothing is trained. Of the texts to retain a half chooses features, a quarter calibrates the
    gate, and on the last quarter the rate at which it opens is measured and recorded.

    Args:
        dictionary: a hook point, for the dictionary of it that comes with the model, or the path of a dictionary; its
            directions are folded to unit length, so that a strength means the same in all of them.
        rule: how features are chosen; see `features.selection`.
        rule_options: of the rule.
        n_features: features at most.
        at_random: a control: as many other features that are on as often in text to retain.
        gate: none is a static clamp.
        scope, width: of the gate; see `features.gate`.
        false_positive_rate: of texts to retain, on which the gate may open.
        calibration: how the threshold is taken; see `features.gate.calibrated`.
        mode, strength, units: of the clamp; see `features.clamp`.
        data_share: share of the statements to forget and to retain that are used.
        seed: draws the shares, the split of the texts, and random features.

    Raises:
        ValueError: a dictionary that does not fit, a rule that admits no feature, or too few texts to calibrate.

    Source: Muhamed et al. 2025, arXiv:2504.08192, section 3. Its importance, selection and clamp are the defaults; its
        gate is a share of whole sequences (`scope` "sequence") at a quantile (`calibration` "quantile").
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split", "seed")}
    options["rule_options"] = dict(rule_options or {})
    rng = random.Random(f"guard|{seed}")
    found = fold_decoder_norm(dictionary_of(model, dictionary)).to(model.device)
    forget = _some(statements(split.forget, seed=seed), data_share, rng)
    retain = _some(retained_texts(split.retain_train, seed=seed), data_share, rng)
    half = len(retain) // 2
    of_forget = feature_statistics(model, found, forget)
    of_retain = feature_statistics(model, found, retain[:half])
    chosen = select_features(of_forget, of_retain, rule, n=n_features, **options["rule_options"])
    if at_random:
        chosen = matched_at_random(chosen, of_retain.fire_rate.numpy(), seed=seed)
    kept = narrowed(found, chosen)
    guard = Guard(
        dictionary=kept, features=chosen, gate=None,
        clamp=Clamp(
            mode=mode, strength=strength, units=units, residual_norm=of_retain.mean_norm,
            means=tuple((of_retain.total / of_retain.n_tokens)[list(chosen)].tolist()) if mode == "mean" else (),
        ),
        base_name=model.name, base_sha256=model.sha256, method="dynamic_guardrail", options=options, seed=seed,
        facts_sha256=hash_facts((*split.forget, *split.retain_train)),
    )  # fmt: skip
    watched = retain[half:]
    to_forget, to_retain = (flags_of(model, guard, texts) for texts in (forget, watched))
    if gate != "none":
        rates = tuple(min(0.99, max(0.001, _rate(flags))) for flags in (to_forget, to_retain))
        if rates[0] <= rates[1]:
            rates = (min(0.995, rates[1] * 1.5), rates[1])  # random features: no evidence either way
        one = Gate(kind=gate, scope=scope, width=width, rates=(rates[0], rates[1]))
        middle = len(to_retain) // 2
        one = calibrated(
            one, to_retain[:middle], rate=false_positive_rate, method=calibration, held_out=to_retain[middle:]
        )
        opened = float((one.peaks(to_forget) > one.threshold).mean())
        guard = replace(guard, gate=one, notes={"opens on text to forget": opened})
    return replace(guard, notes={
        **guard.notes, "hook_point": found.hook_point, "features": list(chosen), "residual_norm": of_retain.mean_norm,
        "rate on tokens to forget": _rate(to_forget), "rate on tokens to retain": _rate(to_retain),
    })  # fmt: skip


@torch.no_grad()
def flags_of(model: Model, guard: Guard, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Of each text, in order: at which tokens a chosen feature is on, and which are content."""
    place, dictionary = place_of_hook(model, guard.dictionary.hook_point), guard.dictionary.to(model.device)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for numbers, ids, content in batches_of_texts(model, texts, max_tokens=256, batch_size=64):
        on = (dictionary.encode(read(model, ids, place))[..., list(guard.places)] > 0).any(-1) & content
        found |= {number: (on[row].cpu(), content[row].cpu()) for row, number in enumerate(numbers)}
    return [found[number] for number in range(len(texts))]


def _rate(flags: Sequence[tuple[Tensor, Tensor]]) -> float:
    return sum(int(on.sum()) for on, _ in flags) / max(1, sum(int(content.sum()) for _, content in flags))


def _some(texts: Sequence[str], share: float, rng: random.Random) -> list[str]:
    return list(texts) if share == 1 else rng.sample(list(texts), max(1, round(share * len(texts))))
