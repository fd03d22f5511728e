"""Control: every sublayer gets a random score."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.controls import constant_scores, random_values
from mechunlearn.models import Model, all_components


@LOCALIZERS.register("random_components", source="control: a localization that knows nothing, among all sublayers")
def random_components(model: Model, facts: Sequence[Fact], *, seed: Annotated[int, Field(ge=0)] = 0) -> ComponentScores:
    """Score every MLP and attention sublayer at random, the same for every fact.

    Sign and units: uniform in (0, 1], no meaning beyond the order.
    """
    components = all_components(model, ("mlp", "attention"))
    return constant_scores("random_components", facts, components, random_values(len(components), seed), {"seed": seed})
