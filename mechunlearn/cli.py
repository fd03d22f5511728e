"""The command line: a command a verb, plus edges, undo, run, plan, list, organism, bench, study; each imports late."""

import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    name="mechunlearn",
    help="Find where a language model looks facts up, edit only there, attack the result, decide: removed or hidden?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
organism_app = typer.Typer(help="Train and inspect the bundled model organisms.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")

bench_app = typer.Typer(help="Measure the program itself on models of known truth.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

study_app = typer.Typer(help="The Mechanistic Unlearning study (arXiv:2410.12949).", no_args_is_help=True)
app.add_typer(study_app, name="study")

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # rich takes 80 for a pipe or a file

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
MethodOption = Annotated[
    str | None, typer.Option("--method", help="Method of this stage; `mechunlearn list` shows all.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder that receives the result.")]
LINE_SECONDS = 20.0  # between two lines of progress in a file

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Option of the method or setting, as key=value (TOML value). Repeatable."),
]


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A preset (see `list`) or a TOML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder that receives the run's folder.")] = Path(".runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not reuse finished parts of an earlier run.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="Override the file's model.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Override the file's device.")] = None,
    set_: SetOption = None,
) -> None:
    """Localize, edit, attack and decide, as a preset or a TOML file says; finished parts are reused."""
    settings = _settings(config, model=model, device=device, pairs=set_)
    from mechunlearn.experiment import run_experiment

    with _progress() as progress:
        result = run_experiment(settings, out / settings.name, fresh=fresh, on_progress=progress)
    _finish(result, out / settings.name)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A preset (see `list`) or a TOML file.")],
    set_: SetOption = None,
) -> None:
    """Say what a run would do, what it would edit, and whether its facts are enough for a verdict; runs nothing."""
    settings = _settings(config, model=None, device=None, pairs=set_)
    from mechunlearn.experiment import plan_experiment

    for title, frame in plan_experiment(settings).items():
        _print_frame(frame, title=title)


@app.command()
def localize(
    out: OutOption,
    model: ModelOption = "atlas",
    facts: FactsOption = "people-256",
    forgotten: ForgottenOption = None,
    method: MethodOption = "relevance_patching",
    twin: TwinOption = None,
    forms: Annotated[
        int, typer.Option("--forms", min=1, help="Forms of the prompt whose rankings are compared; 1: the prompt only.")
    ] = 2,
    exact: Annotated[
        bool, typer.Option("--exact/--no-exact", help="Compare first-order scores with exact patching (32 facts).")
    ] = True,
    device: Annotated[str, typer.Option("--device")] = "auto",
    set_: SetOption = None,
) -> None:
    """Score the model's components for a set of facts; writes scores.safetensors and scores.csv."""
    from mechunlearn import stages
    from mechunlearn.localize.checks import describe_checks

    scores = stages.localize(
        model, stages.chosen(facts, forgotten), method or "", _pairs(set_), twin=twin, device=device, forms=forms,
        exact=exact, out=out,
    )  # fmt: skip
    frame = scores.to_frame().sort_values("value", ascending=False)
    shown = frame.head(12)[["component", "value", "standard_error", *scores.roles]]
    _print_frame(shown, title=f"{scores.method}, highest {len(shown)} of {len(frame)}: {scores.sign}")
    for line in describe_checks(scores):
        console.print(line)
    console.print(f"scores: {escape(str(out / 'scores.safetensors'))}")


@app.command()
def edges(
    out: OutOption,
    model: ModelOption = "atlas",
    facts: FactsOption = "people-256",
    forgotten: ForgottenOption = None,
    steps: Annotated[
        int, typer.Option("--steps", help="Points between the two runs whose gradients are averaged (EAP-IG).")
    ] = 0,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", help="Backward rule of relevance patching: norms or activations. Repeatable."),
    ] = None,
    device: Annotated[str, typer.Option("--device")] = "auto",
    set_: SetOption = None,
) -> None:
    """Score what each head and MLP passes on to each later one; writes edges.csv and circuit.html."""
    from mechunlearn import stages

    options = {"steps": steps, "rules": rule or [], **_pairs(set_)}
    found = stages.edges(model, stages.chosen(facts, forgotten), options, device=device, out=out)
    frame = found.to_frame()
    _print_frame(frame.head(10), title=f"edges, largest {min(10, len(frame))} of {len(frame)}")
    console.print(escape(found.sign))
    console.print(f"edges and circuit: {escape(str(out))}", soft_wrap=True)


@app.command()
def edit(
    out: OutOption,
    model: ModelOption = "atlas",
    facts: FactsOption = "people-256",
    forgotten: ForgottenOption = None,
    method: MethodOption = "inject",
    scores: Annotated[Path | None, typer.Option("--scores", help="scores.safetensors of `localize`.")] = None,
    components: Annotated[
        str | None, typer.Option("--components", help="Instead of scores: m2,m3 or a5.h1,...")
    ] = None,
    budget: Annotated[float, typer.Option("--budget", help="Share of MLP and attention parameters to edit.")] = 0.2,
    on: Annotated[
        Path | None,
        typer.Option("--on", help="Folder of an earlier `edit`: go on from there; --out gets all edits and drift.csv."),
    ] = None,
    export: Annotated[bool, typer.Option("--export", help="Also write the edited model as a checkpoint.")] = False,
    device: Annotated[str, typer.Option("--device")] = "auto",
    set_: SetOption = None,
) -> None:
    """Change the selected weights only; writes the edit, and with --export a plain Hugging Face checkpoint."""
    from mechunlearn import stages

    table, drift = stages.edit(
        model, stages.chosen(facts, forgotten), method or "", _pairs(set_), scores=scores, components=components,
        budget=budget, export=export, device=device, out=out, on=on,
    )  # fmt: skip
    _print_frame(table, title=f"{method}: before and after; p_true is among the candidates without the injected answer")
    if drift is None:
        console.print(f"edit: {escape(str(out / 'edit.safetensors'))}")
        return
    shown = ["step", "block", "forgotten", "p_true", "accuracy", "retained_accuracy", "kl_retained", "perplexity_ratio"]
    _print_frame(drift[shown], title="After each edit: the facts of every block, and what was to stay")
    console.print(f"edits and drift.csv: {escape(str(out))}", soft_wrap=True)


@app.command()
def undo(
    folder: Annotated[Path, typer.Argument(help="A folder of several edits, written by `edit --on`.")],
    out: OutOption,
    keep: Annotated[int, typer.Option("--keep", help="How many of the edits stay, the first ones.")],
) -> None:
    """Take back the last of several edits; writes the ones that stay, for `edit --on` and `attack --edit`."""
    from mechunlearn import stages

    undone = stages.undo(folder, keep=keep, out=out)
    console.print(f"{undone} edits undone, {keep} left: {escape(str(out))}", soft_wrap=True)


@app.command()
def attack(
    out: OutOption,
    model: ModelOption = "atlas",
    facts: FactsOption = "people-256",
    forgotten: ForgottenOption = None,
    method: Annotated[
        str | None, typer.Option("--method", help="One attack; default: relearning, with --original all of them.")
    ] = None,
    original: Annotated[
        str | None, typer.Option("--original", help="What the model was made of: judge it, with controls and a report.")
    ] = None,
    twin: TwinOption = None,
    edited: Annotated[Path | None, typer.Option("--edit", help="Folder that `edit` wrote, applied first.")] = None,
    device: Annotated[str, typer.Option("--device")] = "auto",
    set_: SetOption = None,
) -> None:
    """Try to get the facts back; with --original the verdict on a checkpoint that any tool made, and a report.

    Options of --set are the method's; with --original those of a run (attack.relearning.steps, facts.n, seeds, ...).
    """
    from mechunlearn import stages

    if original is not None:
        if edited is not None:
            raise ValueError("attack: got --edit and --original; --model is the edited checkpoint, so leave --edit out")
        settings = stages.checkpoint_settings(
            model,
            original,
            stages.chosen(facts, forgotten),
            method,
            _pairs(set_),
            twin=twin,
            device=device,
            name=out.name,
        )
        from mechunlearn.experiment import run_experiment

        with _progress() as progress:
            result = run_experiment(settings, out, on_progress=progress)
        _finish(result, out)
        return
    chosen = method or "relearning"
    table = stages.attack(
        model, stages.chosen(facts, forgotten), chosen, _pairs(set_), edit_folder=edited, twin=twin, device=device,
        out=out,
    )  # fmt: skip
    _print_frame(table, title=f"{chosen}: hidden facts")
    console.print(f"rows: {escape(str(out))}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A finished run's folder.")]) -> None:
    """Write report.html, verdicts.csv and facts.csv of a finished run again and print its verdicts."""
    from mechunlearn.runs import load_run

    _finish(load_run(folder), folder)


@app.command(name="list")
def list_(
    stage: Annotated[
        str | None, typer.Argument(help="localizers, editors, attacks, sources, presets, models or forget sets.")
    ] = None,
) -> None:
    """List methods, presets, bundled models and forget sets."""
    from mechunlearn import stages

    for title, frame in stages.listing(stage).items():
        _print_frame(frame, title=title)


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

    with _progress() as progress:
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

    with _progress() as progress:
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

    with _progress() as progress:
        check, folder = stages.check(name, facts, twin=twin, device=device, out=out, card=card, on_step=progress)
    _print_frame(by_dataset(check.criteria), title=f"{name}: what was measured, what is needed")
    console.print(summary(check.criteria))
    for dataset, mechanism in check.mechanisms.items():
        console.print(f"{escape(dataset)}: facts are looked up by MLPs {mechanism.band.first} to {mechanism.band.last}")
    console.print(f"figure and tables: {escape(str(folder))}", soft_wrap=True)


@bench_app.command("verdict")
def bench_verdict(
    config: Annotated[
        str, typer.Argument(help="A preset or TOML file with the models, controls and attacks.")
    ] = "bench",
    quick: Annotated[bool, typer.Option("--quick", help="One seed, few facts, five models.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many times all is dealt, made and attacked.")] = 5,
    out: Annotated[Path, typer.Option("--out", help="Folder of finished cells and tables.")] = Path(".runs/bench"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not reuse finished parts.")] = False,
    set_: SetOption = None,
) -> None:
    """Judge models of known truth and count how often the verdict is right; goes on where it stopped."""
    settings = _settings("bench-quick" if quick else config, model=None, device=None, pairs=set_)
    from mechunlearn import stages

    with _progress() as progress:
        bench = stages.bench_verdict(
            settings, out, seeds=1 if quick else seeds, quick=quick, fresh=fresh, on_progress=progress
        )
    _print_frame(bench.confusion().reset_index(), title="Truth, and what was said (verdicts)")
    shown = bench.at().loc[:, ["seed", "case", "word", "attack", "D", "lower", "upper", "seconds"]]
    _print_frame(shown, title="Every model")
    _print_frame(bench.power.loc[:, ["seed", "kind", "accepted", "attack", "D", "lower", "recovers"]],
                 title="What each attack brings back of knowledge hidden on purpose")  # fmt: skip
    _print_frame(bench.goals(), title="Goals")
    console.print(f"tables and figure: {escape(str(out / 'tables'))}", soft_wrap=True)


@bench_app.command("planted")
def bench_planted(
    config: Annotated[
        str, typer.Argument(help="A preset or TOML file with the ladder and the localizers.")
    ] = "bench-planted",
    quick: Annotated[bool, typer.Option("--quick", help="Two small bases of three plants, four localizers.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder of the ladder, its scores and the tables.")] = Path(
        ".runs/planted"
    ),
) -> None:
    """Count how often each localizer finds facts whose place is known by construction; goes on where it stopped."""
    from mechunlearn.bench.planted_settings import load_planted

    settings = load_planted("bench-planted-quick" if quick else config)
    from mechunlearn import stages

    with _progress() as progress:
        bench = stages.bench_planted(settings, out, on_progress=progress)
    left_out = bench.ladder.loc[bench.ladder["reason"] != ""]
    if len(left_out):
        _print_frame(left_out.loc[:, ["base", "plant", "new", "old", "reason"]], title="Plants left out")
    console.print(f"{len(bench.ladder) - len(left_out)} of {len(bench.ladder)} plants passed their verification")
    failed = bench.rows.loc[bench.rows["error"] != ""].groupby(["localizer", "error"]).size().reset_index(name="plants")
    if len(failed):
        _print_frame(failed, title="Localizers that could not score a plant")
    summary = bench.summary
    shown = summary.loc[summary["group"] == "all"].drop(columns="group")
    _print_frame(shown, title="How often each localizer finds the planted part (95% intervals over bases)")
    compared = bench.differences
    hits = compared.loc[(compared["metric"] == "hit@1") & (compared["part"] == "kept out")]
    _print_frame(hits.drop(columns=["part", "metric"]), title="Differences of hit@1 on the part kept out")
    console.print(f"tables and figure: {escape(str(out / 'tables'))}", soft_wrap=True)


@bench_app.command("band")
def bench_band(
    model: ModelOption = "atlas",
    facts: FactsOption = "people-256",
    forgotten: ForgottenOption = None,
    twin: TwinOption = None,
    localizers: Annotated[
        str, typer.Option("--localizers", help="Preset or TOML file of `bench planted` that lists them.")
    ] = "bench-planted",
    max_facts: Annotated[int, typer.Option("--max-facts", min=2, help="Facts for every localizer, drawn.")] = 96,
    device: Annotated[str, typer.Option("--device")] = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder that receives band.csv.")] = Path(".runs/band"),
) -> None:
    """Which localizers point to the band of MLPs that ablation shows to look the facts up?"""
    from mechunlearn.bench.planted_settings import load_planted

    lines = load_planted(localizers).lines()
    from mechunlearn import stages

    with _progress() as progress:
        table = stages.bench_band(
            model, stages.chosen(facts, forgotten), lines, twin=twin, max_facts=max_facts, device=device, out=out,
            on_progress=progress,
        )  # fmt: skip
    errors = table.loc[table["error"] != "", ["localizer", "error"]]
    if len(errors):
        _print_frame(errors, title="Localizers that could not be compared")
    shown = table.loc[table["error"] == ""].drop(columns=["error", "band"])
    _print_frame(shown, title=f"Every localizer against the band {table['band'][0]}")
    console.print(f"table: {escape(str(out / 'band.csv'))}", soft_wrap=True)


@bench_app.command("speed")
def bench_speed(
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            help="llama-8x128 (the organism's), llama-4x256, gpt2-12x768, llama-12x768, llama-7b or "
            "llama-7b-one-prompt. Repeatable.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often all is measured, in turns.")] = 5,
    device: Annotated[str, typer.Option("--device")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    memory_only: Annotated[bool, typer.Option("--memory-only", help="The streamed mode's memory alone.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder that receives speed.csv.")] = Path(".runs/speed"),
) -> None:
    """What localizing costs against what it must cost: ratios within one run, on random models."""
    from mechunlearn import stages

    sizes = size or ["llama-4x256", "gpt2-12x768"]
    with _progress() as progress:
        table = stages.bench_speed(
            sizes, out, device=device, dtype=dtype, rounds=rounds, memory_only=memory_only, on_progress=progress
        )
    _print_frame(table.drop(columns=["device", "date", "threads", "dtype"]), title=f"Ratios on {table['device'][0]}")
    console.print(f"table: {escape(str(out / 'speed.csv'))}", soft_wrap=True)


@bench_app.command("edit-speed")
def bench_edit_speed(
    size: Annotated[
        list[str] | None,
        typer.Option("--size", help="As in `bench speed`; without it llama-8x128 and llama-4x256. Repeatable."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often all is measured, in turns.")] = 5,
    device: Annotated[str, typer.Option("--device")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option("--out", help="Folder that receives edit_speed.csv.")] = Path(".runs/edit_speed"),
) -> None:
    """What a localized training step costs, as a share of full fine-tuning, on random models."""
    from mechunlearn import stages

    sizes = size or ["llama-8x128", "llama-4x256"]
    with _progress() as progress:
        table = stages.bench_edit_speed(sizes, out, device=device, dtype=dtype, rounds=rounds, on_progress=progress)
    _print_frame(
        table.drop(columns=["device", "date", "threads", "dtype"]),
        title=f"Over full fine-tuning, on {table['device'][0]}: time of a step (floor: by matrix products), "
        "bytes of gradients and optimizer held, entries trained, peak memory",
    )
    console.print(f"table: {escape(str(out / 'edit_speed.csv'))}", soft_wrap=True)


@bench_app.command("coverage")
def bench_coverage(
    draws: Annotated[int, typer.Option("--draws", min=200, help="Simulated data sets an interval.")] = 2000,
    out: Annotated[Path, typer.Option("--out", help="Folder that receives coverage.csv.")] = Path(".runs/coverage"),
) -> None:
    """How often each interval and bound holds the truth, by simulation (about two minutes of one core)."""
    from mechunlearn import stages

    table = stages.bench_coverage(draws, out)
    _print_frame(table, title="Coverage of intervals with a nominal 95%")
    console.print(f"table: {escape(str(out / 'coverage.csv'))}", soft_wrap=True)


PresetsArgument = Annotated[
    list[str] | None, typer.Argument(help="Presets of the study or TOML files; none: the paper's six.")
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
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes of one thread each.")] = 2,
    device: Annotated[str, typer.Option("--device")] = "auto",
    out: StudyOut = Path(".runs/study"),
) -> None:
    """Locate, tune, edit and attack every arm of the presets; goes on where it stopped, also on another day."""
    from mechunlearn import study_stage

    if quick and presets:
        raise ValueError(f"study run: got --quick beside {', '.join(presets)}; leave one of them out")
    names = [study_stage.QUICK] if quick else presets or []
    parts = study_stage.chosen_parts(names, out, model=model, seeds=seeds, device=device, workers=workers)
    _print_frame(study_stage.planned(parts, workers=workers), title="Estimated hours from the beginning")
    with _progress() as progress:
        tables = study_stage.run(parts, out, workers=workers, on_progress=progress)
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

    parts = study_stage.chosen_parts(presets or [], out, model=model, seeds=seeds, device="auto", workers=1)
    _show_study(study_stage.write_tables(parts, out), out)


def _show_study(tables: Any, out: Path) -> None:
    shown = tables.verdicts.loc[:, ["preset", "arm", "level", "word", "strongest", "D", "lower", "upper", "n_facts"]]
    _print_frame(shown, title="Verdicts, all seeds together")
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
        _print_frame(frame, title=titles[name])


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        if isinstance(error, UnicodeError):
            raise
        said = "; ".join([str(error), *getattr(error, "__notes__", ())])
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {escape(said)}")
        sys.exit(2)
    except BrokenExecutor:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            "error: a worker process was killed (often for memory); finished parts are kept: run again, perhaps with "
            "--set workers=1"
        )
        sys.exit(1)


def _finish(run: Any, folder: Path) -> None:
    """Write a run's report and print what it says; the whole tables are in csv files and in the report."""
    from mechunlearn.report.html import write_report
    from mechunlearn.report.tables import fact_table, verdict_table

    path = write_report(run, folder / "report.html")
    table = verdict_table(run)
    table.to_csv(folder / "verdicts.csv", index=False)
    fact_table(run).to_csv(folder / "facts.csv", index=False, float_format="%.3f")
    for line in run.manifest["summary"]:
        console.print(escape(line))
    shown = ["cell", "verdict", "edited share", "strongest attack", "D", "retained", "health"]
    _print_frame(table[shown], title="Verdicts (D: share of the knowledge that the strongest attack brings back)")
    for cell in run.cells:
        console.print(escape(f"{cell.name}: {cell.verdict.reason} {cell.verdict.settle or ''}".strip()))
    console.print(f"report: {escape(str(path))}", soft_wrap=True)


def _settings(config: str, *, model: str | None, device: str | None, pairs: list[str] | None) -> Any:
    from mechunlearn.settings import load_settings

    changes = {key: value for key, value in (("model", model), ("device", device)) if value is not None}
    return load_settings(config, changes | _pairs(pairs))


def _pairs(pairs: list[str] | None) -> dict[str, Any]:
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
def _progress() -> Iterator[Any]:
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


def _print_frame(frame: Any, title: str) -> None:
    table = Table(title=escape(title), title_justify="left")
    for column in frame.columns:
        table.add_column(escape(str(column)), overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(escape(f"{v:.3f}" if isinstance(v, float) else str(v)) for v in row))
    console.print(table)


if __name__ == "__main__":
    main()
