"""What the study runs: a preset (task and size) on a model, whose own file says what suits its size."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mechunlearn.attack import ATTACKS
from mechunlearn.components import Component
from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.settings import FactsSettings, Options, Strict, check, read_preset

TaskName = Literal["athletes", "sport", "counterfact"]
Defect = Literal["copied options", "false labels"]
Trial = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]
"""[learning rate, weight of the edit's own term]."""


class NSettings(Strict):
    """What another number of facts to forget asks for, in place of the task's own."""

    n_mlps: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    start: dict[str, Trial] | None = None
    components: dict[str, list[str]] | None = None


class TaskSettings(Strict):
    """How one kind of task is done on one model."""

    facts: FactsSettings
    target: str | None = None
    """The wrong answer for all facts; None: one drawn for each."""
    n_mlps: Annotated[int, Field(ge=1)]
    """MLPs that fact lookup may edit; every arm that is matched to it edits exactly as many entries."""
    steps: Annotated[int, Field(ge=1)] = 50
    batch_size: Annotated[int, Field(ge=1)] = 32
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Batches a step."""
    max_damage: Annotated[float, Field(gt=0)] = 0.05
    """KL(before || after) on retained prompts, nats a token: every edit ends there at the latest."""
    trials: Annotated[list[Trial], Field(min_length=1)]
    """What the tuner tries, the same for every arm."""
    start: dict[str, Trial] = Field(default_factory=dict)
    """Arm -> the trial published for it: where a search of one's own may begin. One of `trials`."""
    components: dict[str, list[str]] = Field(default_factory=dict)
    """Arm -> the components published for it: used with `published_components`."""
    rank: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Arm -> rank of its updates inside the mask, where training all entries would not fit on one card."""
    attack_rank: Annotated[int, Field(ge=1)] | None = None
    """Of the inner attackers' updates, where an edit is trained against any; None: they train every weight."""
    by_n: dict[Annotated[str, Field(pattern=r"^[0-9]+$")], NSettings] = Field(default_factory=dict)
    """Number of facts -> what was published for so many; `load_study` puts it in place."""

    @model_validator(mode="after")
    def _known_components(self) -> "TaskSettings":
        for arms in (self.components, *(other.components or {} for other in self.by_n.values())):
            for name in (name for names in arms.values() for name in names):
                Component.parse(name)
        return self

    @model_validator(mode="after")
    def _known_trials(self) -> "TaskSettings":
        for start in (self.start, *(other.start or {} for other in self.by_n.values())):
            for arm, trial in start.items():
                if trial not in self.trials:
                    raise ValueError(f"start of '{arm}': got {trial}, allowed: one of trials, {self.trials}")
        return self

    def at(self, n: int | None) -> "TaskSettings":
        """The task for so many facts to forget."""
        other = self.by_n.get(str(n))
        return self if other is None else self.model_copy(update=other.model_dump(exclude_none=True))


class ModelSettings(Strict):
    """A model of the study: what to load, and what suits its size."""

    name: str
    model: str
    """What `load_model` takes: a bundled organism, a folder, a hub name."""
    twin: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    config: str | None = None
    """File beside this one with the Hugging Face configuration, for a dry run without the hub."""
    tasks: dict[TaskName, TaskSettings]
    side_effects: dict[str, str] = Field(default_factory=dict)
    """Facts that the tasks have nothing to do with (sports trivia, say), by name or path, with their format or "auto":
    what is known of them before and after shows side effects; of the bundled data sets, too, as far as known."""
    capability: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Tasks of lm-eval for every edited model, with how many of their questions are asked (needs `[lm-eval]`)."""
    quick: dict[str, Options]
    """Attacks on every arm."""
    standard: dict[str, Options]
    """Attacks on the localized, the random-MLP and the non-localized arm."""
    controls: dict[str, Options] = Field(default_factory=lambda: {"lora": {}})
    """Kinds of suppressed models with their options: attacks that bring these back can show that something is hidden.
    Without any, only asking counts."""

    @field_validator("controls")
    @classmethod
    def _known_controls(cls, value: dict[str, Options]) -> dict[str, Options]:
        for kind, options in value.items():
            SUPPRESSIONS.get(kind).validate(options)
        return value

    @field_validator("quick", "standard")
    @classmethod
    def _known_attacks(cls, value: dict[str, Options]) -> dict[str, Options]:
        for name, options in value.items():
            ATTACKS.get(name).validate(options)
        return value


class StudySettings(Strict):
    """One preset of the study."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: TaskName
    n: Annotated[int, Field(ge=4)] | None = None
    """Facts to forget, drawn anew under every seed; None: all of them."""
    blocks: Annotated[int, Field(ge=1)] = 1
    """Parts that are forgotten one after another, each located anew."""
    steps_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the task's steps, for each part."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Rows of a batch, in place of the task's: as many as a part has facts, say."""
    model: str = "atlas"
    """Which model's file: the line to change."""
    seed: int = 0
    seeds: Annotated[int, Field(ge=1)] = 5
    draws: Annotated[int, Field(ge=1)] = 1
    """Draws of random MLPs under every seed, other ones under each."""
    arms: list[str] = Field(default_factory=list)
    """Names of the arms to run; none: all of them."""
    standard_arms: list[str] = Field(default_factory=list)
    """Of those, the ones that are attacked at the standard level, too, beside those that always are."""
    defects: list[Defect] = Field(default_factory=list)
    """Of the original study: also run what they do, beside the arms without them."""
    published_components: bool = False
    """Edit what was published for an arm in place of what is found here, where there is anything."""
    device: str = "auto"
    workers: Annotated[int, Field(ge=1)] = 2
    """Processes; several presets at once are run by the largest number of any of them, on CUDA all by one."""

    @model_validator(mode="after")
    def _a_fact_for_every_block(self) -> "StudySettings":
        if self.n is not None and 2 * self.blocks > self.n:  # each takes its share of every part; half are hidden
            raise ValueError(
                f"key 'blocks': got {self.blocks}, allowed: at most {self.n // 2}, half of n, so that each has facts"
            )
        return self

    def steps_of(self, task: TaskSettings) -> int:
        """Training steps of an edit."""
        return max(1, round(self.steps_share * task.steps))


def study_presets() -> tuple[str, ...]:
    """Names of the presets of the study."""
    return _names("study")


def study_models() -> tuple[str, ...]:
    """Names of the models that have a file."""
    return _names("models")


def load_study(name_or_path: str | Path, **changes: Any) -> tuple[StudySettings, ModelSettings]:
    """Read a preset and its model's file, each by name or by path; a change that is None is none.

    The model's task is the one for the preset's number of facts and batch, its `config` a path from here.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: broken syntax, an unknown key, a value out of range, or a model without this task.
    """
    path, data = read_preset(name_or_path, study_presets(), "study")
    given = data | {key: value for key, value in changes.items() if value is not None}
    study = check(StudySettings, given, str(path))
    where, model = load_study_model(study.model)
    if study.task not in model.tasks:
        raise ValueError(f"{where}: got no task '{study.task}', allowed for {model.name}: {', '.join(model.tasks)}")
    task = model.tasks[study.task].at(study.n)
    tasks = model.tasks | {study.task: task.model_copy(update={"batch_size": study.batch_size or task.batch_size})}
    config = model.config and str(where.parent / model.config)
    return study, model.model_copy(update={"tasks": tasks, "config": config})


def load_study_model(name_or_path: str) -> tuple[Path, ModelSettings]:
    """Read a model's file, by name or by path; where it is, and what it says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken syntax, an unknown key, or a value out of range.
    """
    path, data = read_preset(name_or_path, study_models(), "models")
    return path, check(ModelSettings, data, str(path))


def _names(folder: str) -> tuple[str, ...]:
    home = files("mechunlearn.presets") / folder
    return tuple(sorted(Path(str(p)).stem for p in home.iterdir() if str(p).endswith(".toml")))
