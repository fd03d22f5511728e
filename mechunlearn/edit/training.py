"""The one training loop, over stand-ins for some of the parameters: the model object itself is never changed by it."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechunlearn.components import Component
from mechunlearn.denormals import denormals_as_zero
from mechunlearn.edit.prefix import DEFAULT_GB, PrefixCache
from mechunlearn.edit.stand_ins import checkpointed, standing_in
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model, is_transposed, weight_matrices

Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True, eq=False)
class Forward:
    """The forward pass of a model with other tensors in place of some of its parameters, which are left as they are."""

    model: Model
    overrides: Mapping[str, Tensor]

    def __call__(self, ids: Int[Tensor, "row pos"], kept: Int[Tensor, " kept"]) -> Float[Tensor, "row kept d_vocab"]:
        """(token ids padded on the right, positions whose logits are wanted) -> logits in float32."""
        with standing_in(self.model, self.overrides):
            return self.model.hf(ids, use_cache=False, logits_to_keep=kept).logits.float()

    def shifted(self, by: Mapping[str, Tensor]) -> "Forward":
        """The same with these added to the parameters they are named by."""
        own = dict(self.model.hf.named_parameters())
        moved = {name: self.overrides.get(name, own[name].detach()) + change for name, change in by.items()}
        return Forward(self.model, {**self.overrides, **moved})

    def detached(self) -> "Forward":
        """The same without a gradient to what stands in."""
        return Forward(self.model, {name: value.detach() for name, value in self.overrides.items()})


class Diverged(ValueError):
    """A loss that is not finite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trainable:
    """What is trained, and how parameters of the model follow from it.

    Gradients and optimizer state exist for the leaves only, so their size is that of the leaves.
    """

    leaves: Mapping[str, nn.Parameter]
    """By a name of their own; always float32, whatever the model's dtype."""
    compute: Callable[[Mapping[str, nn.Parameter]], dict[str, Tensor]]

    def overrides(self) -> dict[str, Tensor]:
        """Parameter name -> tensor in the model's dtype that stands in for it, differentiable in the leaves."""
        return self.compute(self.leaves)


def masked_trainable(model: Model, mask: ParameterMask) -> Trainable:
    """Train the masked entries only; all others are bit-identical by construction, not by zeroed gradients.

    A tensor selected as a whole is one leaf of its shape. Of any other the selected entries are one flat leaf v, and
    W' = W with its masked entries, in row-major order, replaced by v.

    Gradients and optimizer state are held for the masked entries alone. While a step lasts, each matrix that is masked
    in part is there once more as W', and by the end of the backward pass once more as the gradient of W'.
    """
    parameters = dict(model.hf.named_parameters())
    bases = {name: parameters[name].detach() for name in mask.entries}
    selected = {name: None if mask.is_whole(name) else mask.full(name).to(model.device) for name in bases}

    def leaf(name: str) -> nn.Parameter:
        where = selected[name]
        value = bases[name] if where is None else bases[name][where]
        return nn.Parameter(value.to(torch.float32, copy=True))

    def compute(leaves: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        made = {}
        for name, base in bases.items():
            value, where = leaves[name].to(base.dtype), selected[name]
            made[name] = value if where is None else base.masked_scatter(where, value)
        return made

    return Trainable(leaves={name: leaf(name) for name in bases}, compute=compute)


def low_rank_trainable(model: Model, mask: ParameterMask, rank: int, *, seed: int = 0) -> Trainable:
    """Low-rank updates inside a mask: W' = W + M * (B A), with M the mask of the matrix, 0 or 1.

    Gradients and optimizer state take rank * (d_in + d_out) floats a matrix. Biases in the mask stay as they are.
    Shapes: as in `lora_trainable`, but d_out and d_in are the parameter's own axes, whichever way it is stored.

    Raises:
        ValueError: rank below 1, or a mask without a matrix.

    Source: Hu et al. 2021, arXiv:2106.09685; masked here.
    """
    parameters = dict(model.hf.named_parameters())
    bases = {name: parameters[name].detach() for name in mask.entries if parameters[name].ndim == 2}
    if rank < 1 or (mask.entries and not bases):
        raise ValueError(f"low rank: got rank {rank}, {len(bases)} matrices, allowed: rank >= 1 and a masked matrix")
    selected = {name: None if mask.is_whole(name) else mask.entries[name].to(model.device) for name in bases}
    generator = torch.Generator().manual_seed(seed)
    leaves: dict[str, nn.Parameter] = {}
    for name, base in bases.items():
        drawn = torch.randn(rank, base.shape[1], generator=generator) / base.shape[1] ** 0.5
        leaves[f"{name}.A"] = nn.Parameter(drawn.to(model.device))
        leaves[f"{name}.B"] = nn.Parameter(torch.zeros(base.shape[0], rank, device=model.device))

    def compute(leaves: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        made = {}
        for name, base in bases.items():
            update, where = (leaves[f"{name}.B"] @ leaves[f"{name}.A"]).to(base.dtype), selected[name]
            made[name] = base + (update if where is None else update * where)
        return made

    return Trainable(leaves=leaves, compute=compute)


def lora_trainable(
    model: Model, rank: int, *, layers: Iterable[int] | None = None, alpha: float | None = None, seed: int = 0
) -> Trainable:
    """Low-rank updates of every weight matrix of attention and MLP: W' = W + (alpha / rank) B A.

    Shapes: W [d_out d_in], A [rank d_in] drawn from N(0, 1 / d_in), B [d_out rank] zero; transposed for GPT-2's Conv1D.

    Args:
        layers: which layers; None means all.
        alpha: scale of the update; None means `rank`, i.e. a factor of 1.

    Raises:
        ValueError: rank below 1, or a layer the model does not have.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    wanted = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    if rank < 1 or not all(0 <= layer < model.n_layers for layer in wanted):
        raise ValueError(
            f"lora: got rank {rank}, layers {wanted}, allowed: rank >= 1, layers 0 to {model.n_layers - 1}"
        )
    parameters = dict(model.hf.named_parameters())
    components = [Component(kind, layer) for layer in wanted for kind in ("attention", "mlp")]
    bases = {name: parameters[name].detach() for name in weight_matrices(model, components)}
    flipped = {name: is_transposed(model, name) for name in bases}
    generator = torch.Generator().manual_seed(seed)
    leaves: dict[str, nn.Parameter] = {}
    for name, base in bases.items():
        d_out, d_in = base.shape[::-1] if flipped[name] else base.shape
        drawn = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        leaves[f"{name}.A"] = nn.Parameter(drawn.to(model.device))
        leaves[f"{name}.B"] = nn.Parameter(torch.zeros(d_out, rank, device=model.device))
    scale = (rank if alpha is None else alpha) / rank

    def compute(leaves: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        made = {}
        for name, base in bases.items():
            update = scale * (leaves[f"{name}.B"] @ leaves[f"{name}.A"])
            made[name] = base + (update.T if flipped[name] else update).to(base.dtype)
        return made

    return Trainable(leaves=leaves, compute=compute)


def train(
    model: Model,
    trainable: Trainable,
    loss: Callable[[int, Forward], Float[Tensor, ""]],
    *,
    steps: int,
    learning_rate: float,
    schedule: Schedule = "cosine",
    clip: float = 1.0,
    accumulation: int = 1,
    prefix_cache_gb: float = DEFAULT_GB,
    checkpoint: bool = False,
    on_step: Callable[[int], object] | None = None,
) -> tuple[float, ...]:
    """Fit the leaves with AdamW; the model is run in eval mode with the stand-ins in place, its own weights untouched.

    While the loop runs no parameter of the model requires a gradient, so backward stops at the earliest layer with
    a stand-in; forward passes start there, too, on rows that were seen before (see edit/prefix.py). The model's
    flags and forwards, the modules' train flags and the global random state are as before on return and on error.
    On CPUs denormal numbers count as 0 while it runs.

    Args:
        loss: called `accumulation` times a step with the number of the call and a `Forward`; the mean is minimised.
        schedule: "cosine" falls from `learning_rate` to 0 after the last step.
        clip: largest norm of the gradient over all leaves.
        prefix_cache_gb: memory for the streams at the earliest trained block; 0 computes them anew each time.
        checkpoint: of the trained blocks and those above keep the input alone, and run them again in the backward
            pass: one more forward pass of time, and the activations of one block in memory.
        on_step: called with the number of steps done, after each; may look at the model `substituted` with the
            current `trainable.overrides()`, and ends the training by returning True.

    Returns:
        The loss of each step, taken before its update.

    Raises:
        Diverged: a loss that is not finite; a ValueError.
    """
    if steps < 0 or accumulation < 1 or not learning_rate > 0:
        raise ValueError(
            f"train: got steps {steps}, accumulation {accumulation}, learning_rate {learning_rate}, "
            "allowed: steps >= 0, accumulation >= 1, learning_rate > 0"
        )
    leaves = list(trainable.leaves.values())
    if not leaves or not steps:
        return ()
    optimizer = torch.optim.AdamW(leaves, lr=learning_rate, weight_decay=0.0, fused=True)
    shape = _cosine if schedule == "cosine" else _constant
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: shape(done / steps))
    history: list[float] = []
    prefix = PrefixCache.below(model, trainable.overrides(), gb=prefix_cache_gb)
    again = range(prefix.layer, model.n_layers) if checkpoint else ()

    def backward(call: int) -> float:
        """Add one call's share of the gradient to the leaves'."""
        overrides = trainable.overrides()
        with prefix.active(), checkpointed(model, again):
            value = loss(call, Forward(model, overrides)) / accumulation
            with standing_in(model, overrides):  # for the blocks that are run again
                value.backward()
        return float(value.detach())

    with _frozen(model), denormals_as_zero():
        for step in range(steps):
            total = sum(backward(step * accumulation + micro) for micro in range(accumulation))
            if not math.isfinite(total):
                raise Diverged(f"training: the loss is {total} at step {step + 1} of {steps}; lower the learning_rate")
            nn.utils.clip_grad_norm_(leaves, clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            history.append(total)
            if on_step is not None and on_step(step + 1) is True:
                break
    return tuple(history)


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _constant(_: float) -> float:
    return 1.0


@contextlib.contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No gradients for the model's own parameters, eval mode, and a random state of its own; all put back."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.hf.parameters()]
    modes = [(module, module.training) for module in model.hf.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            model.hf.requires_grad_(False).eval()
            yield
        finally:
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


@contextlib.contextmanager
def substituted(model: Model, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the named parameters hold these values; afterwards, also on error, their old ones bit for bit.

    Values are copied into the existing storage, so everything that shares it (TransformerLens' bridge) sees them; a
    cached bridge with copies of its own (GPT-NeoX) is dropped on both ways, to be built anew.

    Args:
        tensors: parameter name -> new value of the parameter's shape.

    Raises:
        ValueError: an unknown parameter or another shape; the model is then untouched.
    """
    parameters = dict(model.hf.named_parameters())
    for name, value in tensors.items():
        if name not in parameters or parameters[name].shape != value.shape:
            allowed = tuple(parameters[name].shape) if name in parameters else f"a parameter of '{model.name}'"
            raise ValueError(f"substitute: got {name!r} of shape {tuple(value.shape)}, allowed: {allowed}")
    saved = {name: parameters[name].detach().clone() for name in tensors}
    try:
        _copy_into(model, parameters, tensors)
        yield
    finally:
        _copy_into(model, parameters, saved)


@torch.no_grad()
def _copy_into(model: Model, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
    if "bridge" in vars(model) and not set(model.copied_parameters).isdisjoint(values):
        del vars(model)["bridge"]  # a cached_property: the next look builds it from the present values
