"""Training a codebook together with the model that it sits in: the task, passing what came, and no dead codes."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from mechunlearn.codebook import CodebookShape, Form, Passed, codebook_loss
from mechunlearn.codebook_model import NAME, codebook_in
from mechunlearn.denormals import denormals_as_zero
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

    def shape(self, d_model: int) -> CodebookShape:
        """Of the codebook, in a model of that width."""
        d_code = self.d_code or (d_model if self.form == "plain" else 2 * d_model)
        return CodebookShape(d_model=d_model, n_codes=self.n_codes, k=self.k, d_code=d_code, form=self.form)


class CodebookTrainer:
    """Model, optimizer, step, and for how long each code has not been used."""

    def __init__(
        self, hf: PreTrainedModel, batches: Batches, recipe: CodebookRecipe, *, tokens_a_step: int, text: str = "",
        base: str = "",
    ) -> None:  # fmt: skip
        """The training of a model that has a fresh codebook in it (`insert_codebook`, `insert_in_encoder`).

        Args:
            text, base: name the text, and the model without its codebook, so that a state of others is not taken up.

        Raises:
            ValueError: the model has no codebook.
        """
        if (codebook := codebook_in(hf)) is None:
            raise ValueError("codebook: the model to train has none; insert one first")
        self.hf, self.codebook, self.batches, self.recipe = hf, codebook, batches, recipe
        self.identity = {"recipe": json.dumps(asdict(recipe)), "text": text} | ({"model": base} if base else {})
        self.tokens_a_step = tokens_a_step
        self.step = 0
        self._measure_scale()
        named = dict(hf.named_parameters())
        own = [parameter for name, parameter in named.items() if name.startswith(f"{NAME}.")]
        around = [parameter for name, parameter in named.items() if not name.startswith(f"{NAME}.")]
        self.rates = (recipe.learning_rate, recipe.model_learning_rate)
        for parameter in around:
            parameter.requires_grad_(recipe.model_learning_rate > 0)
        self.optimizer = torch.optim.Adam([{"params": own}, {"params": around}], lr=recipe.learning_rate)
        self.unused_for = torch.full((recipe.n_codes,), recipe.reseed_after + 1, device=hf.device)  # all start anew
        hf.train()

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.recipe.steps

    def train_step(self) -> float:
        """One optimizer step; returns the task's loss in nats per token."""
        task = self._task_loss(self.step)
        passed = self._passed()
        extra = codebook_loss(passed, reconstruction=self.recipe.reconstruction, commitment=self.recipe.commitment)
        (task + extra).backward()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._pace()
        torch.nn.utils.clip_grad_norm_(self.hf.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._reseed(passed)
        self.step += 1
        if not math.isfinite(value := float(task.detach())):
            raise RuntimeError(f"training diverged at step {self.step}; lower the learning rates")
        return value

    def save(self, path: Path) -> None:
        """Write the whole state atomically."""
        more = {"unused_for": self.unused_for}
        save_state(path, dict(self.hf.named_parameters()), [self.optimizer], self.step, self.identity, more)

    def load(self, path: Path) -> None:
        """Take up a saved state; one of another recipe or text is an error."""
        parameters = dict(self.hf.named_parameters())
        self.step, more = load_state(path, parameters, [self.optimizer], self.identity, self.hf.device)
        self.unused_for = more["unused_for"]

    def _task_loss(self, step: int) -> Tensor:
        """Dropout is drawn for the step, so that a training that was killed goes on alike."""
        batch = {name: value.to(self.hf.device) for name, value in self.batches(step).items()}
        with torch.random.fork_rng(devices=[self.hf.device] if self.hf.device.type == "cuda" else []):
            torch.manual_seed(self._seed(step))
            return self.hf(**batch, use_cache=False).loss

    @torch.no_grad()
    def _measure_scale(self) -> None:
        """Adam's steps are of a fixed size: at the norms of some models, codes in their units would hardly move."""
        self.codebook.scale.fill_(1)
        self._task_loss(0)
        self.codebook.scale.copy_(self._passed().x.norm(dim=-1).mean() / self.codebook.shape.d_model**0.5)

    def _seed(self, step: int) -> int:
        return self.recipe.seed * 1_000_003 + step

    def _passed(self) -> Passed:
        if (passed := self.codebook.passed) is None:
            raise RuntimeError("codebook: a forward pass of the model did not go through it")
        return passed

    @torch.no_grad()
    def _reseed(self, passed: Passed) -> None:
        """Codes that nothing is close to any more start again where something is, and learn as new ones."""
        used = torch.zeros_like(self.codebook.deleted)
        used[passed.codes.flatten()] = True
        self.unused_for = torch.where(used, 0, self.unused_for + self.tokens_a_step)
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

    def _pace(self) -> float:
        done = (self.step + 1) / self.recipe.steps
        return min(1.0, done / 0.02, (1 - done) / 0.5 + 1 / self.recipe.steps)


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
        text, base: as in `CodebookTrainer`.

    Raises:
        ValueError: the model has no codebook, or a folder that holds another training.
    """
    trainer = CodebookTrainer(
        hf, batches, recipe, tokens_a_step=batches(0)["input_ids"].numel(), text=text, base=base
    )  # fmt: skip
    with denormals_as_zero():
        run_training(trainer, Path(folder), on_step=on_step)
    hf.eval()
    trainer.codebook.passed = None
    return trainer
