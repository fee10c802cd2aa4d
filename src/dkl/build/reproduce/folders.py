"""What a job's folder holds: nothing, a half-trained run, a trained one, or results too."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dkl import config
from dkl.build.reproduce.jobs import Job
from dkl.build.runs import RECIPE_FILE, write_text
from dkl.engine.state import CheckpointError, find_checkpoint, has_checkpoint, load_meta
from dkl.reports import settings_hash
from dkl.reports.origin import NOT_SETTINGS, PLACES

LOG = "log.txt"
LOCK = "job.lock"
QUEUE_LOCK = "queue.lock"
MEASURED = "measured.json"

_MOST_DIFFERENCES = 4


def refuse_others(jobs: Iterable[Job]) -> None:
    """Refuse folders that hold other runs than the jobs want.

    Raises:
        ValueError: naming every such folder, what differs, and that it is to be moved away.
    """
    found = [f"{job.folder}: {why}" for job in jobs if (why := _other_run(job)) is not None]
    if found:
        raise ValueError(
            "these folders hold other runs than the ones wanted; move them away (or choose another "
            "--out), then start again:\n  " + "\n  ".join(found)
        )


def _other_run(job: Job) -> str | None:
    file = job.folder / RECIPE_FILE
    if not file.is_file():
        return f"checkpoints without {RECIPE_FILE}" if has_checkpoint(job.folder) else None
    try:
        there = config.load_recipe(file)
    except config.RecipeError as error:
        return f"its {RECIPE_FILE} is no recipe of this version ({error})"
    if there.seed != job.seed:
        return f"its seed is {there.seed}, wanted {job.seed}"
    before, after = config.resolved(there), config.resolved(job.wanted)
    if settings_hash(before) == settings_hash(after):
        return None
    texts = list(_differences(before, after))
    more = [f"{len(texts) - _MOST_DIFFERENCES} more"] if len(texts) > _MOST_DIFFERENCES else []
    return "; ".join([*texts[:_MOST_DIFFERENCES], *more])


def _differences(there: Any, wanted: Any, key: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys((*there, *wanted)):
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(there.get(name), wanted.get(name), inner)
    elif there != wanted and key not in PLACES and key not in NOT_SETTINGS:
        yield f"{key} is {json.dumps(there)}, wanted {json.dumps(wanted)}"


def has_started(job: Job) -> bool:
    """Tell whether there is something to resume."""
    return (job.folder / RECIPE_FILE).is_file() or has_checkpoint(job.folder)


def is_trained(job: Job) -> bool:
    """Tell whether the run's last checkpoint is that of its last epoch.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if not has_checkpoint(job.folder):
        return False
    meta = load_meta(find_checkpoint(job.folder, "last"))
    return int(meta["epoch"]) >= job.wanted.training.epochs


def left_to_measure(job: Job) -> list[tuple[str, ...]]:
    """Return the evaluations of a trained run that are not noted as done, in order."""
    noted = _noted(job) if (job.folder / "results.jsonl").is_file() else []
    return [one for one in job.evaluations if _evaluation_key(job, one) not in noted]


def seems_trained(job: Job) -> bool:
    """Tell the same of a run that may be damaged, which is told when its turn comes."""
    try:
        return is_trained(job)
    except CheckpointError:
        return False


def is_done(job: Job) -> bool:
    """Tell whether a job is trained and measured; a damaged run is not."""
    try:
        return is_trained(job) and not left_to_measure(job)
    except CheckpointError:
        return False


def note_measured(job: Job, evaluation: tuple[str, ...]) -> None:
    """Note that an evaluation has ended well, so that it is not started again."""
    keys = dict.fromkeys([*_noted(job), _evaluation_key(job, evaluation)])
    write_text(job.folder / MEASURED, json.dumps(list(keys)) + "\n")


def moved_data(job: Job) -> tuple[str, ...]:
    """Return overrides for data that lie elsewhere than when the run was trained."""
    there, wanted = config.load_recipe(job.folder / RECIPE_FILE).data, job.wanted.data
    return tuple(
        f"data.{key}={json.dumps(getattr(wanted, key))}"
        for key in ("folder", "download")
        if getattr(there, key) != getattr(wanted, key)
    )


def _noted(job: Job) -> list[str]:
    try:
        keys = json.loads((job.folder / MEASURED).read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # `dkl evaluate` itself repeats nothing it has measured
        return []
    return [str(key) for key in keys] if isinstance(keys, list) else []


def _evaluation_key(job: Job, evaluation: tuple[str, ...]) -> str:
    """Identify the evaluation's settings and the weights that it measures."""
    settings = config.resolved(config.override(job.wanted, evaluation))["evaluation"]
    weights = load_meta(find_checkpoint(job.folder, job.which))["files"]
    content = json.dumps([settings, job.which, weights], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def take_lock(path: Path) -> int | None:
    """Return an open file that holds the lock, or None where another process holds it.

    The lock belongs to the open file, not to this process: a child that inherits the file keeps the
    lock until it ends, even if its parent is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


@contextmanager
def only_queue(out: Path) -> Iterator[None]:
    """Keep a second queue out of a folder.

    Raises:
        ValueError: a queue is at work there.
    """
    path = out / QUEUE_LOCK
    descriptor = take_lock(path)
    if descriptor is None:
        owner = path.read_text("utf-8").strip() or "unknown"
        raise ValueError(
            f"another dkl reproduce (process {owner}) works in {out}: wait for it, stop it, or "
            "choose another --out; --table shows what there is meanwhile"
        )
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
