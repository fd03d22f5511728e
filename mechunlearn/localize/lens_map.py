"""One prompt through the logit lens: what the residual stream would say next, at every token after every sublayer."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from mechunlearn.activations import exact, hooked, last_logits, pad, stream_places, streams, untouched
from mechunlearn.facts import Fact
from mechunlearn.html_card import html_card
from mechunlearn.models import Model, all_components, has_parallel_blocks
from mechunlearn.prompts import encode, encode_answers, token_texts


@dataclass(frozen=True, kw_only=True, eq=False)
class LensMap:
    """What every stream says next. Shapes: p_answer, p_top and top [stream token]."""

    prompt: str
    tokens: tuple[str, ...]
    streams: tuple[str, ...]
    """What the stream is after: "embed", then each sublayer (blocks, by their MLP, where they are parallel)."""
    answer: str
    """The answer's first token."""
    p_answer: Float[np.ndarray, "stream token"]
    top: tuple[tuple[str, ...], ...]
    p_top: Float[np.ndarray, "stream token"]

    def _repr_html_(self) -> str:
        of_last = zip(self.streams, self.p_answer[:, -1].tolist(), (row[-1] for row in self.top), strict=True)
        lines = {"prompt": self.prompt, "answer": self.answer, "streams": f"{len(self.streams)}, the last:"}
        head = ("stream after", "P(answer) at the last token", "likeliest")
        return html_card("logit lens", lines, [head, *list(of_last)[-8:]])


def lens_map(model: Model, fact: Fact) -> LensMap:
    """Read the stream at every token of the fact's prompt through the model's final norm and unembedding.

    p_answer = P(first token of the true answer), p_top that of the likeliest token, both among the whole vocabulary.

    Sign and units: probabilities. The last row at the last token is what the model itself says.

    Raises:
        ValueError: the model has no tokenizer, or one that cannot split the answer from the prompt.

    Source: nostalgebraist 2020, lesswrong.com/posts/AcKRB8wDpdaN6v6ru; reading: TransformerLens' `logit_readout`.
    """
    from transformer_lens.tools.analysis import logit_readout

    prompt = fact.ask(fact.prompt)
    (ids,), answer = encode(model, [prompt]), encode_answers(model, [fact.target_true])[fact.target_true][0]
    mid = not has_parallel_blocks(model)
    with untouched(model), torch.no_grad():
        with hooked(model, record=stream_places(model, mid=mid)) as seen:
            last_logits(model, pad(model, [ids]))
        read = torch.stack([stream[0] for stream in streams(model, seen, mid=mid)])
        of_answer = logit_readout(model.bridge, read, vocab=[answer], return_type="probs").values[..., 0]
        best = logit_readout(model.bridge, read, top_k=1, return_type="probs")
    assert best.top_ids is not None  # given with top_k
    components = all_components(model, ("attention", "mlp") if mid else ("mlp",))
    return LensMap(
        prompt=prompt,
        tokens=token_texts(model, ids),
        streams=("embed", *map(str, components)),
        answer=token_texts(model, [answer])[0].strip(),
        p_answer=exact(of_answer).double().cpu().numpy(),
        top=tuple(token_texts(model, row) for row in best.top_ids[..., 0].tolist()),
        p_top=exact(best.values[..., 0]).double().cpu().numpy(),
    )
