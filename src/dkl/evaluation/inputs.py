"""Checks of what an evaluation is given, and the state a model is in while it is evaluated.

Shapes: N samples, C classes or channels, H x W pixels.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from dkl.attacks import ThreatModel, attack_mode

EvaluationNorm = Literal["Linf", "L2", "L1"]


@dataclass(frozen=True)
class Ball:
    """The images that an attacker may choose from: within ``eps`` of the clean one, in [0, 1].

    Args:
        norm: "Linf", "L2" or "L1".
        eps: radius in pixel units of [0, 1], positive.
    """

    norm: EvaluationNorm
    eps: float


@dataclass(frozen=True)
class EvaluationData:
    """Checked images and labels, cut into float batches on the model's device.

    Args:
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        labels: [N] int64 on the device of the images.
        device: where the model is.
    """

    images: Tensor
    labels: Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (float32, contiguous, in [0, 1]) and labels on the model's device."""
        indices = indices.to(self.images.device)
        images_BCHW = self.images[indices].to(self.device)
        labels_B = self.labels[indices].to(self.device)
        return float_images(images_BCHW), labels_B

    def float_copy(self) -> Tensor:
        """Return all images as float32 in [0, 1] on their own device."""
        return float_images(self.images)


def float_images(images_NCHW: Tensor) -> Tensor:
    """Return a fresh contiguous float32 copy; uint8 pixels are divided by 255."""
    if images_NCHW.dtype == torch.uint8:
        return images_NCHW.contiguous().float() / 255
    return images_NCHW.detach().clone(memory_format=torch.contiguous_format)


def check_data(model: nn.Module, images: Tensor, labels: Tensor) -> EvaluationData:
    """Check images and labels and find the model's device.

    Raises:
        ValueError: for wrong types, shapes, dtypes or ranges.
    """
    check_model(model)
    check_images(images)
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a torch tensor, got {type(labels).__name__}.")
    if labels.ndim != 1 or len(labels) != len(images):
        raise ValueError(
            f"labels must be [N] with one class index per image: got {list(labels.shape)} for "
            f"{len(images)} images. One-hot labels: labels.argmax(dim=1)."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be int64 class indices, got {labels.dtype}: labels.long().")
    labels_N = labels.detach().to(images.device, torch.int64)
    if int(labels_N.min()) < 0:
        raise ValueError(
            f"labels must be in [0, num_classes), got {int(labels_N.min())}. "
            "Leave out the samples that have no label."
        )
    return EvaluationData(images.detach(), labels_N, model_device(model, images.device))


def check_model(model: nn.Module) -> None:
    """Refuse what is not a module, and inference mode, in which no attack can take gradients."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a torch.nn.Module, got {type(model).__name__}. Wrap a function in a "
            "module whose forward calls it."
        )
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "attacks need gradients, which torch.inference_mode() forbids. Leave the inference "
            "mode, or use torch.no_grad() in its place."
        )


def check_images(images: Tensor) -> None:
    """Refuse images that are not [N, C, H, W], float32 in [0, 1] or uint8."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images must be a torch tensor, got {type(images).__name__}. "
            "A numpy array: torch.from_numpy(images)."
        )
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"images must be [N, C, H, W] with N >= 1, got {list(images.shape)}. "
            "One image: images.unsqueeze(0)."
        )
    if images.shape[3] in {1, 3} and images.shape[1] > 4:
        raise ValueError(
            f"images look like [N, H, W, C]: {list(images.shape)}. "
            "Put channels first: images.permute(0, 3, 1, 2)."
        )
    if images.dtype == torch.uint8:
        return
    if images.dtype != torch.float32:
        raise ValueError(
            f"images must be float32 in [0, 1] or uint8, got {images.dtype}: images.float()."
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"images must be in [0, 1] and free of NaN, got values from {low:g} to {high:g}. "
            "Give unnormalised images: mean and std belong inside the model. 0..255: divide by 255."
        )


def check_ball(norm: str, eps: float | str, image_shape: torch.Size) -> Ball:
    """Return the ball of an attack, for images [C, H, W].

    Raises:
        ValueError: for an unknown norm, and for a radius that makes no sense.
    """
    if norm not in get_args(EvaluationNorm):
        raise ValueError(f'norm has to be "Linf", "L2" or "L1"; got {norm!r}.')
    # An L1 radius is checked as an L2 one is: it has no bound of its own.
    radius = ThreatModel("Linf" if norm == "Linf" else "L2", eps).eps
    if radius == 0.0:
        raise ValueError("eps must be positive, got 0: the clean accuracy is what you want.")
    num_pixels = math.prod(image_shape)
    widest = {"Linf": 1.0, "L2": math.sqrt(num_pixels), "L1": float(num_pixels)}[norm]
    if radius >= widest:
        raise ValueError(
            f"eps must be below {widest:.4g}, got {radius:g}: pixels are in [0, 1], so the {norm} "
            f"ball holds every image of {num_pixels} pixels. Radii of pixels from 0 to 255 are "
            f"divided by 255. Did you mean {radius:g}/255?"
        )
    return Ball(cast(EvaluationNorm, norm), radius)


def check_gradient_norm(ball: Ball) -> ThreatModel:
    """Return the threat model of PGD and CW.

    Raises:
        ValueError: for L1, in which they do not step.
    """
    if ball.norm == "L1":
        raise ValueError(
            'PGD and CW are for the norms "Linf" and "L2"; got "L1". Measure L1 robustness with '
            "AutoAttack, whose attacks take L1 steps."
        )
    return ThreatModel(ball.norm, ball.eps)


def check_batching(batch_size: int, seed: int) -> None:
    """Refuse batch sizes below 1 and seeds that torch's generators do not take."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}.")


def checked_logits(output: object, num_samples: int) -> Tensor:
    """Return the model's output as float32 logits [N, C].

    Raises:
        ValueError: when the output is not one floating-point tensor of that shape.
    """
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model must return logits [N, C], got a {type(output).__name__}. "
            "Wrap it in a module that picks the logits."
        )
    if output.ndim != 2 or output.shape[0] != num_samples or not output.is_floating_point():
        raise ValueError(
            f"the model must return floating-point logits [N, C] for N = {num_samples} images, "
            f"got {output.dtype} of shape {list(output.shape)}."
        )
    return output.float()


def model_device(model: nn.Module, default: torch.device) -> torch.device:
    """Return the device of the model's first parameter or buffer, else the default."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return default


def index_batches(indices: Tensor, batch_size: int) -> list[Tensor]:
    """Cut indices into batches; no indices give no batch.

    Example:
        >>> index_batches(torch.arange(3), 2)
        [tensor([0, 1]), tensor([2])]
        >>> index_batches(torch.arange(0), 2)
        []
    """
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def arithmetic(device: torch.device) -> str:
    """Say how precisely float32 numbers are multiplied on a device."""
    if device.type != "cuda":
        return "float32"
    parts = []
    if torch.backends.cudnn.allow_tf32:
        parts.append("TF32 convolutions")
    if torch.get_float32_matmul_precision() != "highest":
        parts.append(f"matrix products of {torch.get_float32_matmul_precision()} precision")
    return " with ".join(["float32", *([" and ".join(parts)] if parts else [])])


@contextlib.contextmanager
def isolated(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model in evaluation mode, in float32, and keep its surroundings as they are.

    On the way out, even after an error, every submodule has its own mode again, parameters their
    ``requires_grad``, torch's random generators (CPU and CUDA) their state, and Python its tracer.
    Autocast is off inside. Gradients are left to those who take them.
    """
    devices = list(range(torch.cuda.device_count()))
    tracer = sys.gettrace()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, enabled=False),
            attack_mode(model, "eval"),
        ):
            yield
    finally:
        if sys.gettrace() is not tracer:
            sys.settrace(tracer)
