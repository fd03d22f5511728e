"""Tensors in place of parameters for a while, and blocks that the backward pass runs again with them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mechunlearn.activations import instead
from mechunlearn.models import Model, block


@contextmanager
def standing_in(model: Model, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, modules hold these tensors in place of their parameters, so that gradients reach them; nothing is copied.

    As `torch.func.functional_call`, but a backward pass that runs blocks again can be inside, too.
    """
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        held.append((cast(dict[str, Any], model.hf.get_submodule(path)._parameters), own, tensor))
    originals = [parameters[own] for parameters, own, _ in held]
    try:
        for parameters, own, tensor in held:
            parameters[own] = tensor
        yield
    finally:
        for (parameters, own, _), original in zip(held, originals, strict=True):
            parameters[own] = original


@contextmanager
def checkpointed(model: Model, layers: Sequence[int]) -> Iterator[None]:
    """Inside, these blocks keep nothing but their inputs for the backward pass, which runs them again.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    with ExitStack() as stack:
        for module in (block(model, layer) for layer in layers):
            # in eval mode no block draws a random number
            again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(instead([module], again))
        yield
