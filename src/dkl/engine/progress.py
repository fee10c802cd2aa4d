"""Progress of a run on a terminal, or one log line per epoch where there is none."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

_SPEED_MEMORY = 0.95


class ProgressDisplay:
    """A bar with step, loss, images per second and remaining time.

    Args:
        num_steps: optimiser steps of the whole run.
        num_epochs: epochs of the whole run.
        step: completed steps at the start.
        visible: False shows nothing at all (processes other than the first).
    """

    def __init__(self, num_steps: int, num_epochs: int, step: int, *, visible: bool) -> None:
        self._num_epochs = num_epochs
        self._visible = visible
        self._bar: Progress | None = None
        self._speed: float | None = None
        self._last_time = time.monotonic()
        if visible and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "starting", total=num_steps, completed=step, status="", loss=""
            )
            self._bar.start()

    def advance(self, epoch: int, step: int, num_images: int) -> None:
        """Show that ``step`` steps are done, the last one of ``num_images`` images."""
        if self._bar is None:
            return
        now = time.monotonic()
        speed = num_images / max(now - self._last_time, 1e-9)
        self._last_time = now
        if self._speed is not None:
            speed = _SPEED_MEMORY * self._speed + (1 - _SPEED_MEMORY) * speed
        self._speed = speed
        loss = self._bar.tasks[0].fields["loss"]
        self._bar.update(
            self._task,
            completed=step,
            description=f"epoch {epoch + 1}/{self._num_epochs}",
            status=f"{loss}{speed:,.0f} images/s",
        )

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a row of the records."""
        if not self._visible:
            return
        if row["kind"] == "step" and self._bar is not None:
            self._bar.update(self._task, loss=f"loss {row['loss']:.4f}  ")
        if row["kind"] == "epoch":
            if self._bar is not None:
                # Validation took time that no training step used.
                self._last_time = time.monotonic()
            else:
                logger.info("%s", describe_epoch(row, self._num_epochs))

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


def describe_epoch(row: Mapping[str, Any], num_epochs: int) -> str:
    """Return one line about an epoch.

    Example:
        >>> row = {"epoch": 0, "images_per_second": 1234.5, "train_loss": 0.51, "val_accuracy": 0.9}
        >>> describe_epoch(row, 10)
        'epoch 1/10: train_loss 0.5100, val_accuracy 0.9000, 1,234 images/s'
    """
    values = [
        f"{name} {value:.4f}"
        for name, value in row.items()
        if name.startswith(("train_", "val_")) and isinstance(value, float)
    ]
    speed = f"{row['images_per_second']:,.0f} images/s"
    return f"epoch {row['epoch'] + 1}/{num_epochs}: " + ", ".join([*values, speed])
