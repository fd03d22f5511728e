"""The commands of `mechunlearn study`; each imports late."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mechunlearn.cli_console import advising, console, print_frame, showing_progress

study_app = typer.Typer(help="The Mechanistic Unlearning study (arXiv:2410.12949).", no_args_is_help=True)


PresetsArgument = Annotated[
    list[str] | None, typer.Argument(help="Presets of the study or TOML files; none: the paper's six, to report: all.")
]
StudyOut = Annotated[Path, typer.Option("--out", help="Folder of finished jobs and tables.")]
StudyModel = Annotated[
    str | None, typer.Option("--model", help="Run on this model's file in place of the preset's own.")
]


@study_app.command("run")
def study_run(
    presets: PresetsArgument = None,
    model: StudyModel = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="In place of the presets' own.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three arms, two seeds, the smallest attacks.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, help="Processes of one thread each (on CUDA one); default: the presets' largest number."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="In place of the presets' own.")] = None,
    out: StudyOut = Path(".runs/study"),
) -> None:
    """Locate, tune, edit and attack every arm of the presets; goes on where it stopped, also on another day."""
    from mechunlearn import study_stage

    if quick and presets:
        raise ValueError(f"study run: got --quick beside {', '.join(presets)}; leave one of them out")
    names = [study_stage.QUICK] if quick else presets or []
    parts = study_stage.chosen_parts(names, out, model=model, seeds=seeds, device=device, workers=workers)
    print_frame(study_stage.planned(parts), title="Estimated hours from the beginning")
    with showing_progress() as progress, advising("--workers 1"):
        tables = study_stage.run(parts, out, on_progress=progress)
    _show_study(tables, out)


@study_app.command("report")
def study_report(
    presets: PresetsArgument = None,
    model: StudyModel = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="As given to `study run`.")] = None,
    out: StudyOut = Path(".runs/study"),
) -> None:
    """Write the tables and figures of those presets that are finished, from their jobs; runs nothing."""
    from mechunlearn import study_stage

    parts = study_stage.chosen_parts(presets or study_stage.every_preset(), out, model=model, seeds=seeds)
    _show_study(study_stage.write_tables(parts, out), out)


def _show_study(tables: Any, out: Path) -> None:
    shown = tables.verdicts.loc[:, ["preset", "arm", "level", "word", "strongest", "D", "lower", "upper", "n_facts"]]
    print_frame(shown, title="Verdicts, all seeds together")
    console.print(f"tables and figures: {escape(str(out / 'tables'))}", soft_wrap=True)


@study_app.command("plan")
def study_plan(
    preset: Annotated[
        str, typer.Argument(help="sports-athletes-16, sports-whole, counterfact-64, ..., or a TOML file.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="In place of the preset's: a model file's name (gemma-2-9b) or path.")
    ] = None,
    tflops: Annotated[
        float, typer.Option("--tflops", help="What the device reaches; 400 is 40% of an H100's peak in bfloat16.")
    ] = 400.0,
    card: Annotated[float, typer.Option("--card", help="Memory of the device, in GB.")] = 80.0,
) -> None:
    """Resolve every arm of a study on a model, and estimate memory and hours; downloads and runs nothing."""
    from mechunlearn.study.settings import load_study

    study, about = load_study(preset, model=model)
    from mechunlearn.study.dry_run import dry_run

    tables = dry_run(study, about, tflops=tflops, card=card)
    titles = {
        "facts": f"{study.name} on {about.name}: facts",
        "arms": "Arms: what each may edit",
        "memory": f"GB at the worst moment (checkpointed: what it would be so; fits: into {card:g} GB)",
        "hours": f"Hours at {tflops:g} TFLOP/s (estimates from shapes: small batches reach less)",
    }
    for name, frame in tables.items():
        print_frame(frame, title=titles[name])
