"""A deletion: codes that a model's codebook does without for a while, on disk, or for good."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from mechunlearn.codebook import Codebook
from mechunlearn.codebook_model import codebook_of, name_of
from mechunlearn.files import whole_file
from mechunlearn.html_card import html_card
from mechunlearn.models import Model, weights_sha256
from mechunlearn.saved_records import check_format, reading

FORMAT = "mechunlearn code deletion 2"  # the first did not say which codebook its numbers are of


@dataclass(frozen=True, kw_only=True)
class CodeDeletion:
    """Codes that a model's codebook does without. A second topic is a second deletion: `applied` nests."""

    codes: tuple[int, ...]
    base_name: str
    base_sha256: str
    marks: tuple[str, ...] = ()
    """Of each code, to know it again (`Codebook.marks`): in another codebook the numbers mean other codes."""
    method: str = "code_deletion"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    facts_sha256: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.marks) not in (0, len(self.codes)):
            raise ValueError(f"deletion: got {len(self.marks)} marks of {len(self.codes)} codes; use CodeDeletion.of")

    @classmethod
    def of(cls, model: Model | PreTrainedModel, codes: Sequence[int], **more: Any) -> Self:
        """The deletion of these codes from a model's codebook; nothing is deleted yet.

        Args:
            more: what else it is to keep: method, options, seed, facts_sha256, notes.

        Raises:
            ValueError: the model has no codebook, or too few codes would be left.
        """
        codebook = codebook_of(model)
        codebook.usable(codes)
        return cls(
            codes=tuple(codes), marks=codebook.marks(codes), base_name=name_of(model),
            base_sha256=weights_sha256(model.hf if isinstance(model, Model) else model), **more,
        )  # fmt: skip

    @property
    def comes_off(self) -> bool:
        """Yes: who has the weights takes the codebook out, and the model around it was not touched."""
        return True

    @contextmanager
    def entered(self, model: Model | PreTrainedModel) -> Iterator[None]:
        """Inside, the codes are deleted; afterwards those are back that were there before; see `applied`.

        Raises:
            ValueError: the model has no codebook, or another one; or too few codes would be left.
        """
        codebook = codebook_of(model)
        _check_fit(self, codebook)
        with codebook.without(self.codes):
            yield

    def _repr_html_(self) -> str:
        lines = {"of": self.base_name, "codes": f"{len(self.codes)} deleted", "seed": self.seed}
        return html_card(f"deletion: {self.method}", lines, [("option", "value"), *self.options.items()])


def _check_fit(deletion: CodeDeletion, codebook: Codebook) -> None:
    """Raise ValueError unless the codebook is the one that the codes are of; codes that were erased in it fit any."""
    codes = list(deletion.codes)
    codebook.usable(codes)
    if codes and not deletion.marks:
        raise ValueError(
            f"deletion '{deletion.method}' does not say which codebook it is of; make it by CodeDeletion.of"
        )
    erased = (codebook.codes.detach()[codes] == 0).all(-1).tolist()
    for code, mark, found, gone in zip(codes, deletion.marks, codebook.marks(codes), erased, strict=True):
        if mark != found and not gone:
            raise ValueError(
                f"deletion '{deletion.method}' was made for the codebook of '{deletion.base_name}', and in this one "
                f"code {code} is another; load that model, or choose the codes anew"
            )


@torch.no_grad()
def erase_codes(model: Model | PreTrainedModel, deletion: CodeDeletion) -> None:
    """Delete the codes for good: their vectors become 0, so that a saved model does not hold them any more.

    The model around the codebook is not touched: without the codebook it may answer as ever (`bench codes`).

    Raises:
        ValueError: as `CodeDeletion.entered`.
    """
    codebook = codebook_of(model)
    _check_fit(deletion, codebook)
    codes = list(deletion.codes)
    codebook.deleted[codes] = True
    codebook.codes[codes] = 0


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
        own = {"codes": tuple(map(int, record["codes"])), "marks": tuple(map(str, record["marks"]))}
        return CodeDeletion(**record | own)
