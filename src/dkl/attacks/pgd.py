"""Projected gradient descent attacks (Madry et al., 2018) on any objective of the logits."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dkl.attacks.noise import Draw
from dkl.attacks.threat_model import RandomStart, ThreatModel, check_random_start

Objective = Callable[[Tensor], Tensor]
"""Adversarial logits [N, C] to values [N] (or their sum or mean, a scalar), to be maximised."""

BatchNormMode = Literal["eval", "train", "batch-stats"]

# Rounding of image decoders and augmentations; anything further out is a wrong pixel range.
PIXEL_RANGE_TOLERANCE = 1e-3


@contextmanager
def attack_mode(model: nn.Module, batch_norm: BatchNormMode = "eval") -> Iterator[None]:
    """Put a model into the state an attack wants, and everything back afterwards, even on errors.

    Inside, no parameter requires a gradient: only the images get one, and no autocast copy of a
    weight is cached without its history. On exit each submodule's own training flag, each
    parameter's ``requires_grad`` and each batch-norm setting are what they were. May be nested;
    inside "batch-stats" a nested "train" leaves the buffers alone too.

    Args:
        model: the bare network, not its DistributedDataParallel wrapper.
        batch_norm: "eval": ``model.eval()``. "train": ``model.train()``, batch-norm buffers are
            updated as in training. "batch-stats": ``model.train()`` (dropout included), but the
            buffers of batch-norm layers (torch's classes and what inherits from them) are neither
            read nor written.

    Yields:
        Nothing.

    Raises:
        ValueError: if the mode is unknown.

    Example:
        >>> model = nn.Linear(2, 2).train()
        >>> with attack_mode(model):
        ...     model.training, model.weight.requires_grad
        (False, False)
        >>> model.training, model.weight.requires_grad
        (True, True)
    """
    _check_batch_norm(batch_norm)
    with ExitStack() as restore:
        for module in model.modules():
            restore.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            restore.callback(parameter.requires_grad_, parameter.requires_grad)
        model.train(batch_norm != "eval")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if batch_norm == "batch-stats":
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    restore.callback(
                        setattr, module, "track_running_stats", module.track_running_stats
                    )
                    # A layer in train mode that does not track passes no buffers to its kernel.
                    module.track_running_stats = False
        yield


@dataclass(frozen=True, init=False)
class PGDSettings:
    """A PGD attack, ready to run on batches.

    Args:
        threat: the allowed images.
        num_steps: gradient steps, at least 1; each is one forward and one backward pass.
        step_size: length of a step in the threat model's norm; "2/255" is understood.
        random_start: "none", "uniform" or "gaussian"; see ``ThreatModel.random_start``.
        batch_norm: "eval", "train" or "batch-stats"; see ``attack_mode``.

    Raises:
        ValueError: if a setting makes no sense.

    Example:
        >>> pgd = PGDSettings(ThreatModel("Linf", "8/255"), num_steps=10, step_size="2/255")
        >>> images, labels = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
        >>> adversarial = pgd.attack(nn.Linear(3, 2), images, cross_entropy_objective(labels))
        >>> bool(((adversarial - images).abs() <= 8 / 255 + 1e-6).all())
        True
    """

    threat: ThreatModel
    num_steps: int
    step_size: float
    random_start: RandomStart
    batch_norm: BatchNormMode

    def __init__(
        self,
        threat: ThreatModel,
        num_steps: int,
        step_size: float | str,
        random_start: RandomStart = "none",
        batch_norm: BatchNormMode = "eval",
    ) -> None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(
                f"num_steps has to be a whole number, at least 1; got {num_steps!r}. "
                "For noise without gradient steps use ThreatModel.random_start."
            )
        check_random_start(random_start)
        _check_batch_norm(batch_norm)
        object.__setattr__(self, "threat", threat)
        object.__setattr__(self, "num_steps", num_steps)
        object.__setattr__(self, "step_size", threat.check_length("step_size", step_size))
        object.__setattr__(self, "random_start", random_start)
        object.__setattr__(self, "batch_norm", batch_norm)

    def attack(
        self, model: nn.Module, images: Tensor, objective: Objective, draw: Draw | None = None
    ) -> Tensor:
        """Return adversarial images; ``pgd_attack`` with these settings.

        Args:
            model: the bare network, images to logits [N, C].
            images: [N, ...] floats in [0, 1].
            objective: what to maximise.
            draw: uniform numbers per sample for the random start; None takes torch's generator.

        Returns:
            Detached images, with the dtype and memory format of ``images``.

        Raises:
            ValueError: if the images or what model and objective return do not fit.
        """
        check_images(images)
        clean = images.detach()
        if clean.numel() == 0:
            return clean.clone()
        with attack_mode(model, self.batch_norm):
            adversarial = self.threat.random_start(clean, self.random_start, draw)
            for _ in range(self.num_steps):
                gradient = input_gradient(model, adversarial, objective)
                moved = self.threat.step(adversarial, gradient, self.step_size)
                adversarial = self.threat.project(moved, clean)
        return adversarial


def pgd_attack(
    model: nn.Module,
    images: Tensor,
    objective: Objective,
    *,
    threat: ThreatModel,
    num_steps: int,
    step_size: float | str,
    random_start: RandomStart = "none",
    batch_norm: BatchNormMode = "eval",
    draw: Draw | None = None,
) -> Tensor:
    """Maximise an objective of the logits over the allowed images, by projected gradient steps.

    ``x' <- Pi(x' + step_size direction(grad objective))``, ``num_steps`` times; direction and
    projection are the threat model's. Only the gradient with respect to the images is computed:
    ``.grad`` of the parameters is untouched. Logits of the clean images that the objective needs
    are the caller's: computed once, detached, inside ``attack_mode`` and closed over. NaN in a
    sample's gradient makes that sample NaN, never silently clean. Under float16 autocast small
    gradients of the images underflow to zero, which weakens attacks; prefer bfloat16.

    Args:
        model: the bare network, images to logits [N, C].
        images: [N, ...] floats in [0, 1].
        objective: logits to values [N] or a scalar; summed over samples and maximised.
        threat: the allowed images.
        num_steps: gradient steps, each one forward and one backward pass; at least 1.
        step_size: length of a step in the threat model's norm; "2/255" is understood.
        random_start: "none", "uniform" or "gaussian"; see ``ThreatModel.random_start``.
        batch_norm: "eval", "train" or "batch-stats"; see ``attack_mode``.
        draw: uniform numbers per sample for the random start; None takes torch's generator.

    Returns:
        Detached images, with the dtype and memory format of ``images``.

    Raises:
        ValueError: if a setting, the images, or what model and objective return do not fit.

    Example:
        >>> model, images = nn.Linear(3, 2), torch.rand(4, 3)
        >>> with attack_mode(model):
        ...     clean_logits = model(images).detach()
        >>> adversarial = pgd_attack(
        ...     model,
        ...     images,
        ...     lambda logits: (logits - clean_logits).square().sum(dim=1),
        ...     threat=ThreatModel("L2", 0.5),
        ...     num_steps=5,
        ...     step_size=0.2,
        ...     random_start="gaussian",
        ... )
        >>> bool(((adversarial - images).norm(dim=1) <= 0.5 + 1e-6).all())
        True
    """
    settings = PGDSettings(threat, num_steps, step_size, random_start, batch_norm)
    return settings.attack(model, images, objective, draw)


def cross_entropy_objective(labels: Tensor) -> Objective:
    """Return the objective of untargeted attacks: cross-entropy with the true labels.

    Args:
        labels: [N] int64.

    Returns:
        A function from logits [N, C] to values [N].

    Example:
        >>> cross_entropy_objective(torch.tensor([1]))(torch.zeros(1, 2))
        tensor([0.6931])
    """

    def objective(logits_NC: Tensor) -> Tensor:
        return F.cross_entropy(logits_NC, labels, reduction="none")

    return objective


def margin_objective(labels: Tensor) -> Objective:
    """Return the margin objective: the best wrong logit minus the true one.

    ``max_{j != y} z_j - z_y`` (Carlini and Wagner, 2017); positive where the attack succeeds.

    Args:
        labels: [N] int64.

    Returns:
        A function from logits [N, C], C >= 2, to values [N].

    Raises:
        ValueError: from the function, if there is only one class.

    Example:
        >>> margin_objective(torch.tensor([0, 2]))(torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 0.5]]))
        tensor([-1.0000,  0.5000])
    """

    def objective(logits_NC: Tensor) -> Tensor:
        if logits_NC.shape[1] < 2:
            raise ValueError(
                "the margin needs at least two classes; got logits of shape "
                f"{tuple(logits_NC.shape)}."
            )
        index_N1 = labels.unsqueeze(1)
        best_wrong_N = logits_NC.scatter(1, index_N1, float("-inf")).amax(dim=1)
        return best_wrong_N - logits_NC.gather(1, index_N1).squeeze(1)

    return objective


def input_gradient(model: nn.Module, images: Tensor, objective: Objective) -> Tensor:
    """Return the gradient of an objective of the logits with respect to the images.

    Args:
        model: images to logits [N, C], in ``attack_mode``.
        images: [N, ...] floats.
        objective: logits to values [N] or a scalar; summed over samples.

    Returns:
        The gradient, shape of ``images``; ``.grad`` of nothing is touched.

    Raises:
        ValueError: if what model or objective return does not fit.

    Example:
        >>> input_gradient(nn.Identity(), torch.ones(1, 2), lambda logits: logits.square().sum(1))
        tensor([[2., 2.]])
    """
    with torch.enable_grad():
        variable = images.detach().requires_grad_()
        logits = model(variable)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"an attack needs a model that returns logits as a tensor; got "
                f"{type(logits).__name__}. Wrap the model so that it returns the logits alone."
            )
        value = objective(logits)
        if value.shape not in (torch.Size([]), torch.Size([len(images)])):
            raise ValueError(
                f"the objective has to return {len(images)} values, one per image, or a scalar; "
                f"got shape {tuple(value.shape)}."
            )
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), variable, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the objective does not depend on the images, so there is nothing to attack. "
            "Use the logits it is given, and neither detach() nor torch.no_grad() on the way."
        )
    return gradient


def check_images(images: Tensor) -> None:
    """Raise a ValueError unless images can be attacked: floats [N, ...] in [0, 1].

    Args:
        images: what an attack was given.

    Raises:
        ValueError: if they are not, or gradients are ruled out by inference mode.

    Example:
        >>> check_images(torch.rand(2, 3))
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "attacks need gradients, which torch.inference_mode() rules out; "
            "leave it, or use torch.no_grad() around the call instead."
        )
    if not images.is_floating_point() or images.ndim < 2:
        raise ValueError(
            "images have to be floats in [0, 1] of shape [N, ...]; got "
            f"{images.dtype} of shape {tuple(images.shape)}. Divide uint8 images by 255."
        )
    if images.numel() == 0:
        return
    # One synchronisation per attack: normalised images would be clipped into nonsense silently.
    lowest, highest = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (lowest >= -PIXEL_RANGE_TOLERANCE and highest <= 1 + PIXEL_RANGE_TOLERANCE):
        raise ValueError(
            f"images have to be in [0, 1]; got values from {lowest:g} to {highest:g}. "
            "Put normalisation inside the model (mean and std of create_model)."
        )


def _check_batch_norm(batch_norm: str) -> None:
    if batch_norm not in get_args(BatchNormMode):
        raise ValueError(
            f'batch_norm has to be "eval", "train" or "batch-stats"; got {batch_norm!r}.'
        )
