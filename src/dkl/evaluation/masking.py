"""Whether attacks on a model can be trusted: the usual signs of masked gradients.

An attack by gradients finds less than there is where gradients vanish, are random or point nowhere
(Athalye, Carlini and Wagner, 2018; Carlini et al., 2019). Each check compares two attacks of which
it is known which one has to be stronger.

Shapes: N samples, B samples of a batch, C classes or channels.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dkl.evaluation.accuracy import check_clean_logits, predict_logits
from dkl.evaluation.batch_run import ReportProgress
from dkl.evaluation.features import class_counts
from dkl.evaluation.inputs import (
    EvaluationNorm,
    check_ball,
    check_batching,
    check_data,
    check_gradient_norm,
)
from dkl.evaluation.masking_attacks import AttackOptions, MaskingAttacks
from dkl.evaluation.sanity import MAX_RELATIVE_NOISE, look_like_probabilities, relative_gaps
from dkl.evaluation.state import StateMismatchError

logger = logging.getLogger(__name__)

NUM_NOISE_DRAWS = 10
FEW_STEPS, MANY_STEPS = 10, 100
# Robust accuracy that PGD may still lose between few and many steps: it should have converged.
MAX_STEP_GAIN = 0.05
# Share of samples without any input gradient that rounding alone may explain.
MAX_ZERO_GRADIENTS = 0.01
# Share of samples that Square may break although PGD and CW with many steps did not.
MAX_SQUARE_GAIN = 0.01


@dataclass(frozen=True)
class MaskingCheck:
    """One check and its outcome.

    Args:
        name: "random_noise", "more_steps", "large_epsilon", "zero_gradients", "square",
            "randomised" or "probabilities".
        passed: False: robust accuracies of this model are not to be trusted as they stand.
        measured: what was found; None when the check could not be run, which counts as failed.
        expected: the bound that it is held against.
        message: both in words.
    """

    name: str
    passed: bool
    measured: float | None
    expected: float
    message: str


def masking_checks(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str,
    norm: EvaluationNorm = "Linf",
    batch_size: int = 256,
    seed: int = 0,
    square: Tensor | None = None,
    state_dir: str | Path | None = None,
    progress: ReportProgress | None = None,
    distributed: bool = False,
) -> list[MaskingCheck]:
    """Run the usual checks for masked gradients; a check that fails is a finding, not an error.

    "random_noise": ten draws of noise from the ball do no more harm than PGD-100. "more_steps":
    PGD-100 is no weaker than PGD-10 and gains at most 5 points. "large_epsilon": in a ball that
    makes every image grey, PGD leaves at most what guessing gets. "zero_gradients": at most 1 % of
    the input gradients vanish. "square": the black-box attack breaks at most 1 % of the samples
    that PGD-100 and CW-100 left. "randomised": two passes give the same logits. "probabilities":
    the outputs are no probabilities. One sample more or less is allowed everywhere.

    Args:
        model: returns logits [N, C].
        images: [N, C, H, W], float32 in [0, 1] or uint8; a few hundred make the checks meaningful.
        labels: [N] int64 class indices.
        eps: radius in pixel units of [0, 1]; text such as "8/255" is accepted.
        norm: "Linf" or "L2".
        batch_size: samples per forward pass.
        seed: of the attacks.
        square: [N] bool, what ``auto_attack(version="square")`` left of these samples; None runs it
            on what the gradient attacks leave.
        state_dir: folder that keeps finished batches; the same call takes up where it stopped.
        progress: called after every batch; an exception in it stops the checks.
        distributed: deal the batches to the processes of torch.distributed, which all call this
            alike; each gets all checks.

    Returns:
        The checks in the order above.

    Raises:
        ValueError: for wrong inputs or settings.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
        >>> blind = nn.Sequential(model, nn.Threshold(1e9, 0.0))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.tensor([0, 1] * 4)
        >>> checks = masking_checks(blind, images, labels, eps=0.1)
        >>> [check.name for check in checks if not check.passed]
        ['zero_gradients']
    """
    data = check_data(model, images, labels)
    check_batching(batch_size, seed)
    ball = check_ball(norm, eps, images.shape[1:])
    check_gradient_norm(ball)
    if square is not None and (square.shape != (len(data),) or square.dtype != torch.bool):
        raise ValueError(
            f"square must be bool of shape [{len(data)}], one flag for each image, got "
            f"{square.dtype} {list(square.shape)}."
        )
    logits_NC = predict_logits(model, images, batch_size=batch_size, distributed=distributed)
    check_clean_logits(logits_NC, data.labels)
    options = AttackOptions(batch_size, seed, state_dir, progress, distributed)
    checks = _Checks(MaskingAttacks(model, data, ball, logits_NC, options))
    found = checks.run(square)
    for check in found:
        if not check.passed:
            logger.warning("gradient masking, check %s failed: %s", check.name, check.message)
    return found


class _Checks:
    """The checks, from the attacks that they compare."""

    def __init__(self, attacks: MaskingAttacks) -> None:
        self.attacks = attacks
        self.num_samples = len(attacks.data)
        self.slack = 1.0 / self.num_samples

    def run(self, square: Tensor | None) -> list[MaskingCheck]:
        """Run all checks; what an attack cannot do becomes a failed check."""
        checks: dict[str, Callable[[], MaskingCheck]] = {
            "random_noise": self.random_noise,
            "more_steps": self.more_steps,
            "large_epsilon": self.large_epsilon,
            "zero_gradients": self.zero_gradients,
            "square": lambda: self.square(square),
            "randomised": self.randomised,
            "probabilities": self.probabilities,
        }
        found = []
        for name, check in checks.items():
            try:
                found.append(check())
            except StateMismatchError:  # says nothing about the model
                raise
            except ValueError as error:
                found.append(MaskingCheck(name, False, None, 0.0, f"could not be run: {error}"))
        return found

    def random_noise(self) -> MaskingCheck:
        """Compare random noise with PGD."""
        noise, pgd = (
            _share(self.attacks.noise(NUM_NOISE_DRAWS)),
            _share(self.attacks.pgd("ce", MANY_STEPS)),
        )
        return MaskingCheck(
            "random_noise",
            noise >= pgd - self.slack,
            noise,
            pgd,
            f"{NUM_NOISE_DRAWS} draws of noise leave {noise:.1%} accuracy, PGD-{MANY_STEPS} "
            f"{pgd:.1%}; noise must not do more harm",
        )

    def more_steps(self) -> MaskingCheck:
        """Compare PGD of few and of many steps."""
        few, many = (
            _share(self.attacks.pgd("ce", FEW_STEPS)),
            _share(self.attacks.pgd("ce", MANY_STEPS)),
        )
        gain = few - many
        return MaskingCheck(
            "more_steps",
            -self.slack <= gain <= MAX_STEP_GAIN + self.slack,
            gain,
            MAX_STEP_GAIN,
            f"PGD-{FEW_STEPS} leaves {few:.1%} accuracy, PGD-{MANY_STEPS} {many:.1%}; more steps "
            f"must gain between 0 and {MAX_STEP_GAIN:.0%}",
        )

    def large_epsilon(self) -> MaskingCheck:
        """Attack in a ball that holds the same grey image for every sample.

        An optimal attack shows the model that image, so it is right for one class at most.
        """
        data, ball = self.attacks.data, self.attacks.ball
        num_pixels = math.prod(data.images.shape[1:])
        grey = 0.5 if ball.norm == "Linf" else 0.5 * math.sqrt(num_pixels)
        eps = max(grey, ball.eps)
        left = _share(self.attacks.pgd("ce", MANY_STEPS, eps))
        counts_C = class_counts(data.labels, self.attacks.logits_NC.shape[1])
        chance = int(counts_C.max()) / self.num_samples
        return MaskingCheck(
            "large_epsilon",
            left <= chance + self.slack,
            left,
            chance,
            f"PGD-{MANY_STEPS} with {ball.norm} eps {eps:.3g}, enough to turn every image grey, "
            f"leaves {left:.1%} accuracy; guessing gets {chance:.1%}",
        )

    def zero_gradients(self) -> MaskingCheck:
        """Count samples whose cross entropy has no gradient at the clean image."""
        num_correct = int(self.attacks.correct.sum())
        has_gradient_N = self.attacks.with_gradient()
        share = (num_correct - int(has_gradient_N.sum())) / max(num_correct, 1)
        return MaskingCheck(
            "zero_gradients",
            share <= MAX_ZERO_GRADIENTS + self.slack,
            share,
            MAX_ZERO_GRADIENTS,
            f"{share:.1%} of the samples that are classified correctly have no input gradient; at "
            f"most {MAX_ZERO_GRADIENTS:.0%} may",
        )

    def square(self, known: Tensor | None) -> MaskingCheck:
        """Compare Square, which sees logits alone, with the gradient attacks."""
        white_N = self.attacks.pgd("ce", MANY_STEPS) & self.attacks.pgd("margin", MANY_STEPS)
        both_N = self.attacks.square(white_N) if known is None else white_N & known.cpu()
        gain = _share(white_N) - _share(both_N)
        return MaskingCheck(
            "square",
            gain <= MAX_SQUARE_GAIN + self.slack,
            gain,
            MAX_SQUARE_GAIN,
            f"PGD-{MANY_STEPS} and CW-{MANY_STEPS} leave {_share(white_N):.1%} accuracy, of which "
            f"Square breaks {gain:.1%}; a black-box attack may break {MAX_SQUARE_GAIN:.0%} more",
        )

    def randomised(self) -> MaskingCheck:
        """Compare two passes over the same images."""
        gap = float(relative_gaps(*self.attacks.two_passes()).max())
        return MaskingCheck(
            "randomised",
            gap <= MAX_RELATIVE_NOISE,
            gap,
            MAX_RELATIVE_NOISE,
            f"two passes over the same images differ by {gap:.1g} of the logits' length; attacks "
            "without averaging overestimate the robustness of a randomised model",
        )

    def probabilities(self) -> MaskingCheck:
        """Look for outputs that are no logits."""
        share = float(look_like_probabilities(self.attacks.logits_NC).double().mean())
        return MaskingCheck(
            "probabilities",
            share < 1.0,
            share,
            1.0,
            f"{share:.0%} of the outputs are non-negative and sum to one; if all do, the model "
            "returns probabilities, whose saturation hides gradients",
        )


def _share(flags_N: Tensor) -> float:
    return float(flags_N.double().mean())
