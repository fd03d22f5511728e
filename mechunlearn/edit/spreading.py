"""Values that are missing after the last of several layers, written by all of them: what MEMIT and AlphaEdit share."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Place
from mechunlearn.edit.keys_values import Row, means_at_subjects
from mechunlearn.edit.least_squares import Solve, masked_update
from mechunlearn.edit.projections import Projections, before_norm
from mechunlearn.edit.value_search import ValueSearch, found_values
from mechunlearn.models import Model


def spread(
    model: Model,
    weights: Projections,
    moments: Mapping[int, Float[Tensor, "d_mlp d_mlp"]],
    rows: Sequence[Row],
    search: ValueSearch,
    solve: Solve,
) -> Float[Tensor, "step subject"]:
    """Search values at the last layer, then let every layer add its share of what is still missing after the last.

    With z the stream after the last layer once its MLP has the values, for each layer from the first:
        missing = (z - the stream after the last layer now) / (the number of layers from this one on)
        W += solve(C, keys now, missing)
    Streams and keys are means over the same texts of each subject, at its last token.

    Returns:
        The losses of the search.
    """
    last, size = weights.layers[-1], search.batch_size
    end: Place = ("block", last)
    _, deltas, losses = found_values(model, weights, last, rows, search)
    wanted = means_at_subjects(model, rows, [end], batch_size=size, layer=last, delta=deltas)[end]
    for i, layer in enumerate(weights.layers):
        keys, now = means_at_subjects(model, rows, [("neuron", layer), end], batch_size=size).values()
        missing = (wanted - now) / (len(weights.layers) - i)
        missing = before_norm(model, layer, weights.outputs(layer, keys), missing)
        weights.add(layer, masked_update(weights.allowed(layer), moments[layer], keys, missing, solve))
    return losses
