"""Projected gradient descent with a radius, a number of steps and a step size for every image."""

import torch
from torch import Tensor, nn

from dkl.attacks.noise import Draw
from dkl.attacks.pgd import (
    BatchNormMode,
    Objective,
    attack_mode,
    check_images,
    input_gradient,
)
from dkl.attacks.threat_model import ThreatModel

# Largest radius of images in [0, 1]; only the direction of a step is taken from this ball.
_UNIT_BALL = ThreatModel("Linf", 1.0)


def per_sample_pgd(
    model: nn.Module,
    images: Tensor,
    objective: Objective,
    *,
    start_eps: float | str,
    eps_B: Tensor,
    num_steps_B: Tensor,
    step_size_B: Tensor,
    project_eps: float | str | None = None,
    batch_norm: BatchNormMode = "eval",
    draw: Draw | None = None,
) -> Tensor:
    """Maximise an objective by sign-gradient steps, with an attack of its own for every image.

    For image i: ``x' = clip(x + U(-start_eps, start_eps))``, then num_steps_B[i] times
    ``x' <- Pi_i(x' + step_size_B[i] sign(grad objective))``, where Pi_i clips to the Linf ball of
    radius eps_B[i] around x and to [0, 1] (the attacks of LAS-AT, Jia et al., 2022). With the same
    numbers for all images this is ``pgd_attack``, bit for bit.

    In "eval" mode images leave the forward pass when their steps are used up, so that the cost is
    that of the mean number of steps; the model then sees smaller batches. The objective is always
    given the logits of all images; those of finished ones are zero and get no gradient. In the
    other modes all images stay in the batch, whose statistics they are part of.

    Args:
        model: the bare network, images to logits [B, C].
        images: [B, ...] floats in [0, 1].
        objective: logits to values [B], each of its own row only, or to their sum or mean.
        start_eps: radius of the uniform random start; "8/255" is understood.
        eps_B: [B] radii in [0, 1].
        num_steps_B: [B] integers, at least 1.
        step_size_B: [B] step sizes in [0, 1].
        project_eps: radius of a last projection, the same for all images; None for none.
        batch_norm: "eval", "train" or "batch-stats"; see ``attack_mode``.
        draw: uniform numbers per sample for the random start; None takes torch's generator.

    Returns:
        Detached images, with the dtype and memory format of ``images``.

    Raises:
        ValueError: if a setting, the images, or what model and objective return do not fit.

    Example:
        >>> torch.nn.init.eye_((model := nn.Linear(2, 2, bias=False)).weight).requires_grad
        True
        >>> per_sample_pgd(
        ...     model,
        ...     torch.full((2, 2), 0.5),
        ...     lambda logits: logits.sum(dim=1),
        ...     start_eps=0,
        ...     eps_B=torch.tensor([0.25, 0.5]),
        ...     num_steps_B=torch.tensor([3, 1]),
        ...     step_size_B=torch.tensor([0.125, 0.125]),
        ... )
        tensor([[0.7500, 0.7500],
                [0.6250, 0.6250]])
    """
    check_images(images)
    start = ThreatModel("Linf", start_eps)
    final = None if project_eps is None else ThreatModel("Linf", project_eps)
    clean = images.detach()
    if clean.numel() == 0:
        return clean.clone()
    num_steps = _checked_steps(len(images), eps_B, num_steps_B, step_size_B)
    shape = (-1, *[1] * (clean.ndim - 1))
    eps, step_size = (
        each_B.to(clean.device, clean.dtype).view(shape) for each_B in (eps_B, step_size_B)
    )
    order_B = torch.argsort(num_steps_B.to(clean.device), descending=True, stable=True)
    with attack_mode(model, batch_norm):
        adversarial = start.random_start(clean, "uniform", draw)
        for step in range(max(num_steps)):
            num_active = sum(num > step for num in num_steps)
            rows = None if num_active == len(num_steps) else order_B[:num_active]
            if batch_norm == "eval":
                gradient = _gradient_of_rows(model, adversarial, objective, rows)
            else:
                gradient = input_gradient(model, adversarial, objective)
                gradient = gradient if rows is None else gradient[rows]
            if rows is None:
                adversarial = _moved(adversarial, gradient, clean, eps, step_size)
            else:
                adversarial[rows] = _moved(
                    adversarial[rows], gradient, clean[rows], eps[rows], step_size[rows]
                )
    return adversarial if final is None else final.project(adversarial, clean)


def _moved(
    images: Tensor, gradient: Tensor, clean: Tensor, eps: Tensor, step_size: Tensor
) -> Tensor:
    """Take a step of every image's own size and project into its own ball and into [0, 1]."""
    # Zero plus a step of length 1 is the direction, NaN where the gradient is NaN.
    direction = _UNIT_BALL.step(torch.zeros_like(gradient), gradient, 1.0)
    moved = images + step_size * direction
    return torch.clamp(moved, clean - eps, clean + eps).clamp(0.0, 1.0)


def _gradient_of_rows(
    model: nn.Module, images: Tensor, objective: Objective, rows: Tensor | None
) -> Tensor:
    """Return the gradient for some images, forwarding those alone; for all if rows is None."""
    if rows is None:
        return input_gradient(model, images, objective)

    def whole_objective(logits_RC: Tensor) -> Tensor:
        logits_BC = logits_RC.new_zeros(len(images), *logits_RC.shape[1:])
        return objective(logits_BC.index_copy(0, rows, logits_RC)).sum()

    return input_gradient(model, images[rows], whole_objective)


def _checked_steps(
    num_images: int, eps_B: Tensor, num_steps_B: Tensor, step_size_B: Tensor
) -> list[int]:
    """Raise unless there is one valid number per image; return the steps."""
    for name, values_B in (
        ("eps_B", eps_B),
        ("num_steps_B", num_steps_B),
        ("step_size_B", step_size_B),
    ):
        if values_B.shape != (num_images,):
            raise ValueError(
                f"{name} needs one number for each of the {num_images} images; got shape "
                f"{tuple(values_B.shape)}."
            )
    if num_steps_B.is_floating_point() or num_steps_B.dtype == torch.bool:
        raise ValueError(f"num_steps_B has to hold integers; got {num_steps_B.dtype}.")
    # One synchronisation per attack; the loop over steps needs none then.
    columns = torch.stack([eps_B, num_steps_B.to(eps_B.dtype), step_size_B.to(eps_B.dtype)])
    lengths, steps, sizes = columns.tolist()
    for name, values in (("eps_B", lengths), ("step_size_B", sizes)):
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(
                f"{name} has to be in [0, 1], because images are; got values from {min(values):g} "
                f"to {max(values):g}. Divide by 255 what is in pixel values from 0 to 255."
            )
    if min(steps) < 1:
        raise ValueError(f"num_steps_B has to be at least 1 everywhere; got {min(steps):g}.")
    return [int(value) for value in steps]
