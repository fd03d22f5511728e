"""Names -> functions: every method is declared once, by a decorator on its function.

A method's keyword-only parameters are its options: what validates them, what the command line and TOML accept and
what the record of a run holds are all read from the signature here.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo

F = TypeVar("F", bound=Callable[..., Any])

_PLAIN = (int, float, str, bool, type(None))
_CONTAINERS = (tuple, list, dict, Sequence, Mapping)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The hint and list that end every "unknown ..." message."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known) or 'none'}"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One registered function with its name, where it comes from, and its options."""

    name: str
    kind: str
    function: Callable[..., Any]
    source: str

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @cached_property
    def options(self) -> type[BaseModel]:
        """Pydantic model of the plain keyword-only parameters; models, callables and tensors are data, not options.

        Options that methods share come as `**options: Unpack[SomeTypedDict]`, whose annotations hold the defaults.
        """
        hints = get_type_hints(self.function, include_extras=True)
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(self.function).parameters.values():
            annotation = hints.get(parameter.name)
            if parameter.kind is parameter.KEYWORD_ONLY and annotation is not None and _is_plain(annotation):
                required = parameter.default is parameter.empty
                fields[parameter.name] = (annotation, ... if required else parameter.default)
            elif parameter.kind is parameter.VAR_KEYWORD and get_origin(annotation) is Unpack:
                fields |= _shared_options(get_args(annotation)[0])
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
        return create_model(f"{self.name}_options", __config__=config, **fields)

    def defaults(self) -> dict[str, Any]:
        """Every option that has a default, with it."""
        return {name: f.default for name, f in self.options.model_fields.items() if not f.is_required()}

    def described(self) -> dict[str, str]:
        """What the docstring's Args, or the option itself, say of every option; "" of one that nothing is said of."""
        found: dict[str, str] = {}
        _, _, arguments = (inspect.getdoc(self.function) or "").partition("\nArgs:\n")
        for entry in re.split(r"\n(?=    \w)", "\n" + arguments.partition("\n\n")[0])[1:]:
            names, _, said = entry.partition(":")
            found |= dict.fromkeys(map(str.strip, names.split(",")), " ".join(said.split()))
        return {name: found.get(name) or f.description or "" for name, f in self.options.model_fields.items()}

    def wanted(self, **offered: Any) -> dict[str, Any]:
        """Those of the offered arguments that the function takes: a localizer may want a twin, or facts to retain."""
        taken = inspect.signature(self.function).parameters
        return {name: value for name, value in offered.items() if name in taken}

    def validate(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Check the given options and fill in the defaults of the others.

        Raises:
            ValueError: one line naming the method, the option, what was got and what is allowed.
        """
        fields = self.options.model_fields
        for key in options:
            if key not in fields:
                raise ValueError(f"{self.name}: unknown option {key!r}.{did_you_mean(str(key), sorted(fields))}")
        given = {key: _lists_to_tuples(fields[key].annotation, value) for key, value in options.items()}
        try:
            checked = self.options.model_validate(given)
        except ValidationError as error:
            raise ValueError(f"{self.name}: {_one_line(error)}") from None
        return {name: getattr(checked, name) for name in fields}


class Registry:
    """The methods of one stage, by name.

    With `package`, its modules are imported on the first look-up that needs them, so that importing the package is
    light and `names()` is still complete.
    """

    def __init__(self, kind: str, *, package: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self._methods: dict[str, Method] = {}
        self._complete = package is None
        if package in sys.modules:
            sys.modules[package].__class__ = _MethodPackage

    def register(self, name: str, *, source: str) -> Callable[[F], F]:
        """Decorator: enter a function under `name`; the function itself is unchanged.

        Args:
            source: the paper or page that the method is from, or what it is a control for.
        """

        def enter(function: F) -> F:
            other = self._methods.get(name)
            if other and (other.function.__module__, other.function.__qualname__) != (
                function.__module__,
                function.__qualname__,
            ):
                raise ValueError(f"{self.kind} {name!r} is registered twice; rename one of them")
            self._methods[name] = Method(name=name, kind=self.kind, function=function, source=source)
            return function

        return enter

    def get(self, name: str) -> Method:
        """The method of that name.

        Raises:
            ValueError: unknown name; the message names the closest one and all known ones.
        """
        if name not in self._methods:
            self._import(name)
        if name not in self._methods:
            self._import_all()
        if name not in self._methods:
            raise ValueError(f"unknown {self.kind}: {name!r}.{did_you_mean(name, self.names())}")
        return self._methods[name]

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        self._import_all()
        return tuple(sorted(self._methods))

    def methods(self) -> tuple[Method, ...]:
        """All methods, sorted by name."""
        return tuple(self._methods[name] for name in self.names())

    def attribute(self, name: str) -> Any:
        """What a package's `__getattr__` returns: the function or else the file of that name, or AttributeError."""
        if not name.startswith("_"):
            if name not in self._methods:
                self._import(name)
            if name not in self._methods:
                self._import_all()
            if name in self._methods:
                return self._methods[name].function
            if module := sys.modules.get(f"{self.package}.{name}"):  # a file beside the methods, or its function
                return vars(sys.modules[str(self.package)]).get(name, module)
        raise AttributeError(f"module {self.package!r} has no attribute {name!r}")

    def _import(self, name: str) -> None:
        if self.package and name.isidentifier() and importlib.util.find_spec(f"{self.package}.{name}"):
            importlib.import_module(f"{self.package}.{name}")

    def _import_all(self) -> None:
        if self._complete or self.package is None:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._complete = True


class _MethodPackage(types.ModuleType):
    """A package whose method files are seen as the functions they are named after.

    Importing `localize/attribution_patching.py` would otherwise bind `localize.attribution_patching` to the module.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and callable(getattr(value, name, None)):
            value = getattr(value, name)
        super().__setattr__(name, value)


def _shared_options(kind: Any) -> dict[str, Any]:
    """The fields of a TypedDict whose annotations are `Annotated[type, Field(default=...)]`."""
    found: dict[str, Any] = {}
    for name, annotation in get_type_hints(kind, include_extras=True).items():
        plain, *notes = get_args(annotation)
        field = next(note for note in notes if isinstance(note, FieldInfo))
        found[name] = (Annotated[plain, field], field.default)
    return found


def _is_plain(annotation: Any) -> bool:
    """Whether a TOML file could hold a value of this type."""
    if annotation in _PLAIN:
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_plain(arguments[0])
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType) or origin in _CONTAINERS:
        return all(_is_plain(argument) for argument in arguments if argument is not Ellipsis)
    return False


def _lists_to_tuples(annotation: Any, value: Any) -> Any:
    """TOML and JSON have lists only; strict validation wants a tuple where the signature says so."""
    if not isinstance(value, list):
        return value
    if get_origin(annotation) is Annotated:
        return _lists_to_tuples(get_args(annotation)[0], value)
    if get_origin(annotation) in (Union, types.UnionType):
        return next((v for a in get_args(annotation) if isinstance(v := _lists_to_tuples(a, value), tuple)), value)
    return tuple(value) if get_origin(annotation) is tuple else value


def _one_line(error: ValidationError) -> str:
    """All problems of a failed validation in one line, each with the option, what was got and what is allowed."""
    problems: dict[str, list[str]] = {}
    got: dict[str, Any] = {}
    for problem in error.errors(include_url=False):
        key = str(problem["loc"][0])
        problems.setdefault(key, []).append(problem["msg"].removeprefix("Input should be "))
        got[key] = "nothing" if problem["type"] == "missing" else repr(problem["input"])
    return "; ".join(
        f"option '{key}': got {got[key]}, allowed: {' or '.join(allowed)}" for key, allowed in problems.items()
    )
