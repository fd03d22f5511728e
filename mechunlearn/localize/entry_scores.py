"""Single weights by the facts' gradients: what the weight-based localizers sum up, entry by entry."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import untouched
from mechunlearn.components import Component
from mechunlearn.facts import Fact
from mechunlearn.localize.weight_gradients import Entry, WeightMetric, inputs_and_gradients, measured
from mechunlearn.models import Model, all_components, component_parameters, oriented


def entry_scores(
    model: Model,
    facts: Sequence[Fact],
    entry: Entry = "squared",
    *,
    components: Sequence[Component] | None = None,
    metric: WeightMetric = "log_prob",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> dict[str, Float[Tensor, "..."]]:
    """Mean over facts of g^2 ("squared"), |g| ("absolute") or |w g| ("saliency") of each entry, g = d metric / d w.

    Fisher's diagonal, the gradient and SNIP by single weights; summed over a component's entries they are the scores
    of `fisher`, `gradient_norm` (norm "l1") and `snip` with normalize "sum", averaged over facts. For the contrast with
    facts to retain, compute both and divide (Foster et al. 2023) or subtract.

    Args:
        components: which; entries of their parameters that belong to none of them score 0. None: all MLPs and
            attention sublayers.
        metric: see `fisher`; "logit_diff" weighs facts alike.
        seed: of the wrong answer that "logit_diff" compares with.

    Returns:
        Parameter name -> scores of the parameter's shape, float32 on the CPU: 4 bytes an entry.

    Raises:
        ValueError: no facts, or for "logit_diff" a fact without a wrong answer.

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796; Lee et al. 2019, arXiv:1810.02340.
    """
    weights = dict(model.hf.named_parameters())
    chosen: dict[str, Tensor] = {}
    for component in all_components(model) if components is None else components:
        for name, mask in component_parameters(model, component).items():
            chosen[name] = chosen[name] | mask if name in chosen else mask
    paths = tuple(dict.fromkeys(name.rpartition(".")[0] for name in chosen))
    total = {
        name: torch.zeros_like(oriented(model, name, weights[name]), dtype=torch.float32).detach() for name in chosen
    }
    with untouched(model):
        for _, measure in measured(model, facts, metric, batch_size, seed):
            for path, (x, g) in inputs_and_gradients(model, paths, measure).items():
                for name in (f"{path}.weight", f"{path}.bias"):
                    if name in total:
                        w = oriented(model, name, weights[name].detach())
                        # one fact at a time: a gradient is as large as the weight
                        for gradient in (b.sum(0) if w.ndim == 1 else b.mT @ a for a, b in zip(x, g, strict=True)):
                            total[name] += _score(gradient, w, entry)
    return {name: oriented(model, name, value / len(facts)).cpu() * chosen[name].cpu() for name, value in total.items()}


def _score(gradient: Tensor, weight: Tensor, entry: Entry) -> Tensor:
    if entry == "squared":
        return gradient.square()
    return (gradient * weight if entry == "saliency" else gradient).abs()
