"""What commands print: messages on stderr, results on stdout."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

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


class EvaluationProgress:
    """Shows what is being measured: a live line on a terminal, a line per measurement elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status: Status | None = None
        self._said = ""

    def __call__(self, what: str, state: Any = None) -> None:
        """Tell what is measured; ``state`` is where AutoAttack stands."""
        headline = f"Measuring {what}"
        if state is not None:
            headline += f": {state.attack} ({state.attack_index + 1} of {state.num_attacks})"
        if self._status is None:
            if headline != self._said:
                say(headline)
            self._said = headline
            return
        if state is not None:
            headline += (
                f", {state.num_done}/{state.num_attacked} images, "
                f"{state.num_robust}/{state.num_samples} robust, {state.seconds:.0f} s"
            )
        self._status.update(Text(headline))

    def __enter__(self) -> Self:
        """Open the live line."""
        if self._console.is_terminal and is_main_process():
            self._status = self._console.status(Text("Loading"))
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the live line."""
        if self._status is not None:
            self._status.stop()


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
