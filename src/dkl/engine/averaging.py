"""Averaged weights: an exponential moving average of a model during training."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AverageSettings:
    """How weights are averaged.

    Args:
        decay: weight of the old average in [0, 1).
        per: "step" updates after every optimiser step, "epoch" after every epoch.
        start_epoch: progress in epochs up to which the average is a plain copy of the model.
        ramp: use min(decay, (1 + d) / (10 + d)) at the d-th update (d = 1, 2, ...) after the start,
            so that early weights are forgotten quickly. The published DM-AT code counts from 0, and
            so reaches every decay one update later.
        buffers: "average" treats floating-point buffers (batch-norm statistics) like weights;
            "copy" takes the model's own. Integer buffers are always copied.

    Raises:
        ValueError: if a value is out of range.

    Example:
        >>> AverageSettings(decay=0.999).buffers
        'average'
    """

    decay: float
    per: Literal["step", "epoch"] = "step"
    start_epoch: float = 0.0
    ramp: bool = False
    buffers: Literal["average", "copy"] = "average"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), such as 0.999; got {self.decay}")
        if self.per not in ("step", "epoch"):
            raise ValueError(f"per must be 'step' or 'epoch'; got {self.per!r}")
        if self.buffers not in ("average", "copy"):
            raise ValueError(f"buffers must be 'average' or 'copy'; got {self.buffers!r}")
        if self.start_epoch < 0:
            raise ValueError(f"start_epoch must not be negative; got {self.start_epoch}")


class WeightAverage:
    """A moving average of a model: average := decay average + (1 - decay) model.

    The average is a deep copy of the model as it is now, in eval mode and without gradients. With
    ``buffers="average"`` batch-norm statistics are averaged by the same rule and never
    re-estimated; with "copy" they are the model's at the latest update.

    Args:
        model: the model to average.
        settings: how.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(model, AverageSettings(decay=0.75))
        >>> before = model.weight.item()
        >>> _ = nn.init.constant_(model.weight, before + 4)
        >>> average.update(model, progress=1.0)
        >>> round(average.model.weight.item() - before, 4)
        1.0
    """

    def __init__(self, model: nn.Module, settings: AverageSettings) -> None:
        self.settings = settings
        self.num_updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, progress: float) -> None:
        """Take in the weights of the model.

        Args:
            model: the model given at the start, trained further.
            progress: epochs completed so far, fractional.
        """
        if progress <= self.settings.start_epoch:
            decay = 0.0
        else:
            self.num_updates += 1
            decay = self.settings.decay
            if self.settings.ramp:
                decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for mine, theirs, is_averaged in self._pairs(model):
            if is_averaged and decay > 0:
                averaged.append(mine)
                current.append(theirs)
            else:
                mine.copy_(theirs)
        if averaged:
            torch._foreach_lerp_(averaged, current, 1 - decay)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor, bool]]:
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        yield from ((mine, theirs.detach(), True) for mine, theirs in pairs)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            is_averaged = self.settings.buffers == "average" and mine.is_floating_point()
            yield mine, theirs, is_averaged

    def state_dict(self) -> dict[str, Any]:
        """Return the counters; the weights are ``self.model.state_dict()``."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self.num_updates = int(state["num_updates"])
