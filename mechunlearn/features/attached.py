"""A change of one activation that knows which tokens it sees: real text or special, and what went before them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

from jaxtyping import Bool
from torch import Tensor

from mechunlearn.activations import Place, hooked
from mechunlearn.features.token_rows import is_content
from mechunlearn.models import Model
from mechunlearn.prompts import tokenizer_of

Memory = dict[str, Tensor]
"""What a change remembers of each token of each sequence: sequences first, then tokens."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The tokens of one forward pass."""

    content: Bool[Tensor, "batch pos"]
    """Neither padding nor special tokens."""
    memory: Memory
    """Empty where sequences begin; what is put in is there again when the next tokens come with the same cache."""


TokenChange = Callable[[Tensor, Seen], Tensor]
"""(activation [batch pos d], the tokens) -> the activation to go on with."""


@contextmanager
def attached(model: Model, place: Place, change: TokenChange) -> Iterator[None]:
    """Inside, every forward pass goes on with the changed activation: of whole texts, or one token at a time.

    What a change remembers of a text is kept beside the cache of its keys and values, so that conversations may take
    turns and beams may be reordered. Nothing outlives the `with`, also on errors. Padding is known from the attention
    mask; without one only special tokens are told from text, and they are what this package pads its rows with
    (`prompts.padding_token`).

    Raises (in a forward pass):
        ValueError: embeddings in place of token ids, or a cache of keys and values that was begun outside.
    """
    memories: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()
    now: dict[str, Seen] = {}

    def before(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        cache = named.get("past_key_values")
        length = 0 if cache is None else int(cache.get_seq_length())
        if length and cache not in memories:
            raise ValueError(f"{model.name}: this cache of keys and values was begun without what is attached now")
        memory = memories[cache] if length else {}
        for name, value in memory.items():  # the cache may have been cropped (assisted generation)
            memory[name] = value[:, :length]
        now["seen"] = Seen(content=_content(model, inputs, named), memory=memory)

    def after(_module: Any, _inputs: Any, output: Any) -> None:
        cache, memory = getattr(output, "past_key_values", None), now["seen"].memory
        if cache is not None and memories.get(cache) is not memory:
            memories[cache] = memory
            _move_rows_together(cache, memory)

    base = model.hf.base_model
    with ExitStack() as handles:
        handles.callback(base.register_forward_pre_hook(before, with_kwargs=True).remove)
        handles.callback(base.register_forward_hook(after).remove)
        handles.enter_context(hooked(model, change={place: lambda x: change(x, now["seen"])}))
        yield


def _content(model: Model, inputs: tuple[Any, ...], named: dict[str, Any]) -> Bool[Tensor, "batch pos"]:
    ids = inputs[0] if inputs else named.get("input_ids")
    if ids is None:
        raise ValueError(f"{model.name}: what is attached needs input_ids, got inputs_embeds alone")
    content, mask = is_content(tokenizer_of(model), ids), named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:  # as long as the cache and the tokens together
        content = content & mask[:, -ids.shape[1] :].bool()
    return content


def _move_rows_together(cache: Any, memory: Memory) -> None:
    """Beam search and others move rows of the cache about; the memory's rows have to go with them."""
    itself = ref(cache)  # for a cache that held itself would outlive its last use

    def moving(name: str, move: Callable[[Tensor, Any], Tensor]) -> Callable[[Any], Any]:
        before = vars(cache).get(name)  # of another change on the same model

        def moved(rows: Any) -> Any:
            for key, value in memory.items():
                memory[key] = move(value, rows)
            return before(rows) if before is not None else getattr(type(itself()), name)(itself(), rows)

        return moved

    cache.reorder_cache = moving("reorder_cache", lambda value, rows: value.index_select(0, rows.to(value.device)))
    cache.batch_select_indices = moving("batch_select_indices", lambda value, rows: value[rows.to(value.device)])
    cache.batch_repeat_interleave = moving("batch_repeat_interleave", lambda value, n: value.repeat_interleave(n, 0))
