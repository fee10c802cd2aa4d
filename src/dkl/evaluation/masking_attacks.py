"""The attacks that the checks for masked gradients compare, each run once.

Shapes: N samples, B samples of a batch, C classes or channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.evaluation.auto_attack import auto_attack
from dkl.evaluation.batch_run import BatchRun, ReportProgress
from dkl.evaluation.inputs import (
    Ball,
    EvaluationData,
    check_gradient_norm,
    checked_logits,
    isolated,
)
from dkl.evaluation.noise import SampleDraw
from dkl.evaluation.processes import Processes
from dkl.evaluation.robustness import ObjectiveName, pgd_robust
from dkl.evaluation.verdict import LogitsModel, judge


@dataclass(frozen=True)
class AttackOptions:
    """How every attack of the checks is run.

    Args:
        batch_size: samples per forward pass.
        seed: of the attacks.
        state_dir: folder that keeps finished batches, or None.
        progress: called after every batch, or None.
        distributed: whether batches are dealt to processes.
    """

    batch_size: int
    seed: int
    state_dir: str | Path | None
    progress: ReportProgress | None
    distributed: bool


class MaskingAttacks:
    """Attacks on one model; flags are [N] bool on the CPU.

    Args:
        model: returns logits [N, C].
        data: the samples.
        ball: the allowed images.
        logits_NC: of the clean images.
        options: how attacks are run.
    """

    def __init__(
        self,
        model: nn.Module,
        data: EvaluationData,
        ball: Ball,
        logits_NC: Tensor,
        options: AttackOptions,
    ) -> None:
        self.model, self.data, self.ball, self.options = model, data, ball, options
        self.logits_NC = logits_NC
        self.correct = (logits_NC.max(dim=1).indices == data.labels).cpu()
        self._found: dict[tuple[str, int, float], Tensor] = {}

    def pgd(self, objective: ObjectiveName, num_steps: int, eps: float | None = None) -> Tensor:
        """Return which samples survive PGD or CW, of the ball or of another radius."""
        radius = self.ball.eps if eps is None else eps
        key = (objective, num_steps, radius)
        if key not in self._found:
            shared = self._shared(f"{objective}_{num_steps}_{radius:.9g}") | {"eps": radius}
            self._found[key] = pgd_robust(
                self.model,
                self.data.images,
                self.data.labels,
                num_steps=num_steps,
                objective=objective,
                **shared,
            ).cpu()
        return self._found[key]

    def square(self, left_N: Tensor) -> Tensor:
        """Return which of some samples survive Square."""
        flags_N = left_N.clone()
        left = left_N.nonzero().squeeze(1)
        if len(left):
            here = left.to(self.data.images.device)
            images, labels = self.data.images[here], self.data.labels[here]
            shared = self._shared("square")
            result = auto_attack(self.model, images, labels, version="square", **shared)
            flags_N[left] = result.robust.cpu()
        return flags_N

    def noise(self, num_draws: int) -> Tensor:
        """Return which samples survive every one of some draws of uniform noise in the ball."""
        threat = check_gradient_norm(self.ball)
        predict = LogitsModel(self.model, self.logits_NC.shape[1])

        def survive(indices_B: Tensor) -> Tensor:
            images_BCHW, labels_B = self.data.batch(indices_B)
            draw = SampleDraw(self.options.seed, indices_B, 0, self.data.device)
            survived_B = torch.ones_like(labels_B, dtype=torch.bool)
            for _ in range(num_draws):
                noisy_BCHW = threat.random_start(images_BCHW, "uniform", draw)
                survived_B &= ~judge(predict, noisy_BCHW, images_BCHW, labels_B, self.ball).broken
            return survived_B

        return self._batch_run("noise", survive)

    def with_gradient(self) -> Tensor:
        """Return which correct samples have a finite input gradient that is not zero."""

        def survive(indices_B: Tensor) -> Tensor:
            images_BCHW, labels_B = self.data.batch(indices_B)
            images_BCHW.requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(self.model(images_BCHW).float(), labels_B, reduction="sum")
            if not loss.requires_grad:
                return torch.zeros_like(labels_B, dtype=torch.bool)
            (gradient,) = torch.autograd.grad(loss, images_BCHW, materialize_grads=True)
            flat = gradient.flatten(1)
            return flat.isfinite().all(dim=1) & (flat != 0).any(dim=1)

        return self._batch_run("gradients", survive)

    def two_passes(self) -> tuple[Tensor, Tensor]:
        """Return the logits of the first batch, from two passes that draw from one generator."""
        images_BCHW, _ = self.data.batch(torch.arange(len(self.data))[: self.options.batch_size])
        with isolated(self.model, self.data.device), torch.no_grad():
            first_BC = checked_logits(self.model(images_BCHW), len(images_BCHW))
            again_BC = checked_logits(self.model(images_BCHW), len(images_BCHW))
        return first_BC, again_BC

    def _shared(self, name: str) -> dict[str, Any]:
        """Return the arguments that all attacks have in common."""
        options = self.options
        return {
            "eps": self.ball.eps,
            "norm": self.ball.norm,
            "batch_size": options.batch_size,
            "seed": options.seed,
            "state_dir": None if options.state_dir is None else Path(options.state_dir) / name,
            "progress": options.progress,
            "distributed": options.distributed,
        }

    def _batch_run(self, name: str, survive: Callable[[Tensor], Tensor]) -> Tensor:
        """Go through the samples that are classified correctly."""
        options = self.options
        processes = Processes.of_this_run(options.distributed)
        run = BatchRun(name, options.batch_size, processes, progress=options.progress)
        with isolated(self.model, self.data.device):
            return run.survivors(self.correct, survive)
