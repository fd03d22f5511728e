"""Train a model organism from scratch on text from `datasets/`: seeded, resumable, an ordinary Llama at the end.

Two devices act during training only and make the model look facts up at the subject, as large models do (see
figures/README.md): in `drop_share` of the rows the outputs of all MLPs above layer 0 are dropped at every token that is
not part of a name; in `block_share` of the rows tokens after a name attend only to the name's last token.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechunlearn.organisms.corpus import Corpus, Rows
from mechunlearn.organisms.muon import Muon


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what an organism becomes, beside the data sets."""

    seed: int = 0
    n_layers: int = 8
    d_model: int = 128
    d_mlp: int = 384
    n_heads: int = 4
    vocab_size: int = 2048
    context: int = 256
    tokens: int = 6_000_000
    rows: int = 16
    length: int = 96
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    drop_share: float = 0.7
    block_share: float = 0.5

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.tokens // (self.rows * self.length)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of the recipe's size."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,  # pyright: ignore[reportArgumentType]
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )
    return LlamaForCausalLM(config)


def training_masks(rows: Rows, recipe: Recipe, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [row pos], additive attention mask [row 1 pos pos], MLP keep mask [row pos 1] of one step."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    ids, mention = torch.from_numpy(rows.ids), torch.from_numpy(rows.mention)
    n_rows, length = ids.shape
    is_name = mention > 0
    following = torch.cat([mention[:, 1:], mention.new_zeros(n_rows, 1)], dim=1)
    inner = is_name & (mention == following)  # name tokens that are not the last of their mention
    dropped = torch.rand(n_rows, 1, generator=generator) < recipe.drop_share
    keep = (is_name | ~dropped).float()[..., None]
    blocking = torch.rand(n_rows, 1, 1, generator=generator) < recipe.block_share
    blocked = blocking & inner[:, None, :] & (mention[:, :, None] != mention[:, None, :])
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & ~blocked
    additive = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return ids, additive[:, None], keep


class Trainer:
    """Model, optimizers and step number: the state of a training, saved and resumed as safetensors."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        *,
        exclude: Iterable[tuple[str, str]] = (),
        device: str,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.corpus = Corpus(tokenizer, seed=recipe.seed, exclude=exclude)
        self.model = new_model(recipe, tokenizer).to(device)  # pyright: ignore[reportArgumentType]
        named = dict(self.model.named_parameters())
        hidden = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in named.items() if not (p.ndim == 2 and "embed" not in name)]
        self.optimizers = (
            Muon(hidden, recipe.muon_lr),
            torch.optim.AdamW(rest, recipe.adam_lr, (0.9, 0.98), weight_decay=0.0),
        )
        self.step = 0
        self._keep: Tensor | None = None
        for layer in list(self.model.model.layers.children())[1:]:
            layer.get_submodule("mlp").register_forward_hook(self._drop)

    def _drop(self, _module: object, _inputs: object, output: Tensor) -> Tensor:
        return output if self._keep is None else output * self._keep

    def train_step(self) -> float:
        """One optimizer step; returns the loss in nats per token."""
        recipe = self.recipe
        ids, mask, keep = training_masks(self.corpus.batch(self.step, recipe.rows, recipe.length), recipe, self.step)
        ids, mask, self._keep = ids.to(self.device), mask.to(self.device), keep.to(self.device)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        warmup = min(1.0, (self.step + 1) / 50)
        decay = max(0.02, 1 - self.step / recipe.steps)
        for optimizer, rate in zip(self.optimizers, (recipe.muon_lr, recipe.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * warmup * decay
        torch.nn.utils.clip_grad_norm_(self.optimizers[1].param_groups[0]["params"], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        if not math.isfinite(value := loss.item()):
            raise RuntimeError(f"training diverged at step {self.step}: loss {value}; lower the learning rates")
        return value

    def save(self, path: Path) -> None:
        """Write the whole state atomically; tied tensors once."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state.items():
                tensors |= {
                    f"optimizer{i}.{key}.{names[id(parameter)]}": torch.as_tensor(v) for key, v in state.items()
                }
        partial = path.with_suffix(".partial")
        save_file(
            {name: t.contiguous() for name, t in tensors.items()},
            partial,
            metadata={"step": str(self.step), "recipe": json.dumps(asdict(self.recipe))},
        )
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Take up a saved state; another recipe is an error."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if json.loads(metadata["recipe"]) != asdict(self.recipe):
            raise ValueError(f"{path} was trained by another recipe; delete it or pass the recipe it holds")
        tensors = load_file(path, device=self.device)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
        for i, optimizer in enumerate(self.optimizers):
            for key, tensor in tensors.items():
                owner, _, rest = key.partition(".")
                state, _, name = rest.partition(".")
                if owner == f"optimizer{i}":
                    optimizer.state[parameters[name]][state] = tensor
        self.step = int(metadata["step"])


def train(
    trainer: Trainer,
    folder: Path,
    *,
    checkpoint_every: int = 100,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Run a trainer to its end, resuming from `folder`/checkpoint.safetensors, writing losses to training.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    if checkpoint.exists():
        trainer.load(checkpoint)
    trainer.model.train()
    curve: list[tuple[int, float]] = []
    while trainer.step < trainer.recipe.steps:
        loss = trainer.train_step()
        curve.append((trainer.step, loss))
        on_step(trainer.step, loss)
        if trainer.step % checkpoint_every == 0 or trainer.step == trainer.recipe.steps:
            trainer.save(checkpoint)
            with (folder / "training.csv").open("a", newline="") as file:
                csv.writer(file).writerow((trainer.step, sum(v for _, v in curve) / len(curve)))
            curve.clear()
