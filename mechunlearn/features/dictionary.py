"""Dictionary: a sparse autoencoder of one activation of one model, with ReLU, TopK, JumpReLU or gated features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.html_card import html_card

Kind = Literal["relu", "topk", "jumprelu", "gated"]
Scaling = Literal["none", "layer_norm", "constant_norm_rescale"]
TENSORS: Mapping[Kind, tuple[str, ...]] = {
    "relu": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
}
"""SAELens' names. W_enc is [d_in d_sae], W_dec [d_sae d_in], b_dec [d_in], all others [d_sae]."""
ROUNDING = 0.01  # of lengths of directions that are taken for equal


@dataclass(frozen=True, kw_only=True, eq=False)
class Dictionary:
    """x ~ decode(encode(x)): features f >= 0 of an activation x, few of which are above 0, and their directions.

    pre = x' W_enc + b_enc, with x' = x, or x - b_dec where `subtracts_bias`; f by kind:

    - relu: max(pre, 0); topk: the `k` largest of them in each vector, the others 0;
    - jumprelu: pre where it is above the feature's threshold, else 0;
    - gated: max(x' W_enc exp(r_mag) + b_mag, 0) where x' W_enc + b_gate > 0, else 0.

    decode(f) = f W_dec + b_dec. Where `scales_by_norm`, features are chosen, and kept, times their direction's norm.

    Source: Gao et al. 2024, arXiv:2406.04093 (topk); Rajamanoharan et al. 2024, arXiv:2407.14435 (jumprelu) and
        arXiv:2404.16014 (gated).
    """

    kind: Kind
    weights: Mapping[str, Float[Tensor, "..."]]
    hook_point: str
    """TransformerLens' name of the activation, such as blocks.3.hook_resid_post."""
    k: int | None = None
    subtracts_bias: bool = False
    scales_by_norm: bool = False
    scaling: Scaling = "none"
    """What is done to each vector on the way in, and undone on the way out: layer_norm makes its mean 0 and its
    standard deviation 1, constant_norm_rescale makes its length sqrt(d_in). In SAELens' names."""
    is_folded: bool = False
    """Whether `fold_decoder_norm` made every direction a unit vector: a feature of 1 is then a step as long as the
    vector's scale (`scale_of`), 1 without `scaling`; within 1% in a topk one."""
    model_name: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained and what it costs, or where it is from."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"dictionary: got kind {self.kind!r}, allowed: {', '.join(get_args(Kind))}")
        wanted = TENSORS[self.kind]
        if set(self.weights) != set(wanted):
            raise ValueError(
                f"dictionary: a {self.kind} one has tensors {', '.join(wanted)}; got {', '.join(sorted(self.weights))}"
            )
        d_in, d_sae = self.weights["W_enc"].shape
        shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        for name in wanted:
            shape, fits = tuple(self.weights[name].shape), shapes.get(name, (d_sae,))
            if shape != fits:
                raise ValueError(f"dictionary: {name} has shape {list(shape)}, W_enc of {d_in} x {d_sae} needs {fits}")
        if (self.kind == "topk") != (self.k is not None) or not (self.k is None or 1 <= self.k <= d_sae):
            raise ValueError(f"dictionary: got kind {self.kind} with k = {self.k}; topk needs k from 1 to {d_sae}")

    @property
    def d_in(self) -> int:
        """Width of the activation."""
        return self.weights["W_enc"].shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.weights["W_enc"].shape[1]

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The features of activations, in the dictionary's dtype."""
        return self._features(self._scaled(x)[0])

    def decode(
        self, features: Float[Tensor, "*batch d_sae"], like: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """The activations that features stand for.

        Args:
            like: the activations that were encoded; needed where `scaling` is not "none", which is undone by theirs.

        Raises:
            ValueError: `like` is missing.
        """
        w = self.weights
        if self.scales_by_norm:
            features = features / w["W_dec"].norm(dim=-1)
        out = features @ w["W_dec"] + w["b_dec"]
        if self.scaling == "none":
            return out
        if like is None:
            raise ValueError(f"dictionary: scaling '{self.scaling}' is undone with the activations that were encoded")
        _, shift, scale = self._scaled(like)
        return out * scale + shift

    def scale_of(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch one"] | float:
        """What `decode` multiplies the steps of a vector's features by to undo `scaling`; 1 where that is "none"."""
        return self._scaled(x)[2]

    def preactivations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """What decides whether features are on: pre above, of gated ones the gate's; of scaled activations."""
        w = self.weights
        pre = self._projected(x) + (w["b_gate"] if self.kind == "gated" else w["b_enc"])
        return pre * w["W_dec"].norm(dim=-1) if self.scales_by_norm else pre

    def _features(self, x: Tensor) -> Tensor:
        w, pre = self.weights, self.preactivations(x)
        if self.kind == "gated":
            magnitude = self._projected(x) * w["r_mag"].exp() + w["b_mag"]
            return magnitude.relu() * (pre > 0)
        if self.kind == "jumprelu":
            return pre.relu() * (pre > w["threshold"])
        if self.k is None:
            return pre.relu()
        best = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())

    def _projected(self, x: Tensor) -> Tensor:
        return (x - self.weights["b_dec"] if self.subtracts_bias else x) @ self.weights["W_enc"]

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """The vectors as they go in, and what to add and multiply on the way out."""
        x = x.to(self.weights["W_enc"].dtype)
        if self.scaling == "none":
            return x, 0.0, 1.0
        if self.scaling == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return x / scale, 0.0, scale
        shift, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - shift) / (scale + 1e-5), shift, scale

    def only(self, features: Sequence[int]) -> "Dictionary":
        """The dictionary of these features alone, in this order, at a fraction of the cost.

        Raises:
            ValueError: a topk one, whose features depend on all others, or a feature that it does not have.
        """
        if self.kind == "topk":
            raise ValueError("dictionary: which features of a topk one are on depends on all of them; keep it whole")
        if bad := [feature for feature in features if not 0 <= feature < self.d_sae]:
            raise ValueError(f"dictionary: got feature {bad[0]}, allowed: 0 to {self.d_sae - 1}")
        kept = torch.tensor(features, dtype=torch.long, device=self.weights["W_enc"].device)
        weights = {name: value if name == "b_dec" else value.index_select(1 if name == "W_enc" else 0, kept)
                   for name, value in self.weights.items()}  # fmt: skip
        return replace(self, weights=weights)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Dictionary":
        """The same dictionary elsewhere, or in another dtype."""
        return replace(self, weights={name: value.to(device, dtype) for name, value in self.weights.items()})

    def _repr_html_(self) -> str:
        lines = {
            "of": f"{self.hook_point} of {self.model_name or 'an unnamed model'}",
            "features": f"{self.d_sae:,}" + (f", {self.k} of them in a vector" if self.k else ""),
            "directions": "unit vectors (folded)" if self.is_folded else "of any length",
        }
        return html_card(f"{self.kind} dictionary", lines, [("note", "value"), *self.notes.items()])


def fold_decoder_norm(dictionary: Dictionary) -> Dictionary:
    """The same autoencoder with unit directions: a feature is as long as the step that it takes in the activation.

    Thresholds and clamps are in units of features, so they mean something else before and after; hence `is_folded`.
    What it decodes stays the same. A folded one comes back as it is. A topk one that does not scale by its directions'
    lengths would choose other features if these were folded one by one. Where they differ by no more than rounding does
    (bfloat16 is good for 0.4%) all are divided by their mean: the same features are chosen, and the directions are unit
    vectors within 1%.

    Raises:
        ValueError: a direction of length 0; or lengths more than 1% from their mean in such a topk one.
    """
    if dictionary.is_folded:
        return dictionary
    norm = dictionary.weights["W_dec"].norm(dim=-1)
    if not bool((norm > 0).all()):
        raise ValueError(f"dictionary: direction {int(norm.argmin())} of {dictionary.hook_point} has length 0")
    if dictionary.k and not dictionary.scales_by_norm:
        mean = norm.mean()
        if float((norm / mean - 1).abs().max()) > ROUNDING:
            raise ValueError(
                f"dictionary: folding this topk one of {dictionary.hook_point} would choose other features; "
                "give strengths in its own features (units = features)"
            )
        norm = mean.expand_as(norm)
    scaled = {"b_enc", "b_gate", "b_mag", "threshold"}
    weights = {name: value * norm if name in scaled else value for name, value in dictionary.weights.items()}
    weights |= {"W_enc": weights["W_enc"] * norm, "W_dec": weights["W_dec"] / norm[:, None]}
    return replace(dictionary, weights=weights, is_folded=True)
