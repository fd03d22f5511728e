"""Long trainings that survive a kill: their state as safetensors, their curve as csv."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechunlearn.files import whole_file

CHECKPOINT, CURVE = "checkpoint.safetensors", "training.csv"


class Training(Protocol):
    """What `run_training` needs of a training; `step` counts what is done."""

    step: int

    @property
    def steps(self) -> int:
        """How many there are to be."""
        ...

    @property
    def tokens_a_step(self) -> int:
        """How much text a step reads."""
        ...

    def train_step(self) -> float:
        """Take one step; returns its loss."""
        ...

    def save(self, path: Path) -> None:
        """Write the whole state."""
        ...

    def load(self, path: Path) -> None:
        """Take up what `save` wrote."""
        ...


def run_training(
    training: Training,
    folder: Path,
    *,
    checkpoint_every: int = 100,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_checkpoint: Callable[[Path], None] = lambda curve: None,
) -> None:
    """Run a training to its end, going on from `folder`/checkpoint.safetensors if it is there.

    Args:
        on_step: receives the number of steps done and the last loss.
        on_checkpoint: receives the path of training.csv (tokens, mean loss since the row before) whenever it grew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, curve = folder / CHECKPOINT, folder / CURVE
    if checkpoint.exists():
        training.load(checkpoint)
    _forget_rows_after(curve, training.step * training.tokens_a_step)
    losses: list[float] = []
    while training.step < training.steps:
        losses.append(training.train_step())
        on_step(training.step, losses[-1])
        if training.step % checkpoint_every == 0 or training.step == training.steps:
            training.save(checkpoint)
            is_new = not curve.exists()
            with curve.open("a", newline="") as file:
                rows = [("tokens", "loss")] if is_new else []
                row = (training.step * training.tokens_a_step, round(sum(losses) / len(losses), 5))
                csv.writer(file).writerows([*rows, row])
            losses.clear()
            on_checkpoint(curve)


def _forget_rows_after(curve: Path, tokens: int) -> None:
    """Drop the rows of steps that will be taken again, written between a checkpoint and a kill."""
    if curve.exists():
        head, *rows = curve.read_text().splitlines()
        kept = [row for row in rows if int(row.split(",")[0]) <= tokens]
        curve.write_text("\n".join([head, *kept]) + "\n")


def save_state(
    path: Path,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    identity: Mapping[str, str],
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Write parameters, optimizers and step as one file.

    Args:
        identity: what decides the training; a state of another one is not taken up.
        more: further tensors of the state.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    for i, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer{i}.{key}.{names[id(parameter)]}": torch.as_tensor(v) for key, v in state.items()}
    tensors |= {f"more.{name}": value for name, value in (more or {}).items()}
    with whole_file(path) as partial:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial,
            metadata={"step": str(step), **identity},
        )  # fmt: skip


def load_state(
    path: Path,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    identity: Mapping[str, str],
    device: torch.device | str,
) -> tuple[int, dict[str, Tensor]]:
    """Take up what `save_state` wrote; returns the step and the further tensors.

    Raises:
        ValueError: the state of another training.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for what, mine in identity.items():
        if metadata.get(what) != mine:
            raise ValueError(f"{path} was trained with another {what}: delete it, or train into another folder")
    more: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, tensor in load_file(path, device=str(device)).items():
            owner, _, rest = key.partition(".")
            if owner == "model":
                parameters[rest].copy_(tensor)
            elif owner == "more":
                more[rest] = tensor
            else:
                state, _, name = rest.partition(".")
                optimizers[int(owner.removeprefix("optimizer"))].state[parameters[name]][state] = tensor
    return int(metadata["step"]), more
