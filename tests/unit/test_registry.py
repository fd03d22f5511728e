import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mechunlearn.registry import Registry


class Data:
    """Something a TOML file cannot hold."""


@pytest.fixture
def registry() -> Registry:
    registry = Registry("localizer")

    @registry.register("gradient", source="A paper")
    def gradient(
        model: Data, facts: Sequence[Data], *, metric: Literal["logit_diff", "prob"] = "logit_diff",
        steps: Annotated[int, Field(ge=1)] = 5, scale: float = 1.0, layers: tuple[int, ...] | None = None,
        twin: Data | None = None, on_step: Callable[[int], None] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        """Score by gradient.

        More.
        """

    @registry.register("needs_rank", source="A paper")
    def needs_rank(model: Data, *, rank: int) -> None: ...

    return registry


def test_options_are_the_plain_keyword_only_parameters(registry: Registry) -> None:
    method = registry.get("gradient")
    assert list(method.options.model_fields) == ["metric", "steps", "scale", "layers", "seed"]
    assert method.defaults() == {"metric": "logit_diff", "steps": 5, "scale": 1.0, "layers": None, "seed": 0}
    assert (method.summary, method.source, method.kind) == ("Score by gradient.", "A paper", "localizer")


def test_validation_fills_in_defaults_and_its_result_validates_to_itself(registry: Registry) -> None:
    method = registry.get("gradient")
    checked = method.validate({"steps": 7, "layers": [1, 2]})
    assert checked == method.defaults() | {"steps": 7, "layers": (1, 2)}
    assert method.validate(checked) == checked


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"step": 3}, ["unknown option 'step'", "Did you mean 'steps'?", "metric"]),
        ({"steps": "3"}, ["'steps'", "got '3'", "valid integer"]),
        ({"steps": True}, ["'steps'", "got True"]),
        ({"steps": 0}, ["'steps'", "got 0", "greater than or equal to 1"]),
        ({"scale": math.nan}, ["'scale'", "got nan", "finite"]),
        ({"metric": "logits"}, ["'metric'", "got 'logits'", "'logit_diff' or 'prob'"]),
        ({"twin": None}, ["unknown option 'twin'"]),
    ],
)
def test_a_wrong_option_is_a_one_line_error_that_says_what_is_allowed(
    registry: Registry, options: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^gradient: ") as caught:
        registry.get("gradient").validate(options)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_missing_required_option_is_an_error(registry: Registry) -> None:
    assert registry.get("needs_rank").defaults() == {}
    with pytest.raises(ValueError, match="needs_rank: option 'rank': got nothing, allowed: Field required"):
        registry.get("needs_rank").validate({})


def test_an_unknown_name_is_answered_with_the_closest_and_all_known_ones(registry: Registry) -> None:
    with pytest.raises(ValueError, match=r"unknown localizer: 'gradiant'. Did you mean 'gradient'\? Known: gradient, "):
        registry.get("gradiant")


def test_two_functions_of_one_name_are_refused(registry: Registry) -> None:
    with pytest.raises(ValueError, match="'gradient' is registered twice"):

        @registry.register("gradient", source="another")
        def other() -> None: ...


@pytest.fixture
def package(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "methods_for_test"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from mechunlearn.registry import Registry\nMETHODS = Registry('method', package=__name__)\n"
        "def __getattr__(name):\n    return METHODS.attribute(name)\n"
    )
    for name in ("first", "second"):
        (folder / f"{name}.py").write_text(
            f"from methods_for_test import METHODS\n@METHODS.register('{name}', source='none')\n"
            f"def {name}(*, seed: int = 0):\n    return '{name}'\n"
        )
    (folder / "helpers.py").write_text("x = 1\n")
    (folder / "beside.py").write_text("def beside():\n    return 'beside'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [m for m in sys.modules if m.startswith("methods_for_test")]:
        monkeypatch.delitem(sys.modules, module)
    return "methods_for_test"


def test_a_packages_methods_are_imported_when_asked_for(package: str) -> None:
    methods = __import__(package)
    assert "methods_for_test.first" not in sys.modules
    assert methods.METHODS.get("first").function() == "first"
    assert "methods_for_test.second" not in sys.modules
    assert methods.METHODS.names() == ("first", "second")


def test_a_packages_attribute_is_the_function_before_and_after_its_file_is_imported(package: str) -> None:
    methods = __import__(package)
    assert methods.first() == "first"
    __import__(f"{package}.first")
    __import__(f"{package}.second")
    assert (methods.first(), methods.second()) == ("first", "second")
    assert methods.helpers.x == 1
    assert methods.beside() == methods.beside() == "beside"  # no method, but named as its file, too
    with pytest.raises(AttributeError, match="no attribute 'third'"):
        _ = methods.third


def test_the_light_modules_do_not_import_torch() -> None:
    light = ("localize", "edit", "attack", "sources", "components", "facts", "registry")
    imports = ", ".join(f"mechunlearn.{name}" for name in light)
    code = f"import sys, {imports}\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_docstring_says_of_an_option_is_read_to_its_end():
    registry = Registry("localizer")

    @registry.register("told", source="A paper")
    def told(
        model: Data, *, steps: int = 5, first: float = 1.0, second: float = 2.0,
        silent: Annotated[int, Field(description="of the option itself")] = 0, nothing: int = 1,
    ) -> None:  # fmt: skip
        """Do it.

        Args:
            model: no option.
            steps: how many: one after
                another.
            first, second: of a pair.

        Raises:
            nothing: at all.
        """

    assert registry.get("told").described() == {
        "steps": "how many: one after another.", "first": "of a pair.", "second": "of a pair.",
        "silent": "of the option itself", "nothing": "",
    }  # fmt: skip
