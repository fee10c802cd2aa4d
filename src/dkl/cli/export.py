"""The command that writes a run's weights for others to load."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dkl.cli.output import is_main_process, print_json, say, stdout_for_json_only
from dkl.cli.training import AsJson

_ROBUSTBENCH = "RobustBench's model_info"


def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", exists=True, help="Run folder, or a checkpoint in one."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Where the data is: data.folder, data.download."),
    ] = None,
    format: Annotated[
        Literal["robustbench", "safetensors", "onnx"], typer.Option(help="What to write.")
    ] = "robustbench",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the files, not RUN/export.")
    ] = None,
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="Which checkpoint of the run.")
    ] = "best",
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    name: Annotated[
        str | None, typer.Option(help="Title of the paper.", rich_help_panel=_ROBUSTBENCH)
    ] = None,
    authors: Annotated[
        str | None, typer.Option(help='"Ada Lovelace, ...".', rich_help_panel=_ROBUSTBENCH)
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="Of the paper.", rich_help_panel=_ROBUSTBENCH)
    ] = None,
    venue: Annotated[
        str | None, typer.Option(help='Such as "NeurIPS 2024".', rich_help_panel=_ROBUSTBENCH)
    ] = None,
    year: Annotated[
        int | None, typer.Option(help="Of the paper.", rich_help_panel=_ROBUSTBENCH)
    ] = None,
    additional_data: Annotated[
        bool,
        typer.Option(
            "--additional-data",
            help="Real images beyond the dataset's were trained on.",
            rich_help_panel=_ROBUSTBENCH,
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained model for others to load: RobustBench, safetensors or ONNX.

    The weights are those that `dkl evaluate` measures: averaged where the run averages.
    """
    paper: dict[str, Any] = {
        "name": name,
        "authors": authors,
        "link": link,
        "venue": venue,
        "year": year,
        "additional_data": additional_data or None,
    }
    given = {key: value for key, value in paper.items() if value is not None}
    if given and format != "robustbench":
        message = f"--{next(iter(given)).replace('_', '-')} is for --format robustbench"
        raise typer.BadParameter(message, param_hint="--format")
    notes: list[str] = []
    with stdout_for_json_only(True):
        from dkl.build.exporting import export_run
        from dkl.build.model_info import Submission

        files = export_run(
            run,
            format=format,
            out=out,
            which=checkpoint,
            submission=Submission(**given) if format == "robustbench" else None,
            data_overrides=list(overrides or []),
            force=force,
            tell=notes.append,
        )
    for note in notes:
        say(f"Note: {note}", "yellow")
    if as_json:
        print_json({"format": format, "files": [str(file) for file in files], "notes": notes})
    elif is_main_process():
        for file in files:
            typer.echo(str(file))
