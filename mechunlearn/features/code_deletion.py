"""Code deletion (CodeUnlearn): the codes of a topic are never chosen again; others step in, and nothing is trained."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from mechunlearn.codebook_model import codebook_of
from mechunlearn.facts import Fact, FactSplit, hash_facts
from mechunlearn.features import GUARDS
from mechunlearn.features.selection import NothingFound, matched_at_random
from mechunlearn.features.texts import retained_texts
from mechunlearn.features.topics import Enrichment, codes_in, enriched_codes, substituted
from mechunlearn.files import whole_file
from mechunlearn.html_card import html_card
from mechunlearn.models import Model
from mechunlearn.prompts import forms, render, tokenizer_of
from mechunlearn.saved_records import check_format, reading

FORMAT = "mechunlearn code deletion 1"
Rate = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class CodeDeletion:
    """Codes that a model's codebook does without. A second topic is a second deletion: `applied` nests."""

    codes: tuple[int, ...]
    base_name: str
    base_sha256: str
    method: str = "code_deletion"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    facts_sha256: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def comes_off(self) -> bool:
        """No, if the model is given away with `erase_codes`."""
        return False

    @contextmanager
    def entered(self, model: Model) -> Iterator[None]:
        """Inside, the codes are deleted; afterwards those are back that were there before; see `applied`.

        Raises:
            ValueError: the model has no codebook, or too few codes would be left.
        """
        codebook = codebook_of(model)
        before = codebook.deleted.clone()
        codes = torch.tensor(self.codes, dtype=torch.long, device=before.device)
        codebook.usable(codes)
        try:
            codebook.deleted[codes] = True
            yield
        finally:
            codebook.deleted.copy_(before)

    def _repr_html_(self) -> str:
        lines = {"of": self.base_name, "codes": f"{len(self.codes)} deleted", "seed": self.seed}
        return html_card(f"deletion: {self.method}", lines, [("option", "value"), *self.options.items()])


@torch.no_grad()
def erase_codes(model: Model, deletion: CodeDeletion) -> None:
    """Delete the codes for good: their vectors become 0, so that a saved model does not hold them any more.

    Raises:
        ValueError: the model has no codebook, or too few codes would be left.
    """
    codebook = codebook_of(model)
    codes = torch.tensor(deletion.codes, dtype=torch.long, device=codebook.deleted.device)
    codebook.usable(codes)
    codebook.deleted[codes] = True
    codebook.codes[codes] = 0


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
    codebook = codebook_of(model)
    found, enrichments = CodeDeletion(codes=(), base_name=model.name, base_sha256=model.sha256), []
    topic, control = paired_sentences(split.forget, split.retain_train, seed=seed)
    for _ in range(rounds):
        with found.entered(model):
            on = [
                codes_in(model.hf, tokenizer_of(model), codebook, texts, n_closest=n_closest)
                for texts in (topic, control)
            ]
        enrichment = enriched_codes(*on, least_log_ratio=least_log_ratio, false_discovery_rate=false_discovery_rate)
        room = None if most_codes is None else most_codes - len(found.codes)
        new = enrichment.codes[:room]
        enrichments.append(enrichment)
        if not new:
            break
        found = replace(found, codes=(*found.codes, *new))
    if not found.codes:
        raise NothingFound(
            f"code_deletion: of {enrichments[0].n_tested} codes none is on {2**least_log_ratio:g} times as often in "
            "the topic's sentences at this false discovery rate; lower least_log_ratio, or count by n_closest"
        )
    codes = found.codes
    if at_random:
        texts = retained_texts(split.retain_train, seed=seed)
        everywhere = codes_in(model.hf, tokenizer_of(model), codebook, texts)
        codes = matched_at_random(codes, everywhere.sum(0).numpy().astype(float), seed=seed)
    return replace(
        found, codes=codes, options=options, seed=seed, notes=_notes(enrichments),
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


def _notes(enrichments: Sequence[Enrichment]) -> dict[str, Any]:
    return {
        "enriched by round": [list(found.codes) for found in enrichments],
        "log2 ratios by round": [[round(value, 4) for value in found.log_ratio] for found in enrichments],
        "q values by round": [[float(f"{value:.3g}") for value in found.q_value] for found in enrichments],
        "sentences": enrichments[0].n_sentences, "codes tested": enrichments[0].n_tested,
    }  # fmt: skip


def save_deletion(deletion: CodeDeletion, path: str | Path) -> None:
    """Write the record as JSON, all or nothing."""
    text = json.dumps({"format": FORMAT, **vars(deletion)}, allow_nan=False, sort_keys=True, indent=1) + "\n"
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def load_deletion(path: str | Path) -> CodeDeletion:
    """Read what `save_deletion` wrote. Whether it fits a model is checked when it is applied.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a saved deletion.
    """
    with reading(path, "deletion"):
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        check_format(record, FORMAT)
        return CodeDeletion(**record | {"codes": tuple(map(int, record["codes"]))})
