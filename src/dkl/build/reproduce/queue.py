"""A resumable queue of jobs, each trained and measured by processes of its own.

Nothing is kept but the run folders: what is done is seen in them, so that the same command goes on
wherever an earlier one ended, be it by a signal, a crash or a power cut.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dkl.build.reproduce import folders
from dkl.build.reproduce.jobs import Job
from dkl.build.runs import RECIPE_FILE
from dkl.engine.watch import StopRequest, stop_on_signals

COMMAND = (sys.executable, "-m", "dkl")
State = Literal[
    "waiting", "training", "measuring", "held", "done", "already done", "failed", "stopped"
]
RUNNING: tuple[State, ...] = ("training", "measuring", "held")

_LINES_OF_LOG = 12
_BYTES_OF_LOG = 20_000
_HOUR = 3600.0
# glibc gives the memory of every attack step back to the system and fetches it again; kept, a
# third of AutoAttack's time on Fashion-MNIST is saved (docs/log.md). Others ignore the variables.
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}


@dataclass
class JobReport:
    """Where a job stands.

    Args:
        job: the job.
        state: "held" while a process of an earlier queue is still at work on the job; "stopped"
            after a signal; "waiting" in the end if the time was over.
        started: on the clock of ``time.monotonic``; None before.
        seconds: how long it took, once it has ended.
        message: why it failed: the last lines of its log.
    """

    job: Job
    state: State = "waiting"
    started: float | None = None
    seconds: float | None = None
    message: str = ""


Notify = Callable[[JobReport], None]


@dataclass(frozen=True)
class QueueResult:
    """What a queue has done.

    Args:
        reports: of all jobs, in the order of the queue.
        interrupted: whether a signal ended it.
    """

    reports: tuple[JobReport, ...]
    interrupted: bool

    def with_state(self, *states: State) -> list[JobReport]:
        """Return the reports in one of these states."""
        return [report for report in self.reports if report.state in states]


def run_queue(
    jobs: Sequence[Job],
    out: Path,
    *,
    num_parallel: int = 1,
    command: Sequence[str] = COMMAND,
    hours: float | None = None,
    notify: Notify = lambda _: None,
    on_stop: Callable[[int], None] = lambda _: None,
    poll_seconds: float = 0.2,
) -> QueueResult:
    """Train and measure jobs, some at a time, and skip what their folders already hold.

    A job that fails does not keep the others from going on. SIGINT and SIGTERM are passed on to the
    jobs at work, which save a checkpoint, and end the queue when these have ended; a second SIGINT
    kills them.

    Args:
        jobs: in order.
        out: the folder that is locked against a second queue.
        num_parallel: jobs at a time.
        command: the command line's ``dkl``.
        hours: no job is started later than this; None: no limit.
        notify: told of every change of a job's state.
        on_stop: told, once, that a signal has come and how many jobs are at work.
        poll_seconds: between two looks at the processes.

    Returns:
        How every job ended.

    Raises:
        ValueError: a queue is at work in the folder, or run folders hold other runs.
    """
    if num_parallel < 1:
        raise ValueError(f"needs at least one job at a time, got {num_parallel}")
    deadline = None if hours is None else time.monotonic() + hours * _HOUR
    with folders.only_queue(out), stop_on_signals() as stop:
        folders.refuse_others(jobs)
        workers = [_Worker(JobReport(job), command, num_parallel, notify) for job in jobs]
        waiting = deque(worker for worker in workers if not worker.was_done())
        active: list[_Worker] = []
        told = False
        try:
            while active or (waiting and not stop.requested):
                _start_more(waiting, active, num_parallel, deadline, stop)
                if stop.requested and not told:
                    told = True
                    on_stop(len(active))
                for worker in active:
                    if stop.requested:
                        worker.ask_to_stop()
                    worker.look()
                active = [worker for worker in active if worker.report.state in RUNNING]
                if active:
                    time.sleep(poll_seconds)
        finally:
            for worker in active:
                worker.kill()
        return QueueResult(tuple(worker.report for worker in workers), stop.requested)


def _start_more(
    waiting: "deque[_Worker]",
    active: "list[_Worker]",
    num_parallel: int,
    deadline: float | None,
    stop: StopRequest,
) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        waiting.clear()
    while len(active) < num_parallel and not stop.requested:
        unfinished = {worker.job.folder for worker in (*waiting, *active)}
        # Students wait for their teacher; where it failed, theirs is the error.
        ready = (worker for worker in waiting if worker.job.teacher not in unfinished)
        worker = next(ready, None)
        if worker is None:
            return
        waiting.remove(worker)
        worker.start()
        active.append(worker)


def remaining_seconds(reports: Sequence[JobReport], num_parallel: int, now: float) -> float | None:
    """Return how long the jobs that have not ended will take, judged by those that have.

    A job takes as long as those of other seeds did, or as the mean of all. None without any.

    Example:
        >>> from dkl.build.reproduce.experiments import Row
        >>> from dkl.build.reproduce.jobs import plan_jobs
        >>> jobs = plan_jobs({"a": Row("digits_trades")}, seeds=[0, 1], out=Path("runs"))
        >>> reports = [JobReport(jobs[0], "done", 0.0, 60.0), JobReport(jobs[1], "training", 60.0)]
        >>> remaining_seconds(reports, 1, now=70.0)
        50.0
    """
    ended = [(one.job.name, one.seconds) for one in reports if one.state == "done" and one.seconds]
    if not ended:
        return None
    overall = sum(seconds for _, seconds in ended) / len(ended)
    total = 0.0
    for report in reports:
        if report.state != "waiting" and report.state not in RUNNING:
            continue
        alike = [seconds for name, seconds in ended if name == report.job.name]
        expected = sum(alike) / len(alike) if alike else overall
        passed = 0.0 if report.started is None else now - report.started
        total += max(expected - passed, 0.0)
    return total / num_parallel


class _Worker:
    """Takes one job from what its folder holds to its results."""

    def __init__(
        self, report: JobReport, command: Sequence[str], num_parallel: int, notify: Notify
    ) -> None:
        self.report, self.job = report, report.job
        self._command, self._notify = tuple(command), notify
        self._threads = max(_num_cores() // num_parallel, 1)
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._evaluation: tuple[str, ...] | None = None  # being run; None while training
        self._log_start = 0
        self._asked_to_stop = False

    def was_done(self) -> bool:
        """Tell, and report, whether the folder holds all there is to do."""
        if done := folders.is_done(self.job):
            self._change("already done")
        return done

    def start(self) -> None:
        """Start the clock; ``look`` starts the work."""
        self.report.started = time.monotonic()

    def look(self) -> None:
        """Go on with the next stage if the one at hand has ended."""
        code = None if self._process is None else self._process.poll()
        if self._process is not None and code is None:
            return
        self._process = None
        try:
            if code is None or self._ended_well(code):
                self._next_stage()
        except (RuntimeError, ValueError, OSError) as error:  # of a damaged folder, a full disk
            self._end("failed", str(error))

    def ask_to_stop(self) -> None:
        """Pass a signal on, once."""
        if not self._asked_to_stop:
            self._asked_to_stop = True
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once, if one is at work."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        if self.report.state in ("waiting", *RUNNING):
            self._end("stopped")

    def _next_stage(self) -> None:
        if self._asked_to_stop:
            self._end("done" if folders.is_done(self.job) else "stopped")
            return
        if self._lock is None:
            self._lock = folders.take_lock(self.job.folder / folders.LOCK)
        if self._lock is None:
            self._change("held")
        elif not folders.is_trained(self.job):
            self._evaluation = None
            self._spawn("training", self._training_words())
        elif left := folders.left_to_measure(self.job):
            self._evaluation = left[0]
            self._spawn("measuring", self._measuring_words(left[0]))
        else:
            self._end("done")

    def _training_words(self) -> list[str]:
        job, place = self.job, ["--out", str(self.job.folder), "--seed", str(self.job.seed)]
        if folders.has_started(job):
            # Its own recipe: what decides nothing, such as the description, may differ by now.
            own = job.folder / RECIPE_FILE
            recipe = [str(own)] if own.is_file() else [job.recipe, *job.overrides]
            return ["train", *recipe, *place, "--resume", "--no-evaluate"]
        return ["train", job.recipe, *job.overrides, *place, "--no-evaluate"]

    def _measuring_words(self, evaluation: tuple[str, ...]) -> list[str]:
        words = [*evaluation, *folders.moved_data(self.job), "--checkpoint", self.job.which]
        return ["evaluate", str(self.job.folder), *words]

    def _spawn(self, state: State, words: list[str]) -> None:
        assert self._lock is not None
        line = [*self._command, *words]
        environment = {"OMP_NUM_THREADS": str(self._threads), **_ALLOCATOR, **os.environ}
        with (self.job.folder / folders.LOG).open("ab") as log:
            log.write(f"$ {shlex.join(line)}\n".encode())
            log.flush()
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # The lock lives as long as the job's process, whatever becomes of this one.
                pass_fds=(self._lock,),
                # Ctrl-C reaches the queue alone, which decides what its jobs are told.
                start_new_session=True,
            )
        self._change(state)

    def _ended_well(self, code: int) -> bool:
        """Take note of how a process has ended; return whether to go on."""
        if self._evaluation is not None and code == 0:
            folders.note_measured(self.job, self._evaluation)
        elif self._evaluation is None and code == 0 and not self._asked_to_stop:
            if not folders.is_trained(self.job):  # a signal of someone else's
                self._end("failed", "stopped before the end of training\n" + self._last_lines())
                return False
        elif not self._asked_to_stop:
            how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
            self._end("failed", f"{how}\n{self._last_lines()}")
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _end(self, state: State, message: str = "") -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        started = self.report.started
        self.report.seconds = None if started is None else time.monotonic() - started
        self.report.message = message.strip()
        self._change(state)

    def _change(self, state: State) -> None:
        if state != self.report.state:
            self.report.state = state
            self._notify(self.report)

    def _last_lines(self) -> str:
        with (self.job.folder / folders.LOG).open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _BYTES_OF_LOG))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LINES_OF_LOG:])


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
