"""Training a dictionary on the activations of running text, which stream through the model and are never kept."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import exact, read
from mechunlearn.features.dictionary import Dictionary, fold_decoder_norm
from mechunlearn.features.hook_points import place_of_hook, width_at
from mechunlearn.features.objectives import OBJECTIVES, TrainedKind, revival
from mechunlearn.features.token_rows import TokenRows, is_content
from mechunlearn.models import Model
from mechunlearn.prompts import tokenizer_of
from mechunlearn.registry import did_you_mean
from mechunlearn.resumable import load_state, save_state

SMOOTHING = 0.99  # of batchtopk's running threshold, a step
FIRST_THRESHOLD = 0.1  # of jumprelu, for vectors of norm sqrt(d); itself trained: its logarithm hardly moves


@dataclass(frozen=True, kw_only=True)
class DictionaryRecipe:
    """Everything that decides what a dictionary becomes, beside the model, the text and the hook point."""

    kind: TrainedKind = "batchtopk"
    d_sae: int = 1024
    k: int = 16
    """Features of a vector (batchtopk: on average); of topk and batchtopk."""
    sparsity: float = 1.0
    """Weight of the penalty on features that are on; of relu, gated and jumprelu."""
    steps: int = 2000
    learning_rate: float = 1e-3
    """Adam; warmed up in the first 5% of the steps, falling to 0 in the last 20%."""
    dead_after: int = 250_000
    """Tokens without it after which a feature is dead and is trained on what the others leave."""
    revival_weight: float = 1 / 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise ValueError(f"dictionary: unknown kind {self.kind!r}.{did_you_mean(self.kind, tuple(OBJECTIVES))}")
        if self.steps < 1:
            raise ValueError(f"dictionary: got {self.steps} steps, allowed: 1 or more")
        if not 1 <= self.k <= self.d_sae:
            raise ValueError(f"dictionary: got k = {self.k}, allowed: 1 to {self.d_sae}, its features")


class DictionaryTrainer:
    """Weights, optimizer, step and what is known of each feature; vectors are scaled to a mean norm of sqrt(d)."""

    def __init__(
        self, model: Model, hook_point: str, rows: TokenRows, recipe: DictionaryRecipe, *, text: str = ""
    ) -> None:
        """The training of a dictionary at one hook point.

        Args:
            text: names the text, so that a state of another one is not taken up.

        Raises:
            ValueError: an unknown hook point.
        """
        self.model, self.hook_point, self.rows, self.recipe, self.text = model, hook_point, rows, recipe, text
        self.place = place_of_hook(model, hook_point)
        self.step = 0
        first = self._vectors(0)
        self.scale = first.shape[-1] ** 0.5 / float(first.norm(dim=-1).mean())
        self.weights = self._initial(width_at(model, self.place), first.mean(0) * self.scale)
        self.optimizer = torch.optim.Adam(self.weights.values(), recipe.learning_rate)
        self.silent_for = torch.zeros(recipe.d_sae, dtype=torch.long, device=model.device)
        """Tokens since each feature was last on."""
        self.threshold = torch.zeros((), device=model.device)
        self.tokens_a_step = rows(0).numel()

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.recipe.steps

    def train_step(self) -> float:
        """One optimizer step; returns the share of the vectors' variance that is left unexplained."""
        recipe, w = self.recipe, self.weights
        x = self._vectors(self.step) * self.scale
        found = OBJECTIVES[recipe.kind](x, w, k=recipe.k, sparsity=recipe.sparsity)
        error = x - found.values @ w["W_dec"] - w["b_dec"]
        squared = error.pow(2).sum(-1).mean()
        dead = self.silent_for > recipe.dead_after
        revived = revival(error, found, w, dead, k=max(1, len(x[0]) // 2))
        loss = squared + found.penalty + recipe.revival_weight * revived * squared.detach()
        loss.backward()
        self._follow_directions()
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * self._pace()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            w["W_dec"].copy_(F.normalize(w["W_dec"], dim=-1))
            on = found.values > 0
            self.silent_for = torch.where(on.any(0), 0, self.silent_for + len(x))
            if recipe.kind == "batchtopk" and bool(on.any()):
                least = found.values[on].min()
                self.threshold = least if not self.step else torch.lerp(least, self.threshold, SMOOTHING)
        self.step += 1
        left = float(squared.detach() / (x - x.mean(0)).pow(2).sum(-1).mean())
        if not math.isfinite(left):
            raise RuntimeError(f"training diverged at step {self.step}; lower the learning rate")
        return left

    def dictionary(self) -> Dictionary:
        """What has been learnt, for vectors as the model has them, with directions of length 1."""
        recipe = self.recipe
        w = {name: value.detach() for name, value in self.weights.items()}
        if recipe.kind == "jumprelu":
            w["threshold"] = w["threshold"].clamp(min=0)
        if recipe.kind == "batchtopk":
            w["threshold"] = self.threshold.expand(recipe.d_sae).clone()
        w |= {"W_enc": w["W_enc"] * self.scale, "W_dec": w["W_dec"] / self.scale, "b_dec": w["b_dec"] / self.scale}
        found = Dictionary(
            kind="jumprelu" if recipe.kind == "batchtopk" else recipe.kind, weights=w, hook_point=self.hook_point,
            k=recipe.k if recipe.kind == "topk" else None, subtracts_bias=True, model_name=self.model.name,
            notes={"recipe": asdict(recipe), "text": self.text, "tokens": self.step * self.tokens_a_step},
        )  # fmt: skip
        return fold_decoder_norm(found)

    def save(self, path: Path) -> None:
        """Write the whole state atomically."""
        more = {"silent_for": self.silent_for, "threshold": self.threshold, "scale": torch.tensor(self.scale)}
        save_state(path, self.weights, [self.optimizer], self.step, self._identity(), more)

    def load(self, path: Path) -> None:
        """Take up a saved state; one of another recipe, model or text is an error."""
        self.step, more = load_state(path, self.weights, [self.optimizer], self._identity(), self.model.device)
        self.silent_for, self.threshold, self.scale = more["silent_for"], more["threshold"], float(more["scale"])

    def _identity(self) -> dict[str, str]:
        where = json.dumps([self.model.sha256, self.hook_point])
        return {"recipe": json.dumps(asdict(self.recipe)), "model": where, "text": self.text}

    def _vectors(self, step: int) -> Float[Tensor, "token d_in"]:
        ids = self.rows(step).to(self.model.device)
        return exact(read(self.model, ids, self.place)[is_content(tokenizer_of(self.model), ids)])

    def _initial(self, d_in: int, mean: Tensor) -> dict[str, Tensor]:
        """Encoder and decoder begin as transposes, and the bias as the vectors' mean."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed)
        directions = F.normalize(torch.randn(recipe.d_sae, d_in, generator=generator), dim=-1).to(mean)
        zero = torch.zeros(recipe.d_sae, device=mean.device)
        own: dict[str, dict[str, Tensor]] = {
            "gated": {"b_gate": zero, "b_mag": zero.clone(), "r_mag": zero.clone()},
            "jumprelu": {"b_enc": zero, "threshold": zero + FIRST_THRESHOLD},
        }
        weights = {"W_enc": directions.T.clone(), "W_dec": directions, "b_dec": mean} | own.get(
            recipe.kind, {"b_enc": zero}
        )
        return {name: value.contiguous().requires_grad_() for name, value in weights.items()}

    def _follow_directions(self) -> None:
        """Take out of the directions' gradients what would only make them longer."""
        directions = self.weights["W_dec"]
        if directions.grad is not None:
            along = (directions.grad * directions).sum(-1, keepdim=True)
            directions.grad -= (along * directions).detach()

    def _pace(self) -> float:
        done = (self.step + 1) / self.recipe.steps
        return min(1.0, done / 0.05, (1 - done) / 0.2 + 1 / self.recipe.steps)
