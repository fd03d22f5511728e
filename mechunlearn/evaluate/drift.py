"""What a sequence of edits does, step by step: do forgotten facts stay forgotten, and does the damage add up?"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechunlearn.edit.stack import EditStack
from mechunlearn.evaluate.disruption import Baseline, disruption_rows, take_baseline
from mechunlearn.evaluate.knowledge import edit_success_rows
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.masks import ParameterMask, union_of
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.splits import held_out


def drift(
    model: Model,
    stack: EditStack,
    splits: Sequence[FactSplit],
    *,
    retained: Sequence[Fact] | None = None,
    texts: Sequence[str] | None = None,
    drop_targets: bool = False,
    max_facts: int | None = 128,
    batch_size: int = 256,
) -> pd.DataFrame:
    """Measure the model before the first edit and after each one; it is then as it was, bit for bit.

    One row a step and block: step 0 is the original, step s has the first s edits, and block b is what edit b forgets,
    so a block with `forgotten` true whose p_true rises from one step to the next is a relapse. Facts are asked by their
    prompts.

    Columns: step, edit (its method), block, forgotten (whether the step has the block's edit), n_facts; of the block's
    facts p_true and accuracy (see `score_facts`) and edit_success, how often P(target_new) > P(target_true), NaN
    without targets; and, the same in all rows of a step: n_retained, retained_accuracy, kl_retained and kl_text (nats a
    token, KL(original || model)), perplexity_ratio (to the original's, on the text), and relative_change =
    ||W_s - W_0|| / ||W_0|| over the entries that any edit of the whole stack may change.

    Args:
        splits: of the edits, in their order, as `splits.in_sequence` makes them.
        retained: facts that no edit saw; None means those that the splits score, without what an editor trained on.
        texts: for kl_text and perplexity_ratio; None means the retained facts as statements.
        drop_targets: leave each fact's `target_new` out of its candidates.
        max_facts: of each block and of the retained facts the first so many (64 of the latter at most for KL); None is
            all.

    Raises:
        ValueError: no edits, not one split an edit, no retained facts, or edits that do not fit the model.
    """
    if not len(stack) or len(splits) != len(stack):
        raise ValueError(f"drift: got {len(stack)} edits, {len(splits)} splits, allowed: one or more, a split each")
    kept = tuple(held_out(splits) if retained is None else retained)[:max_facts]
    if not kept:
        raise ValueError(
            "drift: got no retained facts that no edit trained on; make the splits with splits.in_sequence, or give "
            "`retained`"
        )
    blocks = [split.forget[:max_facts] for split in splits]
    baseline = take_baseline(model, replace(splits[0], retain_test=kept), texts=texts)
    mask = union_of(*(edit.mask for edit in stack.edits))
    original = _selected(model, mask)

    def known(facts: Sequence[Fact]) -> dict[str, object]:
        scores = score_facts(model, facts, drop_targets=drop_targets, batch_size=batch_size)
        return {
            name: float(scores[of].to_numpy().mean()) for name, of in (("p_true", "p_true"), ("accuracy", "correct"))
        }

    def measured(step: int) -> list[dict[str, object]]:
        common = _disturbance(model, baseline) | {
            "n_retained": len(kept),
            "retained_accuracy": known(kept)["accuracy"],
            "relative_change": _distance(_selected(model, mask), original),
        }
        edit = stack.edits[step - 1].method if step else ""
        return [
            {"step": step, "edit": edit, "block": block, "forgotten": block <= step, "n_facts": len(facts)}
            | known(facts)
            | {"edit_success": _edit_success(model, facts, batch_size)}
            | common
            for block, facts in enumerate(blocks, start=1)
        ]

    rows = measured(0)
    with ExitStack() as inside:
        for number in range(len(stack)):
            stack.enter(inside, model, number)
            rows += measured(number + 1)
    return pd.DataFrame(rows)


def _edit_success(model: Model, facts: Sequence[Fact], batch_size: int) -> float:
    values = _values(edit_success_rows(model, facts, "", batch_size=batch_size), "", "edit_success")
    return sum(values) / len(values) if values else math.nan


def _disturbance(model: Model, baseline: Baseline) -> dict[str, object]:
    rows = disruption_rows(model, baseline)
    return {
        "kl_retained": _values(rows, "retain_test", "kl")[0],
        "kl_text": _values(rows, "text", "kl")[0],
        "perplexity_ratio": _values(rows, "text", "perplexity_ratio")[0],
    }


def _values(rows: pd.DataFrame, part: str, metric: str) -> list[float]:
    return rows["value"][(rows["part"] == part) & (rows["metric"] == metric)].tolist()


def _selected(model: Model, mask: ParameterMask) -> dict[str, Float[Tensor, " entry"]]:
    """The masked entries as they are now, on the CPU."""
    parameters = dict(model.hf.named_parameters())
    return {name: parameters[name].detach().cpu()[mask.full(name)] for name in mask.entries}


def _distance(now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> float:
    """||now - then|| / ||then||, summed up in float64, since in bfloat16 small differences would be lost."""
    moved = sum(float((now[name].double() - old.double()).square().sum()) for name, old in then.items())
    norm = sum(float(old.double().square().sum()) for old in then.values())
    return math.sqrt(moved / norm) if norm else 0.0
