"""Signs that a robustness number may not mean what it seems to.

Shapes: N samples, B samples of a batch, C classes or channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# A gap between two passes, relative to the logits' length, above what reordered sums explain.
MAX_RELATIVE_NOISE = 1e-4
# Share of samples that Square, which uses no gradients, may break after the gradient attacks.
MAX_SQUARE_GAIN = 0.002


def check_differentiable(model: nn.Module, images_BCHW: Tensor) -> None:
    """Refuse a model whose logits carry no gradient to its input.

    Raises:
        ValueError: when gradient attacks cannot run.
    """
    with torch.enable_grad():
        logits_BC = model(images_BCHW.clone().requires_grad_())
    if not logits_BC.requires_grad:
        raise ValueError(
            "the model's logits do not depend differentiably on its input, which gradient attacks "
            "need. Remove detach(), no_grad() or inference_mode() from its forward."
        )


def clean_output_notes(first_BC: Tensor, again_BC: Tensor) -> list[str]:
    """Compare two passes over the same images.

    Args:
        first_BC: [B, C] logits.
        again_BC: [B, C] logits of a second pass.

    Returns:
        Notes on randomised outputs, and on probabilities in the place of logits.

    Example:
        >>> clean_output_notes(torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 1.0]]))
        []
    """
    notes = []
    if float(relative_gaps(first_BC, again_BC).max()) > MAX_RELATIVE_NOISE:
        notes.append(
            "the model is randomised: two passes over the same images differ, so attacks without "
            "averaging overestimate its robustness"
        )
    if bool(look_like_probabilities(first_BC).all()):
        notes.append(
            "the model seems to return probabilities: attacks want logits, and saturated "
            "probabilities hide gradients"
        )
    return notes


def relative_gaps(first_BC: Tensor, again_BC: Tensor) -> Tensor:
    """Return how far two passes over the same images differ, relative to the logits' length: [B].

    Example:
        >>> relative_gaps(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]))
        tensor([0.2000])
    """
    gaps_B: Tensor = torch.linalg.vector_norm(first_BC - again_BC, dim=1)
    lengths_B: Tensor = torch.linalg.vector_norm(first_BC, dim=1)
    return gaps_B / (lengths_B + 1e-6)


def look_like_probabilities(logits_BC: Tensor) -> Tensor:
    """Return which rows are non-negative and sum to one: [B] bool.

    Example:
        >>> look_like_probabilities(torch.tensor([[0.25, 0.75], [2.0, -1.0]]))
        tensor([ True, False])
    """
    is_positive_B = (logits_BC >= -1e-5).all(dim=1)
    return is_positive_B & ((logits_BC.sum(dim=1) - 1.0).abs() < 1e-4)


def phase_notes(
    attack: str, totals: Mapping[str, float], num_broken: int, num_samples: int
) -> list[str]:
    """Return notes on one finished attack.

    Args:
        attack: its name.
        totals: sums over its batches of "num_rejected", "num_non_finite" and "num_warnings".
        num_broken: samples that it broke after other attacks had run.
        num_samples: samples of the whole evaluation.
    """
    notes = []
    if totals["num_rejected"]:
        notes.append(
            f"{attack}: {totals['num_rejected']:.0f} images fooled the model but lie outside of "
            "the ball or of [0, 1]; they do not count"
        )
    if totals["num_non_finite"]:
        notes.append(
            f"{attack}: {totals['num_non_finite']:.0f} adversarial images gave NaN or infinite "
            "logits and count as broken"
        )
    if totals["num_warnings"]:
        notes.append(
            f"{attack}: some samples had zero gradients, which can hide adversarial images "
            "(saturated or quantised outputs?)"
        )
    if attack == "square" and num_broken > MAX_SQUARE_GAIN * num_samples:
        notes.append(
            f"square broke {num_broken} samples that the gradient attacks left: gradients may "
            "be masked, so the robust accuracy is only an upper bound"
        )
    return notes
