"""How far weights moved, part by part, and whether rounding them to a few bits would notice."""

from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from mechunlearn.edit.edits import WeightEdit
from mechunlearn.models import Model, all_components, component_parameters, oriented
from mechunlearn.rounding import code_flip_rate

COLUMNS = ("component", "layer", "kind", "relative_change", "flips_int8", "flips_int4")


def edit_changes(model: Model, edit: WeightEdit) -> pd.DataFrame:
    """What an edit does to each MLP and attention sublayer of its model; see `weight_changes`."""
    before = {name: p.detach().cpu() for name, p in model.hf.named_parameters() if name in edit.values}
    after = {name: w.masked_scatter(edit.mask.full(name), edit.values[name].to(w)) for name, w in before.items()}
    return weight_changes(model, before, after)


def checkpoint_changes(original: Model, edited: Model) -> pd.DataFrame:
    """What another tool did to each MLP and attention sublayer; empty if the checkpoints hold other parameters."""
    before, after = ({name: p.detach().cpu() for name, p in m.hf.named_parameters()} for m in (original, edited))
    if {name: w.shape for name, w in before.items()} != {name: w.shape for name, w in after.items()}:
        return pd.DataFrame(columns=pd.Index(COLUMNS))
    changed = [name for name in before if not before[name].equal(after[name])]
    return weight_changes(original, {n: before[n] for n in changed}, {n: after[n] for n in changed})


def weight_changes(model: Model, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row a sublayer with a changed parameter.

    relative_change = ||W' - W|| / ||W|| over the entries that changed; flips_int8 and flips_int4 are the shares of its
    changed matrices' weights whose integer code (one scale a row) is another one afterwards: an update that flips few
    is rounded away.
    """
    rows = []
    for component in all_components(model):
        own = [name for name in component_parameters(model, component) if name in before]
        if not own:
            continue
        moved = norm = 0.0
        flips: dict[int, float] = {8: 0.0, 4: 0.0}
        size = 0
        for name in own:
            old, new = before[name].float(), after[name].float()
            changed = old != new
            moved += float((new - old).square().sum())
            norm += float(old[changed].square().sum())
            if old.ndim == 2:
                pair = oriented(model, name, old), oriented(model, name, new)
                size += old.numel()
                for bits in flips:
                    flips[bits] += old.numel() * code_flip_rate(*pair, bits=bits)
        rates = [flips[bits] / max(size, 1) for bits in (8, 4)]
        rows.append((str(component), component.layer, component.kind, (moved / max(norm, 1e-30)) ** 0.5, *rates))
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))
