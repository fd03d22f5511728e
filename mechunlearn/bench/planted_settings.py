"""What `bench planted` builds and compares, read from a TOML file: the ladder, its parts, the localizers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mechunlearn.components import Component, Reduction
from mechunlearn.localize import LOCALIZERS
from mechunlearn.settings import Options, Strict, check, preset_names, read_preset

PlantedArchitecture = Literal["gpt2", "gpt_neox", "llama"]


class LocalizerSettings(Strict):
    """One line of the comparison: a registered localizer with options, and how its scores become one a component."""

    method: str
    name: str = ""
    """How the line is called; the method's name unless given."""
    options: Options = Field(default={})
    reduce: Reduction = "mean"

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return {"name": data.get("method", ""), **data} if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _known(self) -> "LocalizerSettings":
        LOCALIZERS.get(self.method).validate(self.options)
        return self


class PlantedSettings(Strict):
    """The whole bench."""

    name: str
    architectures: list[PlantedArchitecture]
    seeds: Annotated[int, Field(ge=1)]
    held_out_architectures: list[PlantedArchitecture]
    held_out_seeds: list[int]
    plants: list[str]
    """What is planted in every base: "m3", a band "m1+m2", attention "a4"."""
    ladder: Options = Field(default={})
    """Fields of `organisms.planted.Recipe` that differ from its defaults."""
    workers: Annotated[int, Field(ge=1)] = 1
    every_localizer: bool = False
    """Compare every registered localizer that no line names, with its defaults."""
    common: Options = Field(default={})
    """Options that every localizer gets that has them and does not say otherwise: as many pairs for all, say."""
    leave_out: list[str] = Field(default=[])
    """Localizers that `every_localizer` does not mean."""
    localizers: list[LocalizerSettings] = Field(default=[])

    @field_validator("plants")
    @classmethod
    def _components(cls, plants: list[str]) -> list[str]:
        for part in plants:
            components = [Component.parse(name) for name in part.split("+")]
            if len({component.kind for component in components} & {"mlp", "attention"}) != 1 or any(
                component.index is not None for component in components
            ):
                raise ValueError(f"plants: got {part!r}, allowed: MLPs (m3, m1+m2) or attention sublayers (a4)")
        return plants

    @model_validator(mode="after")
    def _consistent(self) -> "PlantedSettings":
        names = [line.name for line in self.localizers]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"localizers: {repeated[0]!r} is listed twice; give one of them a `name`")
        if not set(self.architectures) - set(self.held_out_architectures) or not set(range(self.seeds)) - set(
            self.held_out_seeds
        ):
            raise ValueError("held_out: got every architecture or seed, allowed: all but one; leave some to develop on")
        return self

    def lines(self) -> tuple[LocalizerSettings, ...]:
        """The localizers to compare, those of the file first, each with all that it is given."""
        named = {line.method for line in self.localizers} | set(self.leave_out)
        rest = [name for name in LOCALIZERS.names() if self.every_localizer and name not in named]

        def given(line: LocalizerSettings) -> LocalizerSettings:
            known = LOCALIZERS.get(line.method).options.model_fields
            common = {name: value for name, value in self.common.items() if name in known}
            return line.model_copy(update={"options": common | line.options})

        return tuple(map(given, (*self.localizers, *(LocalizerSettings(method=name) for name in rest))))


def load_planted(name_or_path: str | Path) -> PlantedSettings:
    """Read a preset of this bench by name, or a TOML file by path.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: broken syntax, an unknown key or localizer, a value out of range; one line that names the file.
    """
    path, data = read_preset(name_or_path, preset_names(planted=True))
    return check(PlantedSettings, data, str(path))
