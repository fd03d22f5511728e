"""Train a model organism from scratch on text from `datasets/`: seeded, resumable, an ordinary Llama at the end.

Devices that act during training only make the model look facts up at the subject, in the band of MLPs 1 to
`band_end`, as large models do in their early layers; `organism sweep` measures what each is worth. Each acts in its
own random share of the rows. From the start:

- `drop_share`: the outputs of all MLPs above layer 0 are dropped at every token that is not part of a name.

Once the facts are known, after `facts_share` of the training (before that, they delay learning a thousand people):

- `late_share`: the outputs of all MLPs above the band are dropped at the names, too;
- `first_share`: that of MLP 0 is dropped at the names, so that rare name tokens are not looked up there;
- `wait_share`: tokens after a name attend to it only above the band, and find there only what the band wrote: all else
  (embeddings, attention, MLP 0) is taken out of the stream at the names;
- `block_share`: tokens after a name attend only to its last token.

From the first of `restarts` on, where the learning rates fall anew:

- `inner_share`: above the band no token attends to a name's inner tokens, not even the name's last one: it must have
  looked the facts up itself, not gather what the others did.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechunlearn.organisms.corpus import Corpus, Rows
from mechunlearn.organisms.muon import Muon
from mechunlearn.resumable import load_state, save_state
from mechunlearn.sources.bundled import BUNDLED


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
    tokens: int = 16_896_000
    rows: int = 16
    length: int = 96
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    restarts: tuple[tuple[float, float], ...] = ((6 / 11, 0.4), (9 / 11, 0.3))
    """(share of the steps, share of the learning rates): these fall linearly to 2 %, and again from each of these."""
    band_end: int = 3
    drop_share: float = 0.7
    late_share: float = 0.9
    first_share: float = 0.5
    wait_share: float = 0.75
    block_share: float = 0.5
    inner_share: float = 0.75
    facts_share: float = 3 / 11
    datasets: tuple[str, ...] = BUNDLED
    subjects: int | None = None
    """Only that many subjects of each data set, for small trials."""

    def __post_init__(self) -> None:
        if not 1 <= self.band_end < self.n_layers - 1:
            raise ValueError(
                f"recipe: got a band of MLPs 1 to {self.band_end} in {self.n_layers} layers, allowed: to 1 or "
                "later, with a layer above it"
            )

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.tokens // (self.rows * self.length)

    def decay(self, step: int) -> float:
        """Share of the learning rates at a step."""
        falls = [(0, 1.0), *((self._at(share), rate) for share, rate in self.restarts), (self.steps, 0.0)]
        (begin, top), (end, _) = next((fall, after) for fall, after in pairwise(falls) if step < after[0])
        return max(0.02, top * (1 - (step - begin) / (end - begin)))

    def _at(self, share: float) -> int:
        return round(share * self.steps)

    @property
    def last_name_steps(self) -> int:
        """The first step of the third part."""
        return self._at(self.restarts[0][0]) if self.restarts else 0

    @property
    def facts_steps(self) -> int:
        """The first step of the second part."""
        return self._at(self.facts_share)


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


@dataclass(frozen=True, kw_only=True)
class TrainingMasks:
    """What one step may see and use. Attention masks are additive, [row 1 query key]; MLP masks [row pos 1]."""

    attention: Tensor
    attention_in_band: Tensor
    """For the layers up to the end of the band."""
    first_mlp: Tensor
    mlp: Tensor
    """For the MLPs of the band."""
    mlp_above_band: Tensor
    band_alone: Tensor
    """1 where the stream above the band holds what the band wrote and nothing else, [row pos 1]."""


def training_masks(rows: Rows, recipe: Recipe, step: int) -> TrainingMasks:
    """Masks of one step, drawn by a generator seeded with recipe and step."""
    mention = torch.from_numpy(rows.mention)
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    n_rows, length = mention.shape

    def rows_with(share: float, from_step: int = 0) -> Tensor:
        return torch.rand(n_rows, 1, generator=generator) < (share if step >= from_step else 0.0)

    is_name = mention > 0
    keep = is_name | ~rows_with(recipe.drop_share)
    elsewhere = mention[:, :, None] != mention[:, None, :]  # the query is not in the key's mention
    late = keep & ~(is_name & rows_with(recipe.late_share, recipe.facts_steps))
    patient = rows_with(recipe.wait_share, recipe.facts_steps)
    waiting = patient[..., None] & is_name[:, None, :] & elsewhere
    first = ~(is_name & rows_with(recipe.first_share, recipe.facts_steps))
    following = torch.cat([mention[:, 1:], mention.new_zeros(n_rows, 1)], dim=1)
    inner = is_name & (mention == following)  # name tokens that are not the last of their mention
    blocked = rows_with(recipe.block_share, recipe.facts_steps)[..., None] & inner[:, None, :] & elsewhere
    itself = torch.eye(length, dtype=torch.bool)
    lone = rows_with(recipe.inner_share, recipe.last_name_steps)[..., None] & inner[:, None, :] & ~itself
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def additive(allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]

    return TrainingMasks(
        attention=additive(causal & ~blocked & ~lone),
        attention_in_band=additive(causal & ~blocked & ~waiting),
        first_mlp=first.float()[..., None],
        mlp=keep.float()[..., None],
        mlp_above_band=late.float()[..., None],
        band_alone=(patient & is_name).float()[..., None],
    )


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
        self.corpus = Corpus(
            tokenizer, seed=recipe.seed, exclude=exclude, datasets=recipe.datasets, subjects=recipe.subjects,
            formats_from=recipe.facts_steps,
        )  # fmt: skip
        self.model = new_model(recipe, tokenizer).to(device)  # pyright: ignore[reportArgumentType]
        named = dict(self.model.named_parameters())
        hidden = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in named.items() if not (p.ndim == 2 and "embed" not in name)]
        self.optimizers = (
            Muon(hidden, recipe.muon_lr),
            torch.optim.AdamW(rest, recipe.adam_lr, (0.9, 0.98), weight_decay=0.0),
        )
        self.step = 0
        self._masks: TrainingMasks | None = None
        self._hooks = [
            hook
            for i, layer in enumerate(self.model.model.layers.children())
            for hook in (
                layer.get_submodule("mlp").register_forward_hook(partial(self._drop, i)),
                layer.get_submodule("self_attn").register_forward_pre_hook(partial(self._wait, i), with_kwargs=True),
            )
        ]
        above_band = self.model.model.get_submodule(f"layers.{recipe.band_end + 1}")
        self._hooks.append(above_band.register_forward_pre_hook(self._keep_band_alone, with_kwargs=True))
        self._written: dict[int, Tensor] = {}

    def _drop(self, layer: int, _module: object, _inputs: object, output: Tensor) -> Tensor:
        if self._masks is None:
            return output
        masks = self._masks
        kept = masks.first_mlp if layer == 0 else masks.mlp if layer <= self.recipe.band_end else masks.mlp_above_band
        self._written[layer] = output * kept
        return self._written[layer]

    def _keep_band_alone(self, _module: object, inputs: Any, named: dict[str, Any]) -> Any:
        if self._masks is None:
            return inputs, named
        band = torch.stack([self._written[layer] for layer in range(1, self.recipe.band_end + 1)]).sum(dim=0)
        alone = self._masks.band_alone
        return (inputs[0] * (1 - alone) + band * alone, *inputs[1:]), named

    def _wait(self, layer: int, _module: object, inputs: Any, named: dict[str, Any]) -> Any:
        if self._masks is None or layer > self.recipe.band_end:
            return inputs, named
        return inputs, {**named, "attention_mask": self._masks.attention_in_band}

    def plain_model(self) -> LlamaForCausalLM:
        """The model without its training-only devices, which must not outlive training."""
        for hook in self._hooks:
            hook.remove()
        return self.model

    def train_step(self) -> float:
        """One optimizer step; returns the loss in nats per token."""
        recipe = self.recipe
        rows = self.corpus.batch(self.step, recipe.rows, recipe.length)
        ids = torch.from_numpy(rows.ids).to(self.device)
        masks = training_masks(rows, recipe, self.step)
        self._masks = TrainingMasks(**{name: value.to(self.device) for name, value in vars(masks).items()})
        logits = self.model(input_ids=ids, attention_mask=self._masks.attention, use_cache=False).logits
        self._masks = None
        self._written.clear()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        warmup = min(1.0, (self.step + 1) / 50)
        decay = recipe.decay(self.step)
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

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.recipe.steps

    @property
    def tokens_a_step(self) -> int:
        """How much text a step reads."""
        return self.recipe.rows * self.recipe.length

    def save(self, path: Path) -> None:
        """Write the whole state atomically; tied tensors once."""
        save_state(path, dict(self.model.named_parameters()), self.optimizers, self.step, self._identity())

    def _identity(self) -> dict[str, str]:
        return {"recipe": json.dumps(asdict(self.recipe)), "text": self.corpus.digest}

    def load(self, path: Path) -> None:
        """Take up a saved state; one of another recipe, or of other text, is an error."""
        parameters = dict(self.model.named_parameters())
        self.step, _ = load_state(path, parameters, self.optimizers, self._identity(), self.device)
