"""How often and how strongly every feature is on in some texts, counted batch by batch; nothing dense is kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.activations import pad, read
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.hook_points import place_of_hook
from mechunlearn.features.quality import check_fits
from mechunlearn.features.token_rows import is_content
from mechunlearn.models import Model
from mechunlearn.prompts import encode, max_positions, padding_token, tokenizer_of

OnBatch = Callable[[Sequence[int], Bool[Tensor, "text pos d_sae"], Bool[Tensor, "text pos"]], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStatistics:
    """Sums over the content tokens of some texts; a text is a row of tokens."""

    n_tokens: int
    n_texts: int
    total: Float[Tensor, " d_sae"]
    """Of each feature f: sum of f over tokens."""
    total_squares: Float[Tensor, " d_sae"]
    """Sum of f^2 over tokens."""
    n_on: Int[Tensor, " d_sae"]
    """Tokens at which it is above 0."""
    n_texts_on: Int[Tensor, " d_sae"]
    """Texts in which it is above 0 at some token: tokens of a text depend on each other, texts do not."""
    mean_norm: float
    """Of the activation, in its own units."""

    @property
    def mean_square(self) -> Float[Tensor, " d_sae"]:
        """E[f^2]: DSG's importance as its paper defines it (a diagonal Fisher information, section 3)."""
        return self.total_squares / self.n_tokens

    @property
    def squared_mean(self) -> Float[Tensor, " d_sae"]:
        """(E f)^2: DSG's importance as its released code computes it."""
        return (self.total / self.n_tokens).square()

    @property
    def fire_rate(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens at which it is on."""
        return self.n_on.double() / self.n_tokens

    @property
    def mean_when_on(self) -> Float[Tensor, " d_sae"]:
        """E[f | f > 0]; 0 for a feature that never is."""
        return self.total / self.n_on.clamp(min=1)


def batches_of_texts(
    model: Model, texts: Sequence[str], *, max_tokens: int, batch_size: int
) -> Iterator[tuple[list[int], Int[Tensor, "text pos"], Bool[Tensor, "text pos"]]]:
    """The texts by length: their numbers, their tokens padded on the right, and which of these are content."""
    width = max_positions(model, max_tokens)
    rows = [row[:width] for row in encode(model, texts)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        tokens = pad(model, [rows[i] for i in numbers])
        ids = tokens.ids.masked_fill(~tokens.mask, padding_token(model))  # which guards know from text
        yield numbers, ids, is_content(tokenizer_of(model), ids) & tokens.mask


@torch.no_grad()
def feature_statistics(
    model: Model, dictionary: Dictionary, texts: Sequence[str], *, max_tokens: int = 256, batch_size: int = 32,
    on_batch: OnBatch = lambda numbers, on, content: None,
) -> FeatureStatistics:  # fmt: skip
    """Count the features of a dictionary over texts.

    Args:
        max_tokens: tokens of a text that are read, from its start.
        batch_size: texts in a forward pass.
        on_batch: also told which features are on where: (numbers of the texts, [text pos feature], content tokens).

    Raises:
        ValueError: a dictionary that does not fit the model, or no token of text.
    """
    check_fits(model, dictionary)
    place = place_of_hook(model, dictionary.hook_point)
    zero = torch.zeros(dictionary.d_sae, dtype=torch.float64, device=model.device)
    total, squares, n_on, n_texts_on = zero, zero.clone(), zero.long(), zero.long()
    n_tokens, norm = 0, 0.0
    for numbers, ids, content in batches_of_texts(model, texts, max_tokens=max_tokens, batch_size=batch_size):
        x = read(model, ids, place)
        features = dictionary.encode(x) * content[..., None]
        on = features > 0
        n_tokens += int(content.sum())
        norm += float(x[content].norm(dim=-1).double().sum())
        total = total + features.sum((0, 1), dtype=torch.float64)
        squares = squares + features.square().sum((0, 1), dtype=torch.float64)
        n_on, n_texts_on = n_on + on.sum((0, 1)), n_texts_on + on.any(1).sum(0)
        on_batch(numbers, on, content)
    if not n_tokens:
        raise ValueError(f"features: got {len(texts)} texts without a single token; give some text")
    return FeatureStatistics(
        n_tokens=n_tokens, n_texts=len(texts), total=total.cpu(), total_squares=squares.cpu(), n_on=n_on.cpu(),
        n_texts_on=n_texts_on.cpu(), mean_norm=norm / n_tokens,
    )  # fmt: skip
