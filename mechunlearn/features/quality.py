"""What a dictionary keeps of its activation, what that costs the model, and how many features it takes."""

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.activations import read, untouched
from mechunlearn.features.attached import Seen, TokenChange, attached
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.hook_points import place_of_hook, width_at
from mechunlearn.features.token_rows import TokenRows, is_content
from mechunlearn.models import Model
from mechunlearn.prompts import tokenizer_of


def check_fits(model: Model, dictionary: Dictionary) -> None:
    """Raise ValueError where the model has no such hook point, or another width there."""
    width = width_at(model, place_of_hook(model, dictionary.hook_point))
    if width != dictionary.d_in:
        raise ValueError(
            f"dictionary: made for a width of {dictionary.d_in}, {dictionary.hook_point} of {model.name} has {width}"
        )


def replaced_by(dictionary: Dictionary) -> TokenChange:
    """The activation of every content token becomes what the dictionary makes of it."""

    def change(x: Tensor, seen: Seen) -> Tensor:
        decoded = dictionary.decode(dictionary.encode(x), like=x).to(x.dtype)
        return torch.where(seen.content[..., None], decoded, x)

    return change


def zeroed(x: Tensor, seen: Seen) -> Tensor:
    """The activation of every content token becomes 0."""
    return torch.where(seen.content[..., None], torch.zeros_like(x), x)


@torch.no_grad()
def dictionary_quality(model: Model, dictionary: Dictionary, rows: TokenRows, *, steps: range) -> dict[str, float]:
    """How good a dictionary is on text.

    Args:
        steps: the steps of `rows` to measure on; take some that it was not trained on.

    Returns:
        explained variance (at most 1; 1 is perfect), L0 (features on at a token), dead (share of features that are
        never on), density of the commonest feature, loss (nats a token of the model as it is), loss spliced (with the
        dictionary's reconstruction), loss zeroed (with 0 in its place) and loss recovered, (zeroed - spliced) /
        (zeroed - loss): 1 where the reconstruction costs nothing, 0 where it is no better than 0.

    Raises:
        ValueError: a dictionary that does not fit the model.
    """
    check_fits(model, dictionary)
    place = place_of_hook(model, dictionary.hook_point)
    n, error, spread, n_on = 0, 0.0, 0.0, torch.zeros(dictionary.d_sae, device=model.device)
    losses = {"loss": 0.0, "loss spliced": 0.0, "loss zeroed": 0.0}
    changes: dict[str, TokenChange] = {"loss spliced": replaced_by(dictionary), "loss zeroed": zeroed}
    with untouched(model):
        for step in steps:
            ids = rows(step).to(model.device)
            x = read(model, ids, place)[is_content(tokenizer_of(model), ids)].to(dictionary.weights["W_enc"].dtype)
            features = dictionary.encode(x)
            n, n_on = n + len(x), n_on + (features > 0).sum(0)
            error += float((x - dictionary.decode(features, like=x)).pow(2).sum())
            spread += float((x - x.mean(0)).pow(2).sum())
            losses["loss"] += _loss(model, ids) / len(steps)
            for name, change in changes.items():
                with attached(model, place, change):
                    losses[name] += _loss(model, ids) / len(steps)
    recovered = (losses["loss zeroed"] - losses["loss spliced"]) / (losses["loss zeroed"] - losses["loss"])
    return {
        "explained variance": 1 - error / spread, "L0": float(n_on.sum()) / n, "densest": float(n_on.max()) / n,
        "dead": float((n_on == 0).float().mean()), **losses, "loss recovered": recovered,
    }  # fmt: skip


def _loss(model: Model, ids: Int[Tensor, "row pos"]) -> float:
    logits = model.hf(ids, use_cache=False).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
