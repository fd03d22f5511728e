"""The commands of `mechunlearn organism`; each imports late."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mechunlearn.cli_console import TwinOption, console, print_frame, showing_progress

organism_app = typer.Typer(help="Train and inspect the bundled model organisms.", no_args_is_help=True)


@organism_app.command("train")
def organism_train(
    name: Annotated[str, typer.Argument(help="atlas, atlas-never-a or atlas-never-b.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of checkpoints and of the finished model.")] = Path(
        ".runs/organisms"
    ),
    device: Annotated[str, typer.Option("--device")] = "cpu",
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2000, help="Fewer tokens than the recipe's, for a trial.")
    ] = None,
) -> None:
    """Train a bundled organism from scratch; interrupted, it goes on from its last checkpoint."""
    from mechunlearn import stages

    with showing_progress() as progress:
        folder = stages.train(name, out / name, device=device, tokens=tokens, on_step=progress)
    console.print(f"model: {escape(str(folder))}", soft_wrap=True)
    console.print(f"curve: {escape(str(out / name / 'training.html'))}", soft_wrap=True)


@organism_app.command("sweep")
def organism_sweep(
    out: Annotated[Path, typer.Option("--out", help="Folder that receives sweep.csv and sweep.html.")] = Path(
        ".runs/sweep"
    ),
    device: Annotated[str, typer.Option("--device")] = "cpu",
) -> None:
    """Train small organisms without each ingredient of the recipe and check them; goes on where it stopped."""
    from mechunlearn import stages

    with showing_progress() as progress:
        rows = stages.sweep(out, device=device, on_step=progress)
    console.print(f"{rows['recipe'].nunique()} recipes: {escape(str(out / 'sweep.html'))}", soft_wrap=True)


@organism_app.command("check")
def organism_check(
    name: Annotated[str, typer.Argument(help="Bundled organism, local Hugging Face folder, or hub name.")],
    facts: Annotated[
        list[str] | None, typer.Option("--facts", help="Data set, file or hub name. Repeatable; default: the bundled.")
    ] = None,
    twin: TwinOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder that receives the folder of the check.")] = Path(
        ".runs/checks"
    ),
    card: Annotated[bool, typer.Option("--card", help="Also write the organism's model card (README.md).")] = False,
    device: Annotated[str, typer.Option("--device")] = "auto",
) -> None:
    """Measure whether a model knows facts and looks them up at the subject; writes tables and a figure."""
    from mechunlearn import stages
    from mechunlearn.bench.criteria import by_dataset, summary

    with showing_progress() as progress:
        check, folder = stages.check(name, facts, twin=twin, device=device, out=out, card=card, on_step=progress)
    print_frame(by_dataset(check.criteria), title=f"{name}: what was measured, what is needed")
    console.print(summary(check.criteria))
    for dataset, mechanism in check.mechanisms.items():
        console.print(f"{escape(dataset)}: facts are looked up by MLPs {mechanism.band.first} to {mechanism.band.last}")
    console.print(f"figure and tables: {escape(str(folder))}", soft_wrap=True)
