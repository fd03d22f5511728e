"""TransformerLens' view of a model: a bridge that shares the Hugging Face model's parameters."""

import copy
from typing import TYPE_CHECKING

import torch

from mechunlearn.architectures import NotSupported
from mechunlearn.models import Model

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def build_bridge(model: Model) -> "TransformerBridge":
    """A fresh TransformerLens bridge whose parameters are the Hugging Face model's own.

    A shell of the same class without storage takes over the Parameter objects, so wrapping it leaves `model.hf`
    alone. Hooks, train mode and attention implementation are separate; `requires_grad` and `.grad` are shared.

    Building one changes neither flags nor the global random state: torch would switch `requires_grad` on in assigning
    a Parameter, and TransformerLens draws weights for fused projections that it then replaces.

    Raises:
        NotSupported: TransformerLens left a tensor of the shell empty, or the model has a codebook.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.hf.parameters()]
    try:
        with torch.random.fork_rng(devices=[]):
            return _build(model)
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def _build(model: Model) -> "TransformerBridge":
    from transformer_lens.model_bridge.sources._bridge_builder import (
        build_bridge_from_module,
        detect_tokenizer_bos_eos,
    )
    from transformers.initialization import no_init_weights

    hf = model.hf
    if "codebook" in hf._modules:
        raise NotSupported(f"no TransformerLens bridge for {model.name}: it would show the model without its codebook")
    config = copy.deepcopy(hf.config)
    config._attn_implementation = "eager"  # TransformerLens switches to it anyway where it needs attention patterns
    with torch.device("meta"), no_init_weights():
        shell = type(hf)(config)
    shell.load_state_dict(hf.state_dict(keep_vars=True), strict=False, assign=True)
    shell.tie_weights()
    for name, buffer in hf.named_buffers():
        owner, _, leaf = name.rpartition(".")
        shell.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    empty = [name for name, t in (*shell.named_parameters(), *shell.named_buffers()) if t.is_meta]
    if empty:
        raise NotSupported(
            f"no TransformerLens bridge for {model.name}: {len(empty)} tensors stay empty, e.g. {empty[0]}"
        )
    bridge = build_bridge_from_module(shell.eval(), type(hf).__name__, hf_config=config, model_name=model.name)
    if model.tokenizer is not None:
        # Given at construction, TransformerLens would reload it from its name, which one in memory does not have.
        bridge.tokenizer = copy.deepcopy(model.tokenizer)
        bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(bridge.tokenizer)
        bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos  # the same tokens as without the bridge
    return bridge


def copied_parameters(model: Model, bridge: "TransformerBridge") -> tuple[str, ...]:
    """Hugging Face names of the parameters of which the bridge has parts in storage of its own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.hf.parameters()}
    foreign = [name for name, p in bridge.named_parameters() if p.untyped_storage().data_ptr() not in own]
    a, copied = model.architecture, set()
    for name, _ in model.hf.named_parameters():
        for path in {a.query, a.key, a.value} if a.layout != "separate" else ():
            marker = f"{a.blocks}.", f".{path}."
            if name.startswith(marker[0]) and marker[1] in name:
                copied.add(name)
    if foreign and not copied:
        raise NotSupported(f"the TransformerLens bridge of {model.name} copies {foreign[0]}; report this architecture")
    return tuple(name for name, _ in model.hf.named_parameters() if name in copied) if foreign else ()
