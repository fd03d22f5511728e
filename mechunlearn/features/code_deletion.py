"""Code deletion (CodeUnlearn): the codes of a topic are never chosen again; others step in, and nothing is trained."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mechunlearn.codebook_model import codebook_of
from mechunlearn.facts import Fact, FactSplit, hash_facts
from mechunlearn.features import GUARDS
from mechunlearn.features.code_choice import choose_codes
from mechunlearn.features.deletion import CodeDeletion
from mechunlearn.features.selection import matched_at_random
from mechunlearn.features.texts import retained_texts
from mechunlearn.features.topics import codes_in, substituted
from mechunlearn.models import Model
from mechunlearn.prompts import forms, render, tokenizer_of

Rate = Annotated[float, Field(gt=0, lt=1)]


@GUARDS.register("code_deletion", source="Wu et al. 2024, arXiv:2410.10866 (CodeUnlearn)")
def code_deletion(
    model: Model,
    split: FactSplit,
    *,
    least_log_ratio: Annotated[float, Field(ge=0)] = 1.0,
    false_discovery_rate: Rate = 0.05,
    n_closest: Annotated[int, Field(ge=1)] | None = None,
    most_codes: Annotated[int, Field(ge=1)] | None = None,
    rounds: Annotated[int, Field(ge=1)] = 1,
    at_random: bool = False,
    seed: int = 0,
) -> CodeDeletion:
    """Delete the codes that are on in sentences about the forgotten facts and not in the same about other subjects.

    The pairs: every prompt, paraphrase and question of a fact, and the same with its subject replaced by the subject of
    a retained fact of the same relation. No answer is in them, so that what is found is how the model gets there. No
    gradient step is taken; codes of another topic are found and deleted in the same way, without any training.

    Args:
        least_log_ratio: log2 of how much oftener topic sentences have a code.
        false_discovery_rate: of the test over all codes; see `features.topics.enriched_codes`.
        n_closest: count so many closest codes of every token, which would step in one after another, in place of the
            k that it passes as (the wider set S' of the paper).
        most_codes: take at most so many, the most enriched first.
        rounds: count again with what was found deleted, and delete what has stepped in.
        at_random: a control: as many other codes that are on as often in text to retain.
        seed: draws the substitutes, and random codes.

    Raises:
        ValueError: the model has no codebook; too few codes would be left; no retained fact of a relation.
        NothingFound: no code is enriched.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split", "seed")}
    topic, control = paired_sentences(split.forget, split.retain_train, seed=seed)
    counting = {name: value for name, value in options.items() if name != "at_random"}
    found = choose_codes(model.hf, tokenizer_of(model), topic, control, **counting)
    codes = found.codes
    if at_random:
        texts = retained_texts(split.retain_train, seed=seed)
        everywhere = codes_in(model.hf, tokenizer_of(model), codebook_of(model), texts)
        codes = matched_at_random(codes, everywhere.sum(0).numpy().astype(float), seed=seed)
    return CodeDeletion.of(
        model, codes, method="code_deletion", options=options, seed=seed, notes=found.notes,
        facts_sha256=hash_facts((*split.forget, *split.retain_train)),
    )  # fmt: skip


def paired_sentences(forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Every form of asking for each forgotten fact, and the same for the subject of a retained one of its relation.

    Raises:
        ValueError: no retained fact of a relation.
    """
    others: dict[str, list[str]] = {}
    for fact in retain:
        others.setdefault(fact.relation, []).append(fact.subject)
    pairs: tuple[list[str], list[str]] = ([], [])
    for fact in forget:
        if fact.relation not in others:
            raise ValueError(f"topic: no retained fact of '{fact.relation}', whose subject could stand for the others")
        sentences = [render(fact, form) for form in forms(fact) if form != "choice"]
        pairs[0].extend(sentences)
        pairs[1].extend(substituted(sentences, {fact.subject: others[fact.relation]}, seed=f"{seed}|{fact.subject}"))
    return pairs
