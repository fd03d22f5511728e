"""Training a codebook together with the model that it sits in: the task, passing what came, and no dead codes."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechunlearn.codebook import CodebookShape, Form, Passed, codebook_loss
from mechunlearn.codebook_model import NAME, codebook_in
from mechunlearn.denormals import denormals_as_zero
from mechunlearn.features.token_rows import TokenRows
from mechunlearn.resumable import load_state, run_training, save_state

Batches = Callable[[int], Mapping[str, Tensor]]
"""Step -> what the model is called with, `labels` among it. The same step always gives the same batch."""
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class CodebookRecipe:
    """Everything that decides what a codebook model becomes, beside the model it starts from and the text."""

    layer: Annotated[int, Field(ge=0)] = 3
    n_codes: Count = 2048
    k: Count = 8
    d_code: Count | None = None
    """None: as wide as the activation where codes are plain, else twice that, so that nothing is lost at the start."""
    form: Form = "encoded"
    steps: Count = 2000
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Adam, of the codebook; warmed up in the first 2% of the steps, falling to 0 in the last half."""
    model_learning_rate: Weight = 5e-4
    """Likewise, of the model around it; 0 leaves it as it is."""
    reconstruction: Weight = 1.0
    commitment: Weight = 0.25
    reseed_after: Count = 60_000
    """Tokens without it after which a code is dead and starts anew at a vector of the current batch."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.reseed_after) < 1:
            raise ValueError(f"codebook: got steps {self.steps}, reseed_after {self.reseed_after}, allowed: 1 or more")

    def shape(self, d_model: int) -> CodebookShape:
        """Of the codebook, in a model of that width."""
        d_code = self.d_code or (d_model if self.form == "plain" else 2 * d_model)
        return CodebookShape(d_model=d_model, n_codes=self.n_codes, k=self.k, d_code=d_code, form=self.form)


class Tuner:
    """The training that a model with a codebook gets, of a model without one: what a codebook costs is told against it.

    Every weight is trained, at the recipe's `model_learning_rate`.
    """

    def __init__(
        self, hf: PreTrainedModel, batches: Batches, recipe: CodebookRecipe, *, text: str = "", base: str = ""
    ) -> None:
        """Model, optimizer and step.

        Args:
            text, base: name the text, and the model without a codebook, so that a state of others is not taken up.
        """
        self.hf, self.batches, self.recipe = hf, batches, recipe
        self.identity = {"recipe": json.dumps(asdict(recipe)), "text": text} | ({"model": base} if base else {})
        self.tokens_a_step = batches(0)["input_ids"].numel()
        self.step = 0
        groups = self._groups()
        self.rates = [rate for rate, _ in groups]
        self.optimizer = torch.optim.Adam([{"params": parameters} for _, parameters in groups], lr=0.0)
        hf.train()

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.recipe.steps

    def train_step(self) -> float:
        """One optimizer step; returns the task's loss in nats per token."""
        task = self._task_loss(self.step)
        (task + self._extra_loss()).backward()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._pace()
        torch.nn.utils.clip_grad_norm_(self.hf.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._after_step()
        self.step += 1
        if not math.isfinite(value := float(task.detach())):
            raise RuntimeError(f"training diverged at step {self.step}; lower the learning rates")
        return value

    def save(self, path: Path) -> None:
        """Write the whole state atomically."""
        parameters = dict(self.hf.named_parameters())
        save_state(path, parameters, [self.optimizer], self.step, self.identity, self._more())

    def load(self, path: Path) -> None:
        """Take up a saved state; one of another recipe or text is an error."""
        parameters = dict(self.hf.named_parameters())
        self.step, more = load_state(path, parameters, [self.optimizer], self.identity, self.hf.device)
        self._take_up(more)

    def _groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(self.recipe.model_learning_rate, list(self.hf.parameters()))]

    def _extra_loss(self) -> Tensor | float:
        return 0.0

    def _after_step(self) -> None:
        pass

    def _more(self) -> dict[str, Tensor]:
        return {}

    def _take_up(self, more: Mapping[str, Tensor]) -> None:
        pass

    def _task_loss(self, step: int) -> Tensor:
        """Dropout is drawn for the step, so that a training that was killed goes on alike."""
        batch = {name: value.to(self.hf.device) for name, value in self.batches(step).items()}
        self.mask = batch.get("attention_mask")
        with torch.random.fork_rng(devices=[self.hf.device] if self.hf.device.type == "cuda" else []):
            torch.manual_seed(self._seed(step))
            return self.hf(**batch, use_cache=False).loss

    def _seed(self, step: int) -> int:
        return self.recipe.seed * 1_000_003 + step

    def _pace(self) -> float:
        done = (self.step + 1) / self.recipe.steps
        return min(1.0, done / 0.02, (1 - done) / 0.5 + 1 / self.recipe.steps)


class CodebookTrainer(Tuner):
    """The training of a model with a fresh codebook in it (`insert_codebook`, `insert_in_encoder`).

    Padding under an attention mask is no vector to learn from.
    """

    def __init__(
        self, hf: PreTrainedModel, batches: Batches, recipe: CodebookRecipe, *, text: str = "", base: str = ""
    ) -> None:
        """Model, optimizer, step, and for how long each code has not been used.

        Args:
            text, base: as in `Tuner`.

        Raises:
            ValueError: the model has no codebook.
        """
        if (codebook := codebook_in(hf)) is None:
            raise ValueError("codebook: the model to train has none; insert one first")
        if (codebook.layer, codebook.shape) != (recipe.layer, recipe.shape(codebook.shape.d_model)):
            raise ValueError(
                f"codebook: the recipe is of layer {recipe.layer} and {recipe.shape(codebook.shape.d_model)}, the "
                f"model's is in layer {codebook.layer} and {codebook.shape}; insert Codebook(recipe.shape(d_model))"
            )
        self.codebook = codebook
        super().__init__(hf, batches, recipe, text=text, base=base)
        self.unused_for = torch.full((recipe.n_codes,), recipe.reseed_after + 1, device=hf.device)  # all start anew
        self._measure_scale()

    def _groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        named = dict(self.hf.named_parameters())
        own = [parameter for name, parameter in named.items() if name.startswith(f"{NAME}.")]
        around = [parameter for name, parameter in named.items() if not name.startswith(f"{NAME}.")]
        for parameter in around:
            parameter.requires_grad_(self.recipe.model_learning_rate > 0)
        return [(self.recipe.learning_rate, own), (self.recipe.model_learning_rate, around)]

    def _extra_loss(self) -> Tensor:
        return codebook_loss(
            self._passed(), reconstruction=self.recipe.reconstruction, commitment=self.recipe.commitment
        )

    def _more(self) -> dict[str, Tensor]:
        return {"unused_for": self.unused_for}

    def _take_up(self, more: Mapping[str, Tensor]) -> None:
        self.unused_for = more["unused_for"]

    @torch.no_grad()
    def _measure_scale(self) -> None:
        """Adam's steps are of a fixed size: at the norms of some models, codes in their units would hardly move."""
        self.codebook.scale.fill_(1)
        self._task_loss(0)
        self.codebook.scale.copy_(self._passed().x.norm(dim=-1).mean() / self.codebook.shape.d_model**0.5)

    def _passed(self) -> Passed:
        if (passed := self.codebook.passed) is None:
            raise RuntimeError("codebook: a forward pass of the model did not go through it")
        return passed if self.mask is None else passed.at(self.mask.bool())

    @torch.no_grad()
    def _after_step(self) -> None:
        """Codes that nothing is close to any more start again where something is, and learn as new ones."""
        passed = self._passed()
        used = torch.zeros_like(self.codebook.deleted)
        used[passed.codes.flatten()] = True
        self.unused_for = torch.where(used, 0, self.unused_for + passed.codes[..., 0].numel())
        dead = (self.unused_for > self.recipe.reseed_after).nonzero()[:, 0]
        if not len(dead):
            return
        generator = torch.Generator().manual_seed(self._seed(self.step))
        vectors = passed.z.detach().flatten(0, -2)
        drawn = vectors[torch.randint(len(vectors), (len(dead),), generator=generator).to(vectors.device)]
        noise = torch.randn(drawn.shape, generator=generator).to(drawn) * drawn.std() * 0.01  # none is the same twice
        self.codebook.codes[dead] = drawn + noise
        self.unused_for[dead] = 0
        state = self.optimizer.state[self.codebook.codes]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name][dead] = 0


def as_task(rows: TokenRows) -> Batches:
    """Rows of text as what a causal model is trained on: each token from those before it."""

    def batches(step: int) -> dict[str, Tensor]:
        ids = rows(step)
        return {"input_ids": ids, "labels": ids}

    return batches


def train_codebook(
    hf: PreTrainedModel,
    batches: Batches,
    recipe: CodebookRecipe,
    folder: Path,
    *,
    text: str = "",
    base: str = "",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> CodebookTrainer:
    """Train a model that has a fresh codebook in it, or go on where `folder` stopped; the model is in eval mode then.

    On CPUs denormal numbers count as 0 while it trains.

    Args:
        folder: receives checkpoint.safetensors and training.csv.
        text, base: as in `Tuner`.

    Raises:
        ValueError: the model has no codebook, or a folder that holds another training.
    """
    flags = {parameter: parameter.requires_grad for parameter in hf.parameters()}
    trainer = CodebookTrainer(hf, batches, recipe, text=text, base=base)
    _run(trainer, folder, on_step)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    trainer.codebook.passed = None
    return trainer


def train_alike(
    hf: PreTrainedModel, batches: Batches, recipe: CodebookRecipe, folder: Path, *, text: str = "", base: str = "",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:  # fmt: skip
    """Train a model without a codebook as `train_codebook` trains one with it: the same text, steps and rates.

    Nothing is trained where the recipe leaves the model around a codebook as it is.
    """
    if recipe.model_learning_rate:
        _run(Tuner(hf, batches, recipe, text=text, base=f"{base} without"), folder, on_step)


def _run(tuner: Tuner, folder: Path, on_step: Callable[[int, float], None]) -> None:
    with denormals_as_zero():
        run_training(tuner, Path(folder), on_step=on_step)
    tuner.hf.eval()
