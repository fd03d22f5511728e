"""The commands of `mechunlearn bench`; each imports late."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mechunlearn.cli_console import (
    FactsOption,
    ForgottenOption,
    ModelOption,
    SetOption,
    TwinOption,
    advising,
    console,
    print_frame,
    settings_of,
    showing_progress,
)

OnlyOption = Annotated[list[str] | None, typer.Option("--only", help="An experiment; without it all. Repeatable.")]
DealsOption = Annotated[int, typer.Option("--seeds", min=1, help="How many times all is dealt.")]
DrawnOption = Annotated[int, typer.Option("--max-facts", min=8, help="Facts of each part, drawn if more.")]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Processes of one thread.")]
PartsOption = Annotated[Path, typer.Option("--out", help="Folder of finished parts and tables.")]

bench_app = typer.Typer(help="Measure the program itself on models of known truth.", no_args_is_help=True)


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
    settings = settings_of("bench-quick" if quick else config, model=None, device=None, pairs=set_)
    from mechunlearn import stages

    with showing_progress() as progress, advising("--set workers=1"):
        bench = stages.bench_verdict(
            settings, out, seeds=1 if quick else seeds, quick=quick, fresh=fresh, on_progress=progress
        )
    print_frame(bench.confusion().reset_index(), title="Truth, and what was said (verdicts)")
    shown = bench.at().loc[:, ["seed", "case", "word", "attack", "D", "lower", "upper", "seconds"]]
    print_frame(shown, title="Every model")
    print_frame(bench.power.loc[:, ["seed", "kind", "accepted", "attack", "D", "lower", "recovers"]],
                 title="What each attack brings back of knowledge hidden on purpose")  # fmt: skip
    print_frame(bench.goals(), title="Goals")
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

    with showing_progress() as progress, advising("workers = 1 in a settings file of your own"):
        bench = stages.bench_planted(settings, out, on_progress=progress)
    left_out = bench.ladder.loc[bench.ladder["reason"] != ""]
    if len(left_out):
        print_frame(left_out.loc[:, ["base", "plant", "new", "old", "reason"]], title="Plants left out")
    console.print(f"{len(bench.ladder) - len(left_out)} of {len(bench.ladder)} plants passed their verification")
    failed = bench.rows.loc[bench.rows["error"] != ""].groupby(["localizer", "error"]).size().reset_index(name="plants")
    if len(failed):
        print_frame(failed, title="Localizers that could not score a plant")
    summary = bench.summary
    shown = summary.loc[summary["group"] == "all"].drop(columns="group")
    print_frame(shown, title="How often each localizer finds the planted part (95% intervals over bases)")
    compared = bench.differences
    hits = compared.loc[(compared["metric"] == "hit@1") & (compared["part"] == "kept out")]
    print_frame(hits.drop(columns=["part", "metric"]), title="Differences of hit@1 on the part kept out")
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

    with showing_progress() as progress:
        table = stages.bench_band(
            model, stages.chosen(facts, forgotten), lines, twin=twin, max_facts=max_facts, device=device, out=out,
            on_progress=progress,
        )  # fmt: skip
    errors = table.loc[table["error"] != "", ["localizer", "error"]]
    if len(errors):
        print_frame(errors, title="Localizers that could not be compared")
    shown = table.loc[table["error"] == ""].drop(columns=["error", "band"])
    print_frame(shown, title=f"Every localizer against the band {table['band'][0]}")
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
    with showing_progress() as progress:
        table = stages.bench_speed(
            sizes, out, device=device, dtype=dtype, rounds=rounds, memory_only=memory_only, on_progress=progress
        )
    print_frame(table.drop(columns=["device", "date", "threads", "dtype"]), title=f"Ratios on {table['device'][0]}")
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
    with showing_progress() as progress:
        table = stages.bench_edit_speed(sizes, out, device=device, dtype=dtype, rounds=rounds, on_progress=progress)
    print_frame(
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
    print_frame(table, title="Coverage of intervals with a nominal 95%")
    console.print(f"table: {escape(str(out / 'coverage.csv'))}", soft_wrap=True)


@bench_app.command("guards")
def bench_guards(
    model: ModelOption = "atlas",
    facts: FactsOption = "sport-hockey",
    forgotten: ForgottenOption = None,
    dictionary: Annotated[
        str, typer.Option("--dictionary", help="Folder, or hook point of one that comes with the model.")
    ] = "blocks.3.hook_resid_post",
    hook: Annotated[
        str | None, typer.Option("--hook", help="Hook point of a dictionary whose file does not say (params.npz).")
    ] = None,
    topic: Annotated[
        str | None,
        typer.Option(
            "--topic", help="What is to be forgotten, in words, for the choice by descriptions; known of sport-hockey."
        ),
    ] = None,
    only: OnlyOption = None,
    seeds: DealsOption = 5,
    max_facts: DrawnOption = 96,
    workers: WorkersOption = 2,
    device: Annotated[str, typer.Option("--device")] = "auto",
    out: PartsOption = Path(".runs/guards"),
) -> None:
    """What guards of activations forget, spare and withstand: clamps, gates, dilution, requests in sequence, ..."""
    from mechunlearn import guards_stage, stages

    chosen = stages.chosen(facts, forgotten)
    about = topic or guards_stage.topic_of(chosen)
    if about is None and not only:
        console.print(f"{guards_stage.NEEDS_TOPIC} is left out: what is to be forgotten has no name (--topic)")
    with showing_progress() as progress, advising("--workers 1"):
        table = guards_stage.bench_guards(
            model, chosen, only or [], out, dictionary=dictionary, hook_point=hook, topic=about, max_facts=max_facts,
            seeds=seeds, workers=workers, device=device, on_progress=progress,
        )  # fmt: skip
    _print_experiments(table, out)


@bench_app.command("codes")
def bench_codes(
    model: ModelOption = "atlas-codebook",
    facts: FactsOption = "sport-hockey",
    forgotten: ForgottenOption = None,
    without: Annotated[str, typer.Option("--without", help="The model that the codebook was put into.")] = "atlas",
    never_knew: Annotated[
        str, typer.Option("--never-knew", help="The codebook model of a twin that never read the facts.")
    ] = "atlas-codebook-never-a",
    never_knew_without: Annotated[
        str, typer.Option("--never-knew-without", help="That twin, without a codebook.")
    ] = "atlas-never-a",
    bert_model: Annotated[
        str | None, typer.Option("--bert-model", help="Encoder for BERTScore, folder or hub name; needs bert-score.")
    ] = None,
    only: OnlyOption = None,
    seeds: DealsOption = 5,
    max_facts: DrawnOption = 96,
    workers: WorkersOption = 2,
    device: Annotated[str, typer.Option("--device")] = "auto",
    out: PartsOption = Path(".runs/codes"),
) -> None:
    """What deleting the codes of a topic forgets and spares, and what the codebook costs with nothing deleted."""
    from mechunlearn import guards_stage, stages

    with showing_progress() as progress, advising("--workers 1"):
        table = guards_stage.bench_codes(
            model, stages.chosen(facts, forgotten), only or [], out, without=without, never_knew=never_knew,
            never_knew_without=never_knew_without, bert_model=bert_model,
            max_facts=max_facts, seeds=seeds, workers=workers, device=device, on_progress=progress,
        )  # fmt: skip
    _print_experiments(table, out)


def _print_experiments(table: Any, out: Path) -> None:
    for experiment, rows in table.groupby("experiment", sort=False):
        shown = rows.pivot_table(index=["arm", "x"], columns="measure", values="value", sort=False)
        print_frame(shown.reset_index(), title=f"{experiment}: means over seeds (intervals in summary.csv)")
    console.print(f"tables and figure: {escape(str(out / 'tables'))}", soft_wrap=True)
