"""What an attacker may do to an image: a norm ball around it, inside the pixel range [0, 1]."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dkl.attacks.noise import Draw, gaussian_noise, uniform_noise, uniform_per_sample

Norm = Literal["Linf", "L2"]
RandomStart = Literal["none", "uniform", "gaussian"]

GAUSSIAN_START_STD = 0.001


def parse_number(value: float | int | str) -> float:
    """Read a finite number, written as a number, as a decimal or as a fraction.

    Args:
        value: for example ``0.03``, ``"0.03"`` or ``"8/255"``.

    Returns:
        The number.

    Raises:
        ValueError: if it is not a finite number.

    Example:
        >>> parse_number("51/255")
        0.2
    """
    message = f'expected a finite number such as 0.03, "0.03" or "8/255"; got {value!r}.'
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(message)
    try:
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            number = float(numerator) / float(denominator)
        else:
            number = float(value)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(message) from error
    if not math.isfinite(number):
        raise ValueError(message)
    return number


@dataclass(frozen=True, init=False)
class ThreatModel:
    """The set of allowed images: ``||x' - x|| <= eps`` and ``x'`` in [0, 1].

    Every method takes images [N, ...] and treats each sample alone. Norms are computed in at least
    float32.

    Args:
        norm: "Linf" or "L2".
        eps: radius of the ball in the images' units; "8/255" is understood. Linf: in [0, 1].

    Raises:
        ValueError: unknown norm, or a radius that makes no sense for images in [0, 1].

    Example:
        >>> threat = ThreatModel("Linf", "51/255")
        >>> threat.project(torch.tensor([[0.9, 0.0]]), torch.tensor([[0.5, 0.1]]))
        tensor([[0.7000, 0.0000]])
    """

    norm: Norm
    eps: float

    def __init__(self, norm: Norm, eps: float | str) -> None:
        if norm not in get_args(Norm):
            raise ValueError(f'norm has to be "Linf" or "L2"; got {norm!r}.')
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "eps", self.check_length("eps", eps))

    def check_length(self, name: str, value: float | str) -> float:
        """Parse a radius or a step size and check that it fits images in [0, 1].

        Args:
            name: what the number is, for the message.
            value: a number, or text such as "8/255".

        Returns:
            The number.

        Raises:
            ValueError: if it is not a number, negative, or larger than 1 with the Linf norm.

        Example:
            >>> ThreatModel("Linf", 0.2).check_length("step_size", 2)
            Traceback (most recent call last):
            ...
            ValueError: step_size has to be in [0, 1] ... got 2. Did you mean 2/255?
        """
        length = parse_number(value)
        if length < 0:
            raise ValueError(f"{name} has to be at least 0; got {value}.")
        if self.norm == "Linf" and length > 1:
            advice = f"Did you mean {length:g}/255?" if length <= 255 else "Did you mean 8/255?"
            raise ValueError(
                f"{name} has to be in [0, 1] for the Linf norm, because images are in [0, 1]; "
                f"got {value}. {advice}"
            )
        return length

    def project(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """Return the allowed image near each perturbed one: into the ball, then into [0, 1].

        Args:
            perturbed: [N, ...] images.
            clean: same shape, in [0, 1]; centres of the balls.

        Returns:
            Images of the same shape; NaN stays NaN.

        Raises:
            ValueError: if the shapes differ.

        Example:
            >>> threat = ThreatModel("L2", 0.5)
            >>> threat.project(torch.tensor([[0.9, 0.8]]), torch.tensor([[0.3, 0.0]]))
            tensor([[0.6000, 0.4000]])
        """
        if perturbed.shape != clean.shape:
            raise ValueError(
                "perturbed and clean images need the same shape; got "
                f"{tuple(perturbed.shape)} and {tuple(clean.shape)}."
            )
        if self.norm == "Linf":
            inside = torch.clamp(perturbed, clean - self.eps, clean + self.eps)
        else:
            delta = perturbed - clean
            # Distances of at most eps are left alone; the floor keeps 0 / 0 out.
            distance = _sample_norms(delta).clamp_min(max(self.eps, 1e-30))
            inside = clean + (delta * (self.eps / distance)).to(clean.dtype)
            inside = torch.where(distance <= self.eps, perturbed, inside)
        # The clean image is in [0, 1], so clipping moves no pixel away from it.
        return inside.clamp(0.0, 1.0)

    def step(self, images: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Move along the steepest ascent direction of the norm, without projection.

        Linf: ``x + step_size sign(g)``. L2: ``x + step_size g / ||g||_2`` per sample; a sample
        with zero gradient stays where it is. NaN in a gradient makes NaN of the image.

        Args:
            images: [N, ...].
            gradient: same shape; the gradient of what is maximised. Its scale does not matter.
            step_size: length of the step in this norm.

        Returns:
            Images of the same shape.

        Example:
            >>> gradient = torch.tensor([[3e-30, -4e-30]])
            >>> ThreatModel("L2", 1.0).step(torch.zeros(1, 2), gradient, 0.5)
            tensor([[ 0.3000, -0.4000]])
        """
        if self.norm == "Linf":
            # sign() makes 0 of NaN, and a broken gradient would pass for a robust image.
            sign = torch.where(gradient.isnan(), gradient, gradient.sign())
            return images + step_size * sign
        # Scaled to a largest entry of 1 first: squares of small float32 gradients underflow.
        largest = gradient.abs().amax(dim=_sample_dims(gradient), keepdim=True)
        scaled = gradient / torch.where(largest == 0, 1.0, largest)
        norms = _sample_norms(scaled)
        direction = scaled / torch.where(norms == 0, 1.0, norms)
        return images + (step_size * direction).to(images.dtype)

    def random_start(self, images: Tensor, kind: RandomStart, draw: Draw | None = None) -> Tensor:
        """Return where an attack starts.

        Args:
            images: [N, ...] in [0, 1].
            kind: "none": the images themselves. "uniform": uniform in the ball (Linf: every pixel
                in [-eps, eps]), then clipped to [0, 1]. "gaussian": images + 0.001 N(0, I), as in
                TRADES; not projected, the first step of an attack does that.
            draw: uniform numbers per sample; None takes torch's global generator.

        Returns:
            New images of the same shape and dtype.

        Raises:
            ValueError: if the kind is unknown.

        Example:
            >>> start = ThreatModel("Linf", 0.1).random_start(torch.zeros(1, 8), "uniform")
            >>> bool((start >= 0).all() and (start <= 0.1).all())
            True
        """
        check_random_start(kind)
        if kind == "none":
            return images.clone()
        if kind == "gaussian":
            return images + (GAUSSIAN_START_STD * gaussian_noise(images, draw)).to(images.dtype)
        if self.norm == "Linf":
            delta = self.eps * (2.0 * uniform_noise(images, draw) - 1.0)
        else:
            delta = self._uniform_in_l2_ball(images, draw)
        return (images + delta.to(images.dtype)).clamp(0.0, 1.0)

    def _uniform_in_l2_ball(self, images: Tensor, draw: Draw | None) -> Tensor:
        normal = gaussian_noise(images, draw)
        norms = _sample_norms(normal)
        num_features = math.prod(images.shape[1:])
        # The share of the ball's volume within radius r grows as r ** num_features.
        radius = self.eps * uniform_per_sample(images, draw) ** (1.0 / max(num_features, 1))
        return radius * normal / torch.where(norms == 0, 1.0, norms)


def check_random_start(kind: str) -> None:
    """Raise a ValueError unless ``kind`` names a random start.

    Args:
        kind: the name to check.

    Raises:
        ValueError: if it is unknown.

    Example:
        >>> check_random_start("uniform")
    """
    if kind not in get_args(RandomStart):
        raise ValueError(f'random_start has to be "none", "uniform" or "gaussian"; got {kind!r}.')


def _sample_dims(batch: Tensor) -> tuple[int, ...]:
    return tuple(range(1, batch.ndim))


def _sample_norms(batch: Tensor) -> Tensor:
    """L2 norm of every sample, [N, 1, ...], in at least float32."""
    dtype = torch.promote_types(batch.dtype, torch.float32)
    dims = _sample_dims(batch)
    norms: Tensor = torch.linalg.vector_norm(batch, dim=dims, keepdim=True, dtype=dtype)
    return norms
