"""How far the true answer's logit stands above the other candidates' where a fact is asked."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mechunlearn.edit.losses import Forms, fact_tokens
from mechunlearn.edit.training import Forward
from mechunlearn.facts import Fact
from mechunlearn.models import Model
from mechunlearn.prompts import candidates, encode_answers


def demotion(
    model: Model, facts: Sequence[Fact], *, margin: float, forms: Forms, batch_size: int, seed: int
) -> Callable[[int, Forward], Float[Tensor, ""]]:
    """Distance of (logit of the true answer - mean logit of the other candidates) from -margin; for `train`.

    Huber's loss (in logits, linear beyond 1), averaged over a batch. At 0 the stream before the unembedding has lost
    what favours the true answer, and what ranks the others is as it was. The margin makes up for what training leaves:
    answers level with the others would still be first as often as last. Answers are told apart by their first tokens;
    candidates that share the true answer's are left out.
    """
    pool = fact_tokens(model, facts, forms=forms)
    ids = encode_answers(model, {answer for fact in facts for answer in candidates(fact)})
    true: list[int] = []
    others: list[list[int]] = []
    for fact in facts:
        first = ids[fact.target_true][0]
        n_forms = 1 + (len(fact.paraphrases) if forms == "all" else 0)
        true += [first] * n_forms
        others += [sorted({ids[answer][0] for answer in candidates(fact)} - {first})] * n_forms
    width = max(1, *map(len, others))
    other = torch.tensor([[*row, *[0] * (width - len(row))] for row in others], device=model.device)
    counts = (torch.arange(width) < torch.tensor([len(row) for row in others])[:, None]).to(model.device)
    answer = torch.tensor(true, device=model.device)[:, None]
    generator = torch.Generator().manual_seed(seed)

    def loss(_: int, forward: Forward) -> Tensor:
        rows = torch.randperm(len(pool), generator=generator)[:batch_size]
        batch, chosen = pool.take(rows), rows.to(model.device)
        at, place = torch.unique(batch.starts - 1, return_inverse=True)
        logits = forward(batch.ids, at.to(model.device))[torch.arange(len(rows)), place]
        present = counts[chosen]
        mean = (logits.gather(-1, other[chosen]) * present).sum(-1) / present.sum(-1).clamp(min=1)
        above = logits.gather(-1, answer[chosen])[:, 0] - mean
        return F.smooth_l1_loss(above, torch.full_like(above, -margin))

    return loss
