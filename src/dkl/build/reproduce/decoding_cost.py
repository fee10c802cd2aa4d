"""What the decoding of image files adds to a step."""

import os
import time
from dataclasses import dataclass

import torch

from dkl import config
from dkl.build.image_access import LabelledImages
from dkl.data import Decoding, ImageData


@dataclass(frozen=True)
class DecodingCost:
    """How long images take to be decoded; nothing for those in memory.

    Args:
        alone_seconds: one process reads and decodes one image.
        workers: processes that decode at a time, beside the one that trains; 0: that one does.
        per_sample: images that are decoded for a sample, 2 where it is mixed with another one.
    """

    alone_seconds: float = 0.0
    workers: int = 0
    per_sample: int = 1

    @property
    def image_seconds(self) -> float:
        """Seconds in which all workers together decode one image."""
        return self.alone_seconds / max(self.workers, 1)

    def step_seconds(self, computing: float, batch: int, *, on_cpu: bool) -> float:
        """Return the seconds of a step, given those without decoding.

        Example:
            >>> cost = DecodingCost(alone_seconds=0.25, workers=2)
            >>> cost.step_seconds(0.75, 8, on_cpu=False), cost.step_seconds(0.75, 8, on_cpu=True)
            (1.0, 1.75)
        """
        decoding = batch * self.per_sample * self.image_seconds
        # On a CPU workers and training share the cores.
        alternate = on_cpu or self.workers == 0
        return computing + decoding if alternate else max(computing, decoding)

    def is_waited_for(self, computing: float, batch: int) -> bool:
        """Tell whether a step's images take longer than its computing."""
        return batch * self.per_sample * self.image_seconds > computing


def decoding_cost(recipe: config.Recipe, data: LabelledImages, count: int) -> DecodingCost:
    """Decode some of the first images in this process.

    Args:
        recipe: resolved.
        data: its training images.
        count: how many, at most.
    """
    if isinstance(data, ImageData):
        return DecodingCost()
    rows = torch.arange(min(count, len(data)))
    started = time.perf_counter()
    for _ in data.batches([rows], "cpu"):
        pass
    alone = (time.perf_counter() - started) / len(rows)
    augment, how = recipe.data.augment, recipe.data.decoding or Decoding()
    mixes = augment is not None and augment.cutmix + augment.mixup > 0
    return DecodingCost(alone, min(how.workers, usable_cores()), 2 if mixes else 1)


def usable_cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
