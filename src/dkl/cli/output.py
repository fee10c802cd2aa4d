"""What commands print: messages on stderr, results on stdout."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dkl.reports import ResultRow


def is_main_process() -> bool:
    """Tell whether this is the process that speaks, also under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str, style: str = "") -> None:
    """Print a message for people on stderr."""
    if is_main_process():
        Console(stderr=True, soft_wrap=True).print(Text(message, style=style))


def print_json(document: object) -> None:
    """Print the one JSON document of a command."""
    if is_main_process():
        typer.echo(json.dumps(document, indent=2, default=str))


def print_table(table: Table) -> None:
    """Print a table; wider than the line rather than cut where nobody looks at a terminal."""
    console = Console()
    if not console.is_terminal:
        wanted = Console(width=1000).measure(table).maximum
        console = Console(width=max(console.width, wanted))
    console.print(table)


@contextlib.contextmanager
def stdout_for_json_only(as_json: bool) -> Iterator[None]:
    """Send what others print to stderr, so that stdout holds one JSON document."""
    if not as_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def row_document(row: "ResultRow") -> dict[str, Any]:
    """Return a result row as plain JSON values."""
    document: dict[str, Any] = json.loads(row.to_json())
    return document


def results_table(rows: "Sequence[ResultRow]") -> Table:
    """Lay out the results of one evaluation; rows of single classes are for the report only."""
    from dkl.reports.tables import describe_metric

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("test metric")
    for title in ("threat", "%", "images"):
        table.add_column(title, justify="right")
    for row in rows:
        if row.class_index is not None:
            continue
        described = describe_metric(row.metric)
        title = row.metric.replace("_", " ") if described is None else described[2]
        threat = "-" if row.epsilon is None else f"{row.norm} {row.epsilon:.4g}"
        table.add_row(Text(title), threat, f"{100 * row.value:.2f}", str(row.num_samples))
    return table
