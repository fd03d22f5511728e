"""Control: all MLPs alike."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.controls import constant_scores
from mechunlearn.models import Model, all_components


@LOCALIZERS.register("all_mlps", source="control: MLPs, without choosing among them")
def all_mlps(model: Model, facts: Sequence[Fact], *, seed: Annotated[int, Field(ge=0)] = 0) -> ComponentScores:
    """Score every MLP 1; the seed is only recorded."""
    components = all_components(model, ("mlp",))
    return constant_scores("all_mlps", facts, components, np.ones(len(components)), {"seed": seed})
