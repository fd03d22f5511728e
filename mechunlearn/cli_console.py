"""What the commands share: options, how settings are read, what is printed; imports of the package come late."""

import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # rich takes 80 for a pipe or a file
LINE_SECONDS = 20.0  # between two lines of progress in a file

ModelOption = Annotated[str, typer.Option("--model", help="Bundled organism, local Hugging Face folder, or hub name.")]
TwinOption = Annotated[str | None, typer.Option("--twin", help="A model that never knew the facts, if there is one.")]
FactsOption = Annotated[
    str,
    typer.Option("--facts", help="Forget set (people-256); or data set, file, hub name: see --forgotten."),
]
ForgottenOption = Annotated[
    str | None,
    typer.Option(
        "--forgotten", help="File of those of the --facts that go; default: one of each of half of the subjects."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Option of the method or setting, as key=value (TOML value); `list METHOD` says which. Repeatable.",
    ),
]


def settings_of(config: str, *, model: str | None, device: str | None, pairs: list[str] | None) -> Any:
    """The settings of a run, from a preset or a file and what the command line changes of them."""
    from mechunlearn.settings import load_settings

    changes = {key: value for key, value in (("model", model), ("device", device)) if value is not None}
    return load_settings(config, changes | pairs_of(pairs))


def pairs_of(pairs: list[str] | None) -> dict[str, Any]:
    """Read key=value options; the value is TOML, or a bare string."""
    import tomllib

    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"--set: got {pair!r}, allowed: key=value")
        try:
            options[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            options[key] = text
    return options


@contextlib.contextmanager
def showing_progress() -> Iterator[Any]:
    """A callback (text, done, total): a bar with the time left on stderr, or a line now and then if that is a file."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    if not errors.is_terminal:
        last = time.monotonic()  # nothing at once: a mistake is to stay one line

        def line(text: str, done: float, total: float) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                errors.print(f"{time.strftime('%H:%M:%S')} {done:.0f} of {total:.0f}: {escape(text)}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(text: str, done: float, total: float) -> None:
            bar.update(task, description=escape(text), completed=done, total=total)

        yield update


@contextlib.contextmanager
def advising(advice: str) -> Iterator[None]:
    """If a worker process is killed inside, note on the error how to run with fewer of them; `cli.main` says it."""
    try:
        yield
    except BrokenExecutor as error:
        error.add_note(advice)
        raise


def print_frame(frame: Any, title: str) -> None:
    """Print a data frame as a table."""
    table = Table(title=escape(title), title_justify="left")
    for column in frame.columns:
        table.add_column(escape(str(column)), overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(escape(f"{v:.3f}" if isinstance(v, float) else str(v)) for v in row))
    console.print(table)
