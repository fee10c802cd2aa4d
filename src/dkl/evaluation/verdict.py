"""Who won: whether finished adversarial images are allowed, and whether they fool the model.

Shapes: B samples of a batch, C classes or channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dkl.evaluation.inputs import Ball, EvaluationNorm, checked_logits

Predict = Callable[[Tensor], Tensor]

# Rounding allowance of the radius, absolute up to a radius of 1 and relative above: float32 cannot
# hold a long L2 perturbation more exactly.
TOLERANCE = 1e-6
# Spacing of float32 numbers just below 1: an L1 norm sums the rounding of every pixel.
PIXEL_ROUNDING = 2.0**-24


class LogitsModel:
    """A model as attacks want it: fresh float32 logits [B, C], also for an empty batch.

    The copy matters: some attacks write into the logits, which may share memory with the images or
    a parameter. Some attacks ask for the logits of no images, which many models cannot give.

    Args:
        model: returns logits [B, C].
        num_classes: C.
    """

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        self.model = model
        self.num_classes = num_classes

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Return float32 logits [B, C] that share memory with nothing."""
        if len(images_BCHW) == 0:
            return images_BCHW.new_zeros((0, self.num_classes))
        return checked_logits(self.model(images_BCHW), len(images_BCHW)).clone()


@dataclass(frozen=True)
class Verdict:
    """What finished adversarial images do.

    Args:
        broken: [B] bool; the image is allowed and is not classified as its label.
        predictions: [B] int64 predicted classes.
        num_rejected: images that fool the model but are not allowed.
        num_non_finite: allowed images whose logits are NaN or infinite; they count as broken.
    """

    broken: Tensor
    predictions: Tensor
    num_rejected: int
    num_non_finite: int


def perturbation_sizes(
    adversarial_BCHW: Tensor, clean_BCHW: Tensor, norm: EvaluationNorm
) -> Tensor:
    """Return the norm of each sample's perturbation, computed in float64: [B]."""
    delta = (adversarial_BCHW.double() - clean_BCHW.double()).flatten(1)
    if norm == "Linf":
        return delta.abs().amax(dim=1)
    if norm == "L1":
        return delta.abs().sum(dim=1)
    sizes_B: Tensor = torch.linalg.vector_norm(delta, dim=1)
    return sizes_B


def judge(
    predict: Predict,
    adversarial_BCHW: Tensor,
    clean_BCHW: Tensor,
    labels_B: Tensor,
    ball: Ball,
) -> Verdict:
    """Judge finished adversarial images: their prediction, their norm and their range [0, 1].

    Args:
        predict: returns logits [B, C].
        adversarial_BCHW: [B, C, H, W] finished images.
        clean_BCHW: [B, C, H, W] the images they were made from.
        labels_B: [B] int64.
        ball: the allowed images.

    Returns:
        The verdict; NaN pixels are not allowed, NaN logits are not a correct prediction.
    """
    with torch.no_grad():
        logits_BC = predict(adversarial_BCHW)
    predictions_B = logits_BC.max(dim=1).indices
    finite_B = logits_BC.isfinite().all(dim=1)
    pixels = adversarial_BCHW.flatten(1)
    sizes_B = perturbation_sizes(adversarial_BCHW, clean_BCHW, ball.norm)
    # Comparisons with NaN are False, so that NaN pixels are not allowed.
    allowed_B = sizes_B <= ball.eps + _rounding(ball, pixels.shape[1])
    allowed_B &= (pixels.amin(dim=1) >= 0.0) & (pixels.amax(dim=1) <= 1.0)
    fooled_B = (predictions_B != labels_B) | ~finite_B
    return Verdict(
        broken=fooled_B & allowed_B,
        predictions=predictions_B,
        num_rejected=int((fooled_B & ~allowed_B).sum()),
        num_non_finite=int((allowed_B & ~finite_B).sum()),
    )


def _rounding(ball: Ball, num_pixels: int) -> float:
    """Return how far rounding alone may carry a perturbation beyond the radius."""
    allowance = TOLERANCE * max(1.0, ball.eps)
    return allowance + num_pixels * PIXEL_ROUNDING if ball.norm == "L1" else allowance
