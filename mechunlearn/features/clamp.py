"""Clamps: what becomes of an activation once its text is to be guarded; all that the dictionary misses stays."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ClampMode = Literal["all_on_hot", "only_fired", "zero", "mean"]
Units = Literal["features", "residual"]
LEAST_SCALE = 1e-5  # a vector with none has nothing to be scaled


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """New values of the chosen features, at tokens where the gate is open and one of them is on.

    - all_on_hot: all of them become -strength (DSG);
    - only_fired: those that are on become -strength (Farrell et al. 2024, arXiv:2410.19278);
    - zero: those that are on become 0; mean: their means on text to retain.
    """

    mode: ClampMode = "all_on_hot"
    strength: float = 1.0
    units: Units = "residual"
    """features: as the dictionary gives them. residual: mean norms of the activation, so that a strength means the
    same in every model and layer. With folded directions a feature then adds, after the clamp, a step of that length
    against its direction, however the dictionary scales activations."""
    means: tuple[float, ...] = ()
    """Of the chosen features on text to retain, for the mode "mean"."""
    residual_norm: float = 1.0
    """The mean norm of the activation on text to retain."""

    @property
    def value(self) -> float:
        """What features become, in their own units; in norms, where vectors are scaled by 1."""
        return -self.strength * (self.residual_norm if self.units == "residual" else 1.0)

    def __call__(
        self,
        features: Float[Tensor, "*batch feature"],
        hot: Bool[Tensor, "*batch"],
        scale: Float[Tensor, "*batch one"] | float = 1.0,
    ) -> Float[Tensor, "*batch feature"]:
        """The features after the clamp; those of other tokens as they are.

        Args:
            scale: of each vector, by which the dictionary multiplies what its features add (`Dictionary.scale_of`).
        """
        on = hot[..., None] & (features > 0)
        if self.mode == "mean":
            return torch.where(on, torch.tensor(self.means).to(features), features)
        value = torch.tensor(0.0 if self.mode == "zero" else self.value).to(features)
        if self.units == "residual":
            value = value / torch.as_tensor(scale).to(features).clamp(min=LEAST_SCALE)
        return torch.where(hot[..., None] if self.mode == "all_on_hot" else on, value, features)
