"""One plant at a time: read, verified, and scored by every localizer; what is finished is read from its folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mechunlearn import localize
from mechunlearn.bench.ladder import Verification, verify
from mechunlearn.bench.planted_settings import LocalizerSettings
from mechunlearn.checkpoints import load_model
from mechunlearn.components import Component, ComponentScores
from mechunlearn.edit.edits import applied, load_edit
from mechunlearn.facts import Fact
from mechunlearn.files import whole_file
from mechunlearn.localize import LOCALIZERS
from mechunlearn.models import Model


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One plant of the ladder: the edited model's file, and where its facts are."""

    folder: Path
    """Of its base, see `organisms.planted.make_base`."""
    architecture: str
    seed: int
    part: str
    n_layers: int
    verification: Verification

    @property
    def components(self) -> tuple[Component, ...]:
        """The components that were trained."""
        return tuple(Component.parse(name) for name in self.part.split("+"))

    @property
    def base(self) -> str:
        """Architecture and seed."""
        return f"{self.architecture}-{self.seed}"

    @property
    def group(self) -> str:
        """What was planted: an MLP, a band of MLPs or attention."""
        kind = self.components[0].kind
        return "band" if len(self.components) > 1 else {"mlp": "MLP"}.get(kind, kind)


@lru_cache(maxsize=2)
def _base(folder: Path) -> tuple[Model, Model]:
    """The base twice: one to carry the plants' weights, one to compare with."""
    model, twin = (load_model(folder / "base", device="cpu") for _ in range(2))
    return model, twin


@lru_cache(maxsize=1)
def _code() -> str:
    """Hash of the localizers' source: scores of other code are not read again."""
    files = sorted(Path(localize.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def read_facts(folder: Path) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """Old and new facts of a base."""
    data = json.loads((folder / "facts.json").read_text(encoding="utf-8"))

    def fact(row: Mapping[str, Any]) -> Fact:
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        return Fact(**fields)

    return tuple(map(fact, data["old"])), tuple(map(fact, data["new"]))


def verify_plant(path: Path) -> Planted:
    """Measure where a plant's facts act; a finished record beside the plant is read instead."""
    folder, record = path.parent.parent, path.with_suffix(".json")
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    if not record.is_file():
        old, new = read_facts(folder)
        edit, (model, base) = load_edit(path), _base(folder)
        with applied(model, edit):
            found = verify(model, base, edit.mask.components, new, old)
        with whole_file(record) as partial:
            partial.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    data = json.loads(record.read_text(encoding="utf-8"))
    return Planted(
        folder=folder, architecture=recipe["architecture"], seed=recipe["seed"], part=path.stem,
        n_layers=recipe["n_layers"], verification=Verification(**data | {"roles": tuple(data["roles"])}),
    )  # fmt: skip


def score_plant(planted: Planted, lines: Sequence[LocalizerSettings]) -> list[tuple[str, ComponentScores | str]]:
    """Scores of the plant's new facts by every localizer, or why it could not score them.

    Finished ones of the same method, options and code of `mechunlearn/localize/` are read from the plant's folder.
    A method that takes a `twin` gets the base, one that takes facts to `retain` as many old facts as there are new.
    """
    old, new = read_facts(planted.folder)
    edit, (model, base) = load_edit(planted.folder / "plants" / f"{planted.part}.safetensors"), _base(planted.folder)
    found: list[tuple[str, ComponentScores | str]] = []
    with applied(model, edit):
        for line in lines:
            method = LOCALIZERS.get(line.method)
            options = method.validate(line.options)
            key = json.dumps([version("mechunlearn"), _code(), line.method, options], sort_keys=True)
            digest = hashlib.sha256(key.encode()).hexdigest()[:12]
            path = planted.folder / "scores" / planted.part / f"{line.method}-{digest}.safetensors"
            if not path.is_file():
                given = method.wanted(twin=base, retain=old[: len(new)])
                try:
                    method.function(model, new, **options, **given).save(path)
                except ValueError as error:  # too few facts for a probe, an architecture it does not support
                    found.append((line.name, str(error)))
                    continue
            found.append((line.name, ComponentScores.load(path)))
    return found
