"""Records of a run: one JSON object a line, trackers beside it, and progress for people."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from dkl.engine.progress import ProgressDisplay

logger = logging.getLogger(__name__)

RECORDS = "records.jsonl"

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read a JSON-lines file; a last line that a crash cut short is left out.

    Raises:
        ValueError: if any other line is not a JSON object.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); remove that line to go on"
            ) from error
        rows.append(row)
    return rows


def truncate_records(path: Path, *, epoch: int, step: int) -> None:
    """Drop, atomically, the rows that come after a checkpoint.

    Args:
        path: the records; need not exist.
        epoch: completed epochs at the checkpoint.
        step: completed optimiser steps at the checkpoint.
    """
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if _is_before(row, epoch, step)]
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_before(row: Mapping[str, Any], epoch: int, step: int) -> bool:
    if row.get("kind") == "epoch":
        return bool(row["epoch"] < epoch)
    return bool(row.get("step", 0) <= step)


class Recorder:
    """Writes the rows of a run; on other processes than the first it does nothing.

    Rows go to ``records.jsonl`` (flushed line by line, so that a crash loses at most a half-written
    one), to the trackers, and to a progress bar when stderr is a terminal; otherwise one log line
    per epoch at level INFO takes its place.

    Args:
        accelerator: whose trackers are used.
        run_dir: folder of the run.
        trackers: names of the trackers.
        num_steps: optimiser steps of the whole run.
        num_epochs: epochs of the whole run.
        epoch: completed epochs, when a run is resumed; later rows are dropped.
        step: completed optimiser steps, likewise.
        recipe: shown by trackers that show settings.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        *,
        trackers: Sequence[str],
        num_steps: int,
        num_epochs: int,
        epoch: int = 0,
        step: int = 0,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._is_main = bool(accelerator.is_main_process)
        self._progress = ProgressDisplay(num_steps, num_epochs, step, visible=self._is_main)
        if not self._is_main:
            return
        path = run_dir / RECORDS
        if step > 0:
            truncate_records(path, epoch=epoch, step=step)
        self._file = path.open("a" if step > 0 else "w", encoding="utf-8")
        accelerator.log_with = [_make_tracker(name, run_dir, step, recipe) for name in trackers]
        accelerator.init_trackers("dkl")

    def step_done(self, epoch: int, step: int, num_images: int) -> None:
        """Move the progress bar on."""
        self._progress.advance(epoch, step, num_images)

    def write(self, row: Row) -> None:
        """Record a row of kind "step" or "epoch"; numbers that are not finite become null."""
        if not self._is_main:
            return
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()
        values = {
            f"{row['kind']}/{name}": value
            for name, value in row.items()
            if name not in ("kind", "step") and isinstance(value, (int, float))
        }
        self._accelerator.log(values, step=row["step"])
        self._progress.show(row)

    def close(self) -> None:
        """Close file, trackers and progress bar."""
        self._progress.close()
        if not self._is_main:
            return
        self._file.close()
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _finite(row: Row) -> Row:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _make_tracker(
    name: str, run_dir: Path, step: int, recipe: Mapping[str, Any] | None
) -> GeneralTracker:
    if name == "wandb":
        return WandBTracker("dkl", dir=str(run_dir), config=dict(recipe or {}))
    # Events later than the checkpoint belong to steps that are about to be taken again.
    return TensorBoardTracker("tensorboard", run_dir, purge_step=step + 1)
