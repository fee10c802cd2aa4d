"""Processes that share one evaluation: started once, so that starting is not timed."""

import contextlib
import multiprocessing
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dkl.bench.evaluate_sides import Finding, Subject, our_evaluation

_SECONDS_TO_START = 120.0
_SECONDS_TO_END = 1.0


class Workers:
    """Processes that wait to evaluate; made by ``workers``.

    Args:
        connections: one to each process, in the order of ranks.
    """

    def __init__(self, connections: list[Connection]) -> None:
        self.connections = connections

    def evaluate(self) -> Finding:
        """Let all processes evaluate together; the first one's finding, which all have.

        Raises:
            RuntimeError: a process failed or is gone.
        """
        for connection in self.connections:
            # One that is gone is told by its answer.
            with contextlib.suppress(OSError):
                connection.send("evaluate")
        finding: Finding = self._answers()[0]
        return finding

    def wait_until_ready(self) -> None:
        """Wait until all have joined the group.

        Raises:
            RuntimeError: a process failed, is gone, or took too long.
        """
        self._answers(_SECONDS_TO_START)

    def _answers(self, seconds: float | None = None) -> list[Any]:
        """Return what each process says, as soon as all have; a failure is told at once."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self.connections):
            missing = [c for rank, c in enumerate(self.connections) if rank not in answers]
            ready = wait(missing, seconds)
            if not ready:
                raise RuntimeError(
                    f"a process that is to share the evaluation did not start in {seconds:.0f} s"
                )
            for rank, connection in enumerate(self.connections):
                if connection in ready:
                    answers[rank] = self._receive(connection)
        return [answers[rank] for rank in range(len(self.connections))]

    def _receive(self, connection: Connection) -> Any:
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a process that shares the evaluation is gone") from error
        if isinstance(answer, Exception):
            raise RuntimeError(f"a process that shares the evaluation failed: {answer}")
        return answer


@contextlib.contextmanager
def workers(subject: Subject, count: int) -> Iterator[Workers]:
    """Start processes that hold the subject, each with its part of this process's threads.

    Args:
        subject: what they evaluate, on the CPU.
        count: how many processes.

    Yields:
        The processes; they end with the block.

    Raises:
        ValueError: nothing to share, fewer threads than processes, or a model on a GPU.
    """
    if subject.images.device.type != "cpu":
        raise ValueError(f"processes share a CPU here, the model is on {subject.images.device}")
    if subject.batch_size * count > len(subject.images):
        raise ValueError(
            f"{count} processes share batches, and {len(subject.images)} images in batches of "
            f"{subject.batch_size} leave fewer than one for each: give a batch_size of at most "
            f"{max(1, len(subject.images) // count)}; half of it shares better, as broken samples "
            "drop out"
        )
    threads = torch.get_num_threads() // count
    if threads < 1:
        raise ValueError(
            f"{count} processes would use more cores than the {torch.get_num_threads()} threads of "
            "the sides they are compared with: give at least as many threads as processes"
        )
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        ours, processes = [], []
        try:
            for rank in range(count):
                own, other = context.Pipe()
                process = context.Process(
                    target=_work, args=(rank, count, threads, store, subject, other), daemon=True
                )
                process.start()
                other.close()
                ours.append(own)
                processes.append(process)
            team = Workers(ours)
            team.wait_until_ready()
            yield team
        finally:
            for connection in ours:
                connection.close()
            for process in processes:
                process.join(_SECONDS_TO_END)
                process.kill()


def _work(
    rank: int, count: int, threads: int, store: str, subject: Subject, connection: Connection
) -> None:
    """Evaluate whenever told to, until the other end is closed."""
    torch.set_num_threads(threads)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
        connection.send("ready")
        while True:
            connection.recv()
            result = our_evaluation(subject, distributed=True)
            connection.send(Finding(result.robust, result.predictions))
    except (EOFError, OSError):  # the other end has what it wanted
        return
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
