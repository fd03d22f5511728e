"""The command line: a command a verb, plus edges, export, undo, run, plan, list and the groups; each imports late."""

import sys
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from mechunlearn.cli_bench import bench_app
from mechunlearn.cli_console import (
    FactsOption,
    ForgottenOption,
    ModelOption,
    SetOption,
    TwinOption,
    advising,
    console,
    pairs_of,
    print_frame,
    settings_of,
    showing_progress,
)
from mechunlearn.cli_features import features_app
from mechunlearn.cli_organism import organism_app
from mechunlearn.cli_study import study_app

app = typer.Typer(
    name="mechunlearn",
    help="Find where a language model looks facts up, edit only there, attack the result, decide: removed or hidden?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(organism_app, name="organism")
app.add_typer(bench_app, name="bench")
app.add_typer(study_app, name="study")
app.add_typer(features_app, name="features")

MethodOption = Annotated[
    str | None, typer.Option("--method", help="Method of this stage; `mechunlearn list` shows all.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder that receives the result.")]


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
    settings = settings_of(config, model=model, device=device, pairs=set_)
    from mechunlearn.experiment import run_experiment

    with showing_progress() as progress, advising("--set workers=1"):
        result = run_experiment(settings, out / settings.name, fresh=fresh, on_progress=progress)
    _finish(result, out / settings.name)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A preset (see `list`) or a TOML file.")],
    set_: SetOption = None,
) -> None:
    """Say what a run would do, what it would edit, and whether its facts are enough for a verdict; runs nothing."""
    settings = settings_of(config, model=None, device=None, pairs=set_)
    from mechunlearn.experiment import plan_experiment

    titles = {
        "facts": "Facts; hidden: scored after attacks that never see them",
        "arms": "Arms: budget and size of one MLP, as shares of all attention and MLP parameters",
        "power": "How likely the verdict is if attacks bring back the share `effect`, every answer all or nothing (the "
        "worst case), and how many hidden facts make it 80% likely",
    }
    for name, frame in plan_experiment(settings).items():
        print_frame(frame, title=titles[name])


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
        model, stages.chosen(facts, forgotten), method or "", pairs_of(set_), twin=twin, device=device, forms=forms,
        exact=exact, out=out,
    )  # fmt: skip
    frame = scores.to_frame().sort_values("value", ascending=False)
    shown = frame.head(12)[["component", "value", "standard_error", *scores.roles]]
    print_frame(shown, title=f"{scores.method}, highest {len(shown)} of {len(frame)}: {scores.sign}")
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

    options = {"steps": steps, "rules": rule or [], **pairs_of(set_)}
    found = stages.edges(model, stages.chosen(facts, forgotten), options, device=device, out=out)
    frame = found.to_frame()
    print_frame(frame.head(10), title=f"edges, largest {min(10, len(frame))} of {len(frame)}")
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
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="With --scores: share of MLP and attention parameters to edit; default 0.2."),
    ] = None,
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

    mask, table, drift = stages.edit(
        model, stages.chosen(facts, forgotten), method or "", pairs_of(set_), scores=scores, components=components,
        budget=budget, export=export, device=device, out=out, on=on,
    )  # fmt: skip
    print_frame(table, title=f"{method}: before and after; p_true is among the candidates without the injected answer")
    console.print(f"edited: {', '.join(map(str, mask.components))} ({mask.n_selected:,} weights)", soft_wrap=True)
    if drift is None:
        console.print(f"edit: {escape(str(out / 'edit.safetensors'))}")
        return
    shown = ["step", "block", "forgotten", "edit_success", "p_true", "retained_accuracy", "kl_retained",
             "perplexity_ratio"]  # fmt: skip
    print_frame(drift[shown], title="After each edit: the facts of every block, and what was to stay")
    console.print(f"edits and drift.csv: {escape(str(out))}", soft_wrap=True)


@app.command()
def guard(
    out: OutOption,
    model: ModelOption = "atlas",
    facts: FactsOption = "sport-hockey",
    forgotten: ForgottenOption = None,
    method: MethodOption = "dynamic_guardrail",
    device: Annotated[str, typer.Option("--device")] = "auto",
    set_: SetOption = None,
) -> None:
    """Guard activations, or delete codes of a codebook model; no weight changes. For `attack --edit`."""
    from mechunlearn import stages

    table = stages.guard(model, stages.chosen(facts, forgotten), method or "", pairs_of(set_), device=device, out=out)
    print_frame(table, title=f"{method}: before and inside")
    console.print(f"guard: {escape(str(out))}", soft_wrap=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="What `edit`, `edit --on` or `guard` (code deletion) wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    model: ModelOption = "atlas",
    device: Annotated[str, typer.Option("--device")] = "auto",
) -> None:
    """Write the changed model as a model folder: the weights edited, or a deletion's codes erased from its codebook.

    Who takes the codebook out of that model has the model around it, which no deletion touches.
    """
    from mechunlearn import stages

    stages.export(model, folder, out, device=device)
    console.print(f"model: {escape(str(out))}", soft_wrap=True)


@app.command()
def undo(
    folder: Annotated[Path, typer.Argument(help="A folder of several edits, written by `edit --on`.")],
    out: OutOption,
    keep: Annotated[int, typer.Option("--keep", help="How many of the edits stay, the first ones.")],
) -> None:
    """Take back the last of several edits; writes the ones that stay, for `edit --on` and `attack --edit`."""
    from mechunlearn import stages

    undone = stages.undo(folder, keep=keep, out=out)
    console.print(f"{undone} edit{'s' * (undone > 1)} undone, {keep} left: {escape(str(out))}", soft_wrap=True)


@app.command()
def attack(
    out: OutOption,
    model: ModelOption = "atlas",
    facts: Annotated[
        str | None,
        typer.Option("--facts", help="As of `edit`; default: what the --edit forgot, without one people-256."),
    ] = None,
    forgotten: ForgottenOption = None,
    method: Annotated[
        str | None, typer.Option("--method", help="One attack; default: relearning, with --original all of them.")
    ] = None,
    original: Annotated[
        str | None, typer.Option("--original", help="What the model was made of: judge it, with controls and a report.")
    ] = None,
    twin: TwinOption = None,
    edited: Annotated[
        Path | None, typer.Option("--edit", help="Folder that `edit` or `guard` wrote, applied first.")
    ] = None,
    device: Annotated[str, typer.Option("--device")] = "auto",
    set_: SetOption = None,
) -> None:
    """Try to get the facts back; with --original the verdict on a checkpoint that any tool made, and a report.

    Options of --set are the method's; with --original those of a run (attack.relearning.steps, facts.n, seeds, ...).
    """
    from mechunlearn import stages

    says_nothing = facts is None and forgotten is None
    asked = None if says_nothing and edited is not None else stages.chosen(facts or "people-256", forgotten)
    if original is not None:
        if edited is not None:
            raise ValueError("attack: got --edit and --original; --model is the edited checkpoint, so leave --edit out")
        settings = stages.checkpoint_settings(
            model,
            original,
            asked or {},
            method,
            pairs_of(set_),
            twin=twin,
            device=device,
            name=out.name,
        )
        from mechunlearn.experiment import run_experiment

        with showing_progress() as progress, advising("--set workers=1"):
            result = run_experiment(settings, out, on_progress=progress)
        _finish(result, out)
        return
    chosen = method or "relearning"
    table = stages.attack(
        model, asked, chosen, pairs_of(set_), edit_folder=edited, twin=twin, device=device,
        out=out,
    )  # fmt: skip
    inside = ", inside the edit (wrong answers that it taught are no candidates)" if edited is not None else ""
    print_frame(table, title=f"{chosen}: hidden facts{inside}")
    console.print(f"rows: {escape(str(out))}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A finished run's folder.")]) -> None:
    """Write report.html, verdicts.csv and facts.csv of a finished run again and print its verdicts."""
    from mechunlearn.runs import load_run

    _finish(load_run(folder), folder)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs about the same facts.")],
    out: Annotated[Path, typer.Option("--out", help="Folder that receives methods.csv and methods.html.")] = Path(
        ".runs/compared"
    ),
) -> None:
    """Put the edits of several runs in one table: what each forgets, spares, withstands and costs."""
    from mechunlearn import stages

    table = stages.compare(folders, out)
    shown = ["run", "cell", "verdict", "forgotten", "retained", "strongest attack", "D", "seconds", "with the weights"]
    print_frame(table[shown], title="What each way of forgetting buys (P(true) of facts; D: share brought back)")
    console.print(f"table and figure: {escape(str(out))}", soft_wrap=True)


@app.command(name="list")
def list_(
    stage: Annotated[
        str | None,
        typer.Argument(
            help="localizers, editors, guards, feature rules, attacks, suppressions, sources, presets, study presets, "
            "study models, models or forget sets; or a method, for its options."
        ),
    ] = None,
) -> None:
    """List methods, presets (of the study, too), bundled models and forget sets; or what a method can be --set to."""
    from mechunlearn import stages

    for title, frame in stages.listing(stage).items():
        print_frame(frame, title=title)


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
    except BrokenExecutor as error:
        advice = ", ".join(["run again", *(f"perhaps with {note}" for note in getattr(error, "__notes__", ()))])
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: a worker process was killed (often for memory); finished parts are kept: {escape(advice)}"
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
    print_frame(table[shown], title="Verdicts (D: share of the knowledge that the strongest attack brings back)")
    for cell in run.cells:
        console.print(escape(f"{cell.name}: {cell.verdict.reason} {cell.verdict.settle or ''}".strip()))
    console.print(f"report: {escape(str(path))}", soft_wrap=True)


if __name__ == "__main__":
    main()
