"""What ``dkl reproduce`` shows: recipes, estimates, and its queue at work."""

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

if TYPE_CHECKING:
    from dkl.build.reproduce import Job, JobEstimate, JobReport

GIB = 2**30
_STYLES = {"done": "green", "already done": "dim", "failed": "red", "stopped": "yellow"}
_RUNNING = ("training", "measuring", "held")


def recipes_table(jobs: "Sequence[Job]", rows: Iterable[str]) -> Table:
    """Lay out which recipe every row trains."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("row", "recipe", "data", "model", "epochs", "changed"):
        table.add_column(title, justify="right" if title == "epochs" else "left")
    for key in rows:
        job = next((job for job in jobs if key in job.rows), None)
        if job is not None:
            recipe = job.wanted
            facts = (recipe.data.name, recipe.model.name, str(recipe.training.epochs))
            changes = " ".join(job.overrides)
            table.add_row(*map(Text, (key, recipe.name, *facts, changes)))
    return table


def estimate_table(estimates: "Sequence[JobEstimate]") -> Table:
    """Lay out what every recipe is expected to take."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe")
    for title in ("runs", "ms a step", "training", "evaluation", "GiB a run", "all runs"):
        table.add_column(title, justify="right")
    for one in estimates:
        table.add_row(
            Text(one.name),
            str(one.num_runs),
            f"{1000 * one.cost.step_seconds:,.0f}",
            in_words(one.training_seconds),
            in_words(one.evaluation_seconds),
            f"{one.disk_bytes / GIB:.2f}",
            in_words(one.total_seconds),
        )
    return table


def in_words(seconds: float) -> str:
    """Return a duration for people.

    Example:
        >>> [in_words(seconds) for seconds in (7, 600, 9000, 200_000)]
        ['7 s', '10 min', '2.5 h', '2.3 days']
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


class QueueDisplay:
    """One line for each job: live while it runs on a terminal, plain lines elsewhere.

    Args:
        jobs: of the queue.
        num_parallel: at a time.
    """

    def __init__(self, jobs: "Sequence[Job]", num_parallel: int) -> None:
        from dkl.build.reproduce import JobReport

        self._num_parallel = num_parallel
        self._reports = {job.folder: JobReport(job) for job in jobs}
        self._console = Console(stderr=True, soft_wrap=True)
        self._live: Live | None = None

    def notify(self, report: "JobReport") -> None:
        """Show that the state of a job has changed."""
        self._reports[report.job.folder] = report
        if self._live is not None and report.state in _RUNNING:
            return
        left = f"  ({self._remaining()})" if report.state == "done" else ""
        self._console.print(Text(_line(report) + left, style=_STYLES.get(report.state, "")))

    def stopping(self, num_active: int) -> None:
        """Tell that a signal has come and jobs are waited for."""
        message = f"Stopping; runs that save a checkpoint first: {num_active} (Ctrl-C again kills)"
        self._console.print(Text(message, style="yellow"))

    def _remaining(self) -> str:
        from dkl.build.reproduce import remaining_seconds

        reports = list(self._reports.values())
        ended = sum(one.state != "waiting" and one.state not in _RUNNING for one in reports)
        place = f"{ended} of {len(reports)} runs"
        seconds = remaining_seconds(reports, self._num_parallel, time.monotonic())
        return place if seconds is None else f"{place}, about {in_words(seconds)} left"

    def _render(self) -> Group:
        running = [one for one in list(self._reports.values()) if one.state in _RUNNING]
        lines = [Text(_line(report)) for report in running]
        return Group(*lines, Text(self._remaining(), style="dim"))

    def __enter__(self) -> Self:
        """Open the live lines."""
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the live lines."""
        if self._live is not None:
            self._live.stop()


def _line(report: "JobReport") -> str:
    seconds = report.seconds
    if seconds is None and report.started is not None:
        seconds = time.monotonic() - report.started
    taken = "" if not seconds else f"  {in_words(seconds)}"
    note = "  an earlier queue's process is still at work" if report.state == "held" else ""
    return f"{report.state:<12}  {report.job.name}  seed {report.job.seed}{taken}{note}"
