"""What a run does, read from one TOML file: strict, with every key checked before anything starts."""

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mechunlearn.attack import ATTACKS
from mechunlearn.components import Component
from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.edit import EDITORS
from mechunlearn.evaluate import evaluate
from mechunlearn.features import GUARDS
from mechunlearn.localize import LOCALIZERS
from mechunlearn.registry import Method, Registry, did_you_mean

Options = dict[str, Any]
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._+#-]*[A-Za-z0-9])?")
SET_BY_THE_RUN = {"seed", "drop_targets"}
"""Options of editors, attacks, evaluation and controls that follow from the run's own settings."""


REGISTRIES: Mapping[str, Registry] = {
    "localize": LOCALIZERS, "edit": EDITORS, "guard": GUARDS, "attack": ATTACKS, "suppress": SUPPRESSIONS,
}  # fmt: skip


DECIDING_ATTACKS = ("asking", "logit_lens", "probing", "quantization", "relearning")
KINDS_OF_SUPPRESSION = ("lora", "refusal", "noise", "answer_direction", "format_gate")


S = TypeVar("S", bound="Strict")


class Strict(BaseModel):
    """Settings in which every unknown key and every value of another type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


class FactsSettings(Strict):
    """Which facts there are and which of them are to be forgotten."""

    source: str = "people"
    format: str = "auto"
    forget: str | None = None
    """A default forget set (people-256, ...), or `n` of it; without one `relation` and `n` choose from any source;
    with neither, half of the subjects are to be forgotten, one fact each."""
    forgotten: str | None = None
    """A file of those facts of `source` that are to be forgotten (or `n` of them), in any format of a source."""
    relation: str | None = None
    answer: str | None = None
    """Of these facts only those with this true answer are to be forgotten: a whole sport, say."""
    n: Annotated[int, Field(ge=4)] | None = None
    folds: Annotated[int, Field(ge=2)] = 2
    fold: Annotated[int, Field(ge=0)] = 0
    rotate: bool = True
    """Attack once for every fold, so that each forgotten fact is hidden once; else for `fold` alone."""
    known: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Only facts whose true answer has more than this share of the probability are forgotten or retained."""


class MaskSettings(Strict):
    """How much may be edited: a share of all MLP and attention parameters, or a number of them."""

    budget: Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=1)] = 0.2
    kinds: list[Literal["mlp", "attention", "head"]] = ["mlp"]


class ArmSettings(Strict):
    """One edit of weights: where (a localizer, or components by name) and how (an editor); or a guard of activations.

    Budget and kinds default to [mask].
    """

    localizer: str | None = None
    components: list[str] | None = None
    """What to edit ("m3", "a5.h2"), in place of a localizer's choice."""
    editor: str = "inject"
    guard: str | None = None
    """What guards the activations, in place of an edit of weights."""
    label: str | None = None
    """How the arm is called; needed where two would have the same name."""
    budget: Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=1)] | None = None
    kinds: list[Literal["mlp", "attention", "head"]] | None = None
    seed: int | None = None
    """Added to the run's for this arm: its editor's, and its draw where the localizer is a random control."""
    options: Options = {}
    """Options of the editor or guard for this arm alone, over those of [edit] or [guard]."""

    @property
    def name(self) -> str:
        """How the arm is called in tables and folders."""
        where = self.localizer or "+".join(self.components or ())
        what = self.label or self.guard or f"{self.editor}-{where}"
        return what + ("" if self.seed is None else f"-{self.seed}")


class VerdictSettings(Strict):
    """Where the line between removed and hidden is drawn."""

    delta: Annotated[float, Field(gt=0, lt=1)] = 0.1
    draws: Annotated[int, Field(ge=500)] = 4000


class Settings(Strict):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: str
    twin: str | None = None
    """A model that never knew the facts; without one the verdict is capped at inconclusive unless hidden."""
    second_twin: str | None = None
    """Another one, judged against the first: what a model that truly never knew looks like."""
    seed: int = 0
    seeds: Annotated[int, Field(ge=1)] = 1
    """How many times everything is edited and attacked, with seeds counted up from `seed`."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    workers: Annotated[int, Field(ge=1)] = 1
    facts: FactsSettings = FactsSettings()
    mask: MaskSettings = MaskSettings()
    verdict: VerdictSettings = VerdictSettings()
    localize: dict[str, Options] = {}
    edit: dict[str, Options] = {}
    guard: dict[str, Options] = {}
    attack: dict[str, Options] = {name: {} for name in DECIDING_ATTACKS}
    evaluate: Options = {}
    """Options of `evaluate`: how many facts of a part, which forms."""
    suppress: dict[str, Options] = {kind: {} for kind in KINDS_OF_SUPPRESSION}
    """Kinds of suppressed models with their options: the positive controls. An empty table means none."""
    arms: list[ArmSettings] = []
    edited: list[str] = []
    """Checkpoints that any other tool made of `model`, each judged as it is."""

    @field_validator("localize", "edit", "guard", "attack", "suppress")
    @classmethod
    def _known_methods(cls, value: dict[str, Options], info: Any) -> dict[str, Options]:
        registry = REGISTRIES[info.field_name]
        if info.field_name == "attack" and not value:
            raise ValueError("attack: got no attacks, allowed: at least one, such as [attack.asking]")
        checked = {name: registry.get(name).validate(options) for name, options in value.items()}
        if info.field_name == "suppress":  # a control without a learning rate looks for one
            return {name: {key: checked[name][key] for key in options} for name, options in value.items()}
        if info.field_name == "localize":  # one without a seed of its own takes the run's
            for name in (name for name, options in value.items() if "seed" not in options):
                checked[name].pop("seed", None)
        return checked

    @field_validator("evaluate")
    @classmethod
    def _known_options(cls, value: Options) -> Options:
        checked = Method(name="evaluate", kind="stage", function=evaluate, source="").validate(value)
        return {name: checked[name] for name in value}

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: list[ArmSettings]) -> list[ArmSettings]:
        for arm in arms:
            if sum(given is not None for given in (arm.localizer, arm.components, arm.guard)) != 1:
                raise ValueError("arms: give each either a localizer, or components, or a guard")
            if arm.label is not None and not LABEL.fullmatch(arm.label):
                raise ValueError(f"arm {arm.label!r}: allowed are letters, digits, and . _ - + # between them")
            if arm.localizer is not None:
                LOCALIZERS.get(arm.localizer)
            for name in arm.components or ():
                Component.parse(name)
            if managed := SET_BY_THE_RUN & set(arm.options):
                raise ValueError(f"arm {arm.name!r}: option {min(managed)!r} is not its editor's; set the arm's `seed`")
            (GUARDS.get(arm.guard) if arm.guard else EDITORS.get(arm.editor)).validate(arm.options)
        names = [arm.name for arm in arms]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"arm {sorted(repeated)[0]!r} is listed twice; give one of them a label or a seed")
        return arms

    def options(self, stage: Literal["localize", "edit", "guard", "attack"], method: str) -> Options:
        """Validated options of a method: those of the file, else its defaults."""
        return REGISTRIES[stage].get(method).validate(getattr(self, stage).get(method, {}))


PLANTED = "bench-planted"  # how the presets are called that are no runs: `load_planted` reads them


def preset_names(*, planted: bool = False) -> tuple[str, ...]:
    """The presets of runs that come with the package, or those of `bench planted`."""
    names = sorted(Path(str(p)).stem for p in files("mechunlearn.presets").iterdir() if str(p).endswith(".toml"))
    return tuple(name for name in names if name.startswith(PLANTED) == planted)


def load_settings(name_or_path: str | Path, changes: Mapping[str, Any] | None = None) -> Settings:
    """Read a preset by name or a TOML file by path.

    Args:
        changes: values that replace the file's, by key; a dot reaches into a table ("facts.fold").

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: broken syntax, an unknown key or method, a value out of range; one line that names the file.
    """
    path, data = read_preset(name_or_path, preset_names())
    return run_settings(data, changes or {}, str(path))


def read_preset(name_or_path: str | Path, names: Sequence[str], folder: str = ".") -> tuple[Path, dict[str, Any]]:
    """The file of a preset among `names`, or the file of that path, and what is in it; its name is the file's own.

    Args:
        folder: of the presets, below the package's.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: broken syntax.
    """
    path = Path(name_or_path)
    if str(name_or_path) in names:
        path = Path(str(files("mechunlearn.presets"))) / folder / f"{name_or_path}.toml"
    elif not path.is_file():
        raise FileNotFoundError(f"no preset or file {str(name_or_path)!r}.{did_you_mean(str(name_or_path), names)}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    return path, {"name": path.stem, **data}


def run_settings(data: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> Settings:
    """A run's settings with some values replaced; see `load_settings`.

    Raises:
        ValueError: a key that reaches into something that is no table, one that a run sets itself, or a wrong one.
    """
    changed = copy.deepcopy(dict(data))
    for key, value in changes.items():
        *tables, last = key.split(".")
        table = changed
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"--set: got {key!r}, but {name!r} is not a table; change it in a TOML file")
        table[last] = value
    _refuse_what_a_run_sets(changed, where)
    return check_settings(changed, where)


def _refuse_what_a_run_sets(data: Mapping[str, Any], where: str, key: str = "") -> None:
    """Raise for the first option that would be overwritten, at any depth."""
    for name, value in data.items():
        here = f"{key}.{name}".removeprefix(".")
        if name in SET_BY_THE_RUN and here.partition(".")[0] in ("edit", "guard", "attack", "evaluate", "suppress"):
            raise ValueError(
                f"{where}: key '{here}': a run sets it; allowed: `seed` at the top of the file, or of an arm"
            )
        if isinstance(value, Mapping):
            _refuse_what_a_run_sets(value, where, here)


def check_settings(data: dict[str, Any], where: str) -> Settings:
    """Validate a run's settings held in a dictionary; `where` begins the message of an error."""
    return check(Settings, data, where)


def check(kind: type[S], data: dict[str, Any], where: str) -> S:
    """Validate settings of any kind; `where` begins the one line of an error."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"] if not _is_branch(part))
        if problem["type"] == "extra_forbidden":
            raise ValueError(
                f"{where}: unknown key '{key}'.{did_you_mean(_last(problem['loc']), _siblings(kind, problem['loc']))}"
            ) from None
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if problem["type"] == "value_error":
            raise ValueError(f"{where}: {message}") from None
        got = "nothing" if problem["type"] == "missing" else repr(problem["input"])
        raise ValueError(f"{where}: key '{key}': got {got}, allowed: {message}") from None


def _is_branch(part: str | int) -> bool:
    """Pydantic names the member of a union in the location; users did not write that."""
    return isinstance(part, str) and ("[" in part or part in ("int", "float"))


def _last(location: Sequence[str | int]) -> str:
    return str(location[-1])


def _siblings(kind: type[Strict], location: Sequence[str | int]) -> tuple[str, ...]:
    """The keys that are allowed where an unknown one stood."""
    homes: dict[str, type[BaseModel]] = {
        "facts": FactsSettings, "mask": MaskSettings, "verdict": VerdictSettings, "arms": ArmSettings,
    }  # fmt: skip
    home = homes.get(str(location[0]), kind) if len(location) > 1 else kind
    return tuple(sorted(home.model_fields))
