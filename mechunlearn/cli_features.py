"""The commands of `mechunlearn features`; each imports late."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mechunlearn.cli_console import ModelOption, SetOption, console, pairs_of, print_frame, showing_progress

features_app = typer.Typer(
    help="Train dictionaries of a model's activations, and codebooks into models.", no_args_is_help=True
)
OutOption = Annotated[Path, typer.Option("--out", help="Folder of checkpoints and of what is finished.")]


@features_app.command("train")
def features_train(
    model: ModelOption,
    hook: Annotated[str, typer.Option("--hook", help="TransformerLens' name: blocks.3.hook_resid_post.")],
    text: Annotated[
        Path | None, typer.Option("--text", help="Text file, a passage a line; default: what the organism read.")
    ] = None,
    options: SetOption = None,
    out: OutOption = Path(".runs/features"),
    device: Annotated[str, typer.Option("--device")] = "auto",
) -> None:
    """Train a sparse autoencoder of one activation; interrupted, it goes on from its last checkpoint."""
    from mechunlearn import features_stage

    with showing_progress() as progress:
        table, folder = features_stage.train(
            model, hook, pairs_of(options), out, text=text, device=device, on_step=progress
        )
    print_frame(table, title=f"{model}, {hook}: on text that it was not trained on")
    console.print(f"dictionary (SAELens folder): {escape(str(folder))}", soft_wrap=True)


@features_app.command("codebook")
def features_codebook(
    model: ModelOption,
    layer: Annotated[int, typer.Option("--layer", help="Whose stream, after attention, goes through it; from 0.")],
    text: Annotated[Path, typer.Option("--text", help="Text file, a passage a line.")],
    out: Annotated[Path, typer.Option("--out", help="Model folder to write; OUT.training keeps the training's state.")],
    options: SetOption = None,
    compare: Annotated[
        bool, typer.Option(help="Also train it without a codebook, as long: what the codebook costs is against that.")
    ] = True,
    device: Annotated[str, typer.Option("--device")] = "auto",
) -> None:
    """Train a codebook into a model; interrupted, it goes on from its last checkpoint. For `guard --model OUT`."""
    from mechunlearn import features_stage

    with showing_progress() as progress:
        table = features_stage.codebook(
            model, layer, pairs_of(options), out, text=text, compare=compare, device=device, on_step=progress
        )  # fmt: skip
    print_frame(table, title=f"{model}: nats per token of text that was not trained on")
    console.print(f"model with a codebook: {escape(str(out))}", soft_wrap=True)


@features_app.command("make")
def features_make(
    out: OutOption = Path(".runs/features"), device: Annotated[str, typer.Option("--device")] = "cpu"
) -> None:
    """Make again all dictionaries and codebook models that come with the organisms; goes on where it stopped."""
    from mechunlearn import features_stage

    with showing_progress() as progress:
        made = features_stage.make_shipped(out, device=device, on_step=progress)
    for folder in made:
        console.print(escape(str(folder)), soft_wrap=True)
