"""Control: all sublayers alike, i.e. no localization."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.controls import constant_scores
from mechunlearn.models import Model, all_components


@LOCALIZERS.register("nonlocalized", source="control: no localization, every MLP and attention sublayer")
def nonlocalized(model: Model, facts: Sequence[Fact], *, seed: Annotated[int, Field(ge=0)] = 0) -> ComponentScores:
    """Score every MLP and attention sublayer 1; the seed is only recorded."""
    components = all_components(model, ("mlp", "attention"))
    return constant_scores("nonlocalized", facts, components, np.ones(len(components)), {"seed": seed})
