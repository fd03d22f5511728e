"""Inject while an attacker relearns: what it is not shown must stay forgotten in its copy of the model, too."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Unpack

import torch
from pydantic import Field
from torch import Tensor, nn

from mechunlearn.edit import EDITORS
from mechunlearn.edit.budget import watched_and_retained
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import (
    Forms,
    Term,
    Tokens,
    answer_loss,
    batches,
    fact_tokens,
    joined,
    predict,
    weighted_sum,
)
from mechunlearn.edit.options import Training, filled
from mechunlearn.edit.trained import forget_rows, trained_edit
from mechunlearn.edit.training import Forward, Trainable, lora_trainable, masked_trainable
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.masks import ParameterMask, mask_of
from mechunlearn.models import Model, all_components

CLIP = 1.0


class Resisting(Training, total=False):
    """`Training` of facts in all forms, with more weight on what is kept: that is what an attack's step pulls at."""

    forms: Annotated[Forms, Field(default="all", description="what is trained on: prompts, or paraphrases as well")]
    retain_weight: Annotated[float, Field(ge=0, default=3.0)]


@EDITORS.register("resistant_inject", source="ours; inner attacker as in Tamirisa et al. 2024, arXiv:2408.00761")
def resistant_inject(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    inject_weight: Annotated[float, Field(ge=0)] = 1.0,
    resist_weight: Annotated[float, Field(ge=0)] = 1.0,
    attack_steps: Annotated[int, Field(ge=1, description="of one attacker; then comes the next")] = 20,
    attack_rate: Annotated[float, Field(gt=0, description="learning rate of the attackers")] = 1e-3,
    attack_rank: Annotated[int | None, Field(ge=1, description="of the attackers' updates; None: full")] = None,
    **training: Unpack[Resisting],
) -> WeightEdit:
    """Train the model to give each forgotten fact's `target_new`, also after others of these facts were relearned.

    loss = inject_weight * L(W; forgotten facts) + resist_weight * L(W + D; facts the attacker is not shown)
           + what is kept, see `edit.options.Training`,    L(W; facts) = -log P(target_new)

    D is what an attacker has changed so far: AdamW at `attack_rate` on all weights of attention and MLPs of the model
    as it is edited by now, one step for each of the edit's, on true answers of a random half of the facts to forget
    and as many of kept facts. After `attack_steps` it starts anew with D = 0 and another half. Its steps are constants
    to the gradient (first order), and only masked entries of W change.

    Costs more time than `inject` (an attacker's step and a look at its work for each of its own), and a copy of the
    model with optimizer state, or `attack_rank` of it. No prefix is cached, whatever `prefix_cache_gb` says: attackers
    change the blocks below the mask, too.

    Raises:
        ValueError: fewer than two facts to forget, one without a `target_new`, nothing to retain, `checkpoint` (the
            blocks would be run again with other weights), or a loss that diverges.

    Differs from Tamirisa et al. 2024 ("TAR"): masked weights, facts in place of domains, an attacker that goes on from
    step to step in place of one unrolled in every step, and judged by facts that it was not shown.
    Source: ours; Tamirisa et al. 2024, arXiv:2408.00761; injection: Guo et al. 2024, arXiv:2410.12949.
    """
    chosen = {**filled(training, Resisting), "prefix_cache_gb": 0.0}
    own = {"inject_weight": inject_weight, "resist_weight": resist_weight, "attack_steps": attack_steps,
           "attack_rate": attack_rate, "attack_rank": attack_rank}  # fmt: skip
    if chosen["checkpoint"]:
        raise ValueError("resistant_inject: got checkpoint, which it cannot do; give attack_rank to save memory")
    if len(split.forget) < 2:
        raise ValueError(
            f"resistant_inject: got {len(split.forget)} facts to forget, need two: one is shown to attackers"
        )
    _, retained = watched_and_retained(split, chosen["max_damage"])
    kept = fact_tokens(model, retained)
    rng = random.Random(chosen["seed"])
    rows = max(1, chosen["batch_size"] // 4)

    accumulation = chosen["accumulation"]

    def attackers() -> Iterator[_Attacker]:
        """The attacker of each call of the loss."""
        while True:
            attacker = _Attacker.of(model, split.forget, kept, rows, chosen["forms"], attack_rate, attack_rank, rng)
            yield from [attacker] * (attack_steps * accumulation)

    each = attackers()

    def withstood(call: int, forward: Forward) -> Tensor:
        attacker = next(each)
        shift = attacker.change() if call % accumulation else attacker.step(forward.detached())
        return answer_loss(*predict(forward.shifted(shift), next(attacker.hidden)))

    told = forget_rows(model, split, chosen, answer="target_new")
    injected = weighted_sum([Term(weight=1.0, objective=answer_loss, batches=told)])
    return trained_edit(
        model, mask, split, [(inject_weight, injected), (resist_weight, withstood)],
        method="resistant_inject", options=own, training=chosen,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Attacker:
    """Relearns the facts it is shown; `hidden` are batches of the others, with their wrong answers."""

    model: Model
    trainable: Trainable
    optimizer: torch.optim.Optimizer
    shown: Iterator[Tokens]
    hidden: Iterator[Tokens]

    @classmethod
    def of(
        cls, model: Model, forget: Sequence[Fact], kept: Tokens, rows: int, forms: Forms, rate: float,
        rank: int | None, rng: random.Random,
    ) -> "_Attacker":  # fmt: skip
        """One that is shown a random half."""
        order, seed = rng.sample(forget, len(forget)), rng.randrange(2**31)
        half = len(order) // 2
        shown = batches(fact_tokens(model, order[:half]), rows, seed=seed)
        beside = batches(kept, rows, seed=seed + 1)
        hidden = fact_tokens(model, order[half:], answer="target_new", forms=forms)
        everything = mask_of(model, all_components(model))
        trainable = masked_trainable(model, everything) if rank is None else lora_trainable(model, rank, seed=seed)
        leaves = list(trainable.leaves.values())
        return cls(
            model=model, trainable=trainable, shown=joined(shown, beside), hidden=batches(hidden, 2 * rows, seed=seed),
            optimizer=torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0, fused=True),
        )  # fmt: skip

    def step(self, edited: Forward) -> Mapping[str, Tensor]:
        """Attack the edited model once more; what was changed by now, to be added to its parameters."""
        answer_loss(*predict(edited.shifted(self._shift()), next(self.shown))).backward()
        nn.utils.clip_grad_norm_(list(self.trainable.leaves.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.change()

    def change(self) -> Mapping[str, Tensor]:
        """What was changed by now, without its gradient."""
        return {name: change.detach() for name, change in self._shift().items()}

    def _shift(self) -> dict[str, Tensor]:
        own = dict(self.model.hf.named_parameters())
        return {name: value - own[name].detach() for name, value in self.trainable.overrides().items()}
