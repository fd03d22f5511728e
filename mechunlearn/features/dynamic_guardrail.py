"""Dynamic SAE guardrail: features of what is to be forgotten, clamped in texts that a gate says are about it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from mechunlearn.facts import FactSplit
from mechunlearn.features import GUARDS
from mechunlearn.features.bundled import dictionary_of
from mechunlearn.features.clamp import Clamp, ClampMode, Units
from mechunlearn.features.descriptions import describe_features, features_of_topic, load_descriptions
from mechunlearn.features.dictionary import Dictionary, fold_decoder_norm
from mechunlearn.features.evidence import Evidence, Flags, gather_evidence
from mechunlearn.features.gate import Gate, GateKind, Scope, calibrated
from mechunlearn.features.guard import Guard, narrowed
from mechunlearn.features.selection import matched_at_random, select_features
from mechunlearn.features.texts import RetainedKind
from mechunlearn.models import Model

Share = Annotated[float, Field(gt=0, le=1)]


@GUARDS.register("dynamic_guardrail", source="Muhamed et al. 2025, arXiv:2504.08192")
def dynamic_guardrail(
    model: Model,
    split: FactSplit,
    *,
    dictionary: str = "blocks.3.hook_resid_post",
    hook_point: str | None = None,
    rule: str = "dsg",
    rule_options: Mapping[str, float | str] | None = None,
    topic: str | None = None,
    descriptions: str | None = None,
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
    gate, and on the last quarter the rate at which it opens is measured and recorded; `notes` say it of every kind of
    them (statements near to the facts to forget, statements far from them, other text), and of the text to forget.

    Args:
        dictionary: a hook point, for the dictionary of it that comes with the model, or the path of a dictionary. With
            strengths in residual norms its directions are folded to unit length, so that they mean the same in all of
            them; with `units` "features" it is used as it is.
        hook_point: of a dictionary whose file does not say (Gemma Scope's never does).
        rule: how features are chosen: dsg, retain_sparsity, count_difference, chi_squared (`features.selection`).
        rule_options: of the rule.
        topic: what is to be forgotten, in words: features are then chosen by their descriptions, with no look at which
            facts are to be forgotten (but for the gate cusum's rates); the rule is not used.
        descriptions: path of these (see `features.descriptions.load_descriptions`); None describes every feature by its
            top tokens and contexts in statements of all facts.
        n_features: features at most.
        at_random: a control: as many other features that are on as often in text to retain.
        gate: what a text is scored by: share, window, cusum (`features.gate`); none is a clamp that is always on.
        scope: whether each token is decided by the score up to it ("token"), or all of a forward pass by the score at
            its end ("sequence").
        width: tokens of a window; of a share the least number that it is taken of.
        false_positive_rate: of texts to retain, on which the gate may open.
        calibration: how the threshold is taken; see `features.gate.calibrated`.
        mode: what chosen features become where the gate is open: all of them -strength (all_on_hot), or only those
            that are on: -strength (only_fired), 0 (zero), or their mean on text to retain (mean).
        strength: of the clamp, in `units`.
        units: mean norms of the activation ("residual"), or the dictionary's own ("features").
        data_share: share of the statements to forget and to retain that are used.
        seed: draws the shares, the split of the texts, and random features.

    Raises:
        ValueError: a dictionary that does not fit or cannot be folded, or without a hook point; too few texts to
            calibrate; descriptions without a topic.
        NothingFound: a rule, or a topic, that admits no feature.

    Source: Muhamed et al. 2025, arXiv:2504.08192, section 3. Its importance, selection and clamp are the defaults; its
        gate is a share of whole sequences (`scope` "sequence") at a quantile (`calibration` "quantile").
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split", "seed")}
    options["rule_options"] = dict(rule_options or {})
    if descriptions is not None and topic is None:
        raise ValueError("dynamic_guardrail: descriptions need a `topic` to look for among them; give one")
    found = dictionary_for(model, options)
    return guard_from(model, gather_evidence(model, split, found, data_share=data_share, seed=seed), options)


def dictionary_for(model: Model, options: Mapping[str, Any]) -> Dictionary:
    """The dictionary that these options of `dynamic_guardrail` name, on the model's device."""
    found = dictionary_of(model, options["dictionary"], options["hook_point"])
    return (fold_decoder_norm(found) if options["units"] == "residual" else found).to(model.device)


def guard_from(model: Model, evidence: Evidence, options: Mapping[str, Any]) -> Guard:
    """The guard with these options of `dynamic_guardrail`, all of them, on what was read."""
    found, of_retain = evidence.dictionary, evidence.retain
    chosen = _chosen(model, evidence, options)
    means = tuple((of_retain.total / of_retain.n_tokens)[list(chosen)].tolist()) if options["mode"] == "mean" else ()
    guard = Guard(
        dictionary=narrowed(found, chosen), features=chosen, gate=None,
        clamp=Clamp(
            mode=options["mode"], strength=options["strength"], units=options["units"], means=means,
            residual_norm=of_retain.mean_norm,
        ),
        base_name=model.name, base_sha256=model.sha256, method="dynamic_guardrail", options=options,
        seed=evidence.seed, facts_sha256=evidence.facts_sha256,
    )  # fmt: skip
    to_forget, to_retain = (
        fired.flags(chosen, found.d_sae) for fired in (evidence.fired_forget, evidence.fired_retain)
    )
    if options["gate"] != "none":
        one = _calibrated(
            Gate(kind=options["gate"], scope=options["scope"], width=options["width"],
                 rates=_likelihoods(to_forget, to_retain)), to_retain,
            rate=options["false_positive_rate"], method=options["calibration"],
        )  # fmt: skip
        opened = {"forget": float((one.peaks(to_forget) > one.threshold).mean())}
        opened |= {f"retain, {kind}": rate for kind, rate in _by_kind(one, to_retain, evidence.kinds).items()}
        guard = replace(guard, gate=one, notes={f"opens on text to {what}": rate for what, rate in opened.items()})
    return replace(guard, notes={
        **guard.notes, "hook_point": found.hook_point, "features": list(chosen), "residual_norm": of_retain.mean_norm,
        "rate on tokens to forget": _rate(to_forget), "rate on tokens to retain": _rate(to_retain),
    })  # fmt: skip


def _chosen(model: Model, evidence: Evidence, options: Mapping[str, Any]) -> tuple[int, ...]:
    n, topic = options["n_features"], options["topic"]
    if topic is None:
        chosen = select_features(evidence.forget, evidence.retain, options["rule"], n=n, **options["rule_options"])
    else:
        own = options["descriptions"]
        said = load_descriptions(own) if own else describe_features(model, evidence.dictionary, evidence.texts)
        chosen = features_of_topic(_fitting(said, evidence.dictionary), topic, n=n)
    if options["at_random"]:
        chosen = matched_at_random(chosen, evidence.retain.fire_rate.numpy(), seed=evidence.seed)
    return chosen


def _fitting(descriptions: Mapping[int, str], dictionary: Dictionary) -> Mapping[int, str]:
    """The descriptions, if they are of features that the dictionary has."""
    if bad := [feature for feature in descriptions if not 0 <= feature < dictionary.d_sae]:
        raise ValueError(
            f"descriptions: got feature {bad[0]}, allowed: 0 to {dictionary.d_sae - 1}, as the dictionary of "
            f"{dictionary.hook_point} has; give descriptions of its own features"
        )
    return descriptions


def _likelihoods(to_forget: Flags, to_retain: Flags) -> tuple[float, float]:
    """Of a token with a chosen feature, in either kind of text; CUSUM needs the first to be higher."""
    forget, retain = (min(0.99, max(0.001, _rate(flags))) for flags in (to_forget, to_retain))
    return (forget if forget > retain else min(0.995, retain * 1.5), retain)  # random features: no evidence either way


def _calibrated(gate: Gate, flags: Flags, *, rate: float, method: Literal["quantile", "conformal"]) -> Gate:
    """On the first half of the texts to retain; the rate achieved is that of the second."""
    half = len(flags) // 2
    return calibrated(gate, flags[:half], rate=rate, method=method, held_out=flags[half:])


def _by_kind(gate: Gate, flags: Flags, kinds: Sequence[RetainedKind]) -> dict[str, float]:
    """The rate achieved, on the second half of the texts to retain, of every kind that is among them."""
    half = len(flags) // 2
    is_open, kind = gate.peaks(flags[half:]) > gate.threshold, np.array(kinds[half:])
    return {name: float(is_open[kind == name].mean()) for name in get_args(RetainedKind) if name in kind}


def _rate(flags: Flags) -> float:
    return sum(int(on.sum()) for on, _ in flags) / max(1, sum(int(content.sum()) for _, content in flags))
