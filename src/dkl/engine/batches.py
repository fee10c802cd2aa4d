"""From what a data source yields to what a method takes."""

from collections.abc import Callable

import torch
from torch import Tensor

from dkl.engine.noise import SampleNoise
from dkl.engine.plan import MicroBatchPlan
from dkl.engine.settings import LoopSettings
from dkl.methods.protocol import Batch, Draw

Augment = Callable[[Tensor, Draw], Tensor]


@torch.no_grad()
def make_batch(
    plan: MicroBatchPlan,
    images: Tensor,
    labels: Tensor,
    *,
    settings: LoopSettings,
    augment: Augment | None,
    step: int,
    device: torch.device,
) -> Batch:
    """Return the batch of a plan: images in [0, 1], augmented, on the device.

    Args:
        plan: which samples, and which of them count.
        images: [B, C, H, W]; uint8 is divided by 255, floats are taken as they are.
        labels: [B] integers.
        settings: of the loop.
        augment: applied to the images, or None.
        step: 0-based step of the run; keys the noise.
        device: the training device.

    Raises:
        ValueError: if shapes or types do not fit.

    Example:
        >>> plan = MicroBatchPlan(torch.tensor([4]), torch.tensor([True]))
        >>> batch = make_batch(
        ...     plan, torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([3]),
        ...     settings=LoopSettings(epochs=1, batch_size=1), augment=None, step=0,
        ...     device=torch.device("cpu"),
        ... )
        >>> batch.images.max().item(), batch.indices.tolist()
        (1.0, [4])
    """
    _check_shapes(plan, images, labels)
    indices = plan.indices.to(device, non_blocking=True)
    pixels = images.to(device, non_blocking=True)
    scaled = pixels.to(settings.torch_dtype)
    if not pixels.is_floating_point():
        scaled = scaled / 255
    if augment is not None:
        noise = SampleNoise(settings.seed, "augment", step, indices, settings.torch_dtype)
        scaled = augment(scaled, noise)
    if settings.channels_last:
        scaled = scaled.contiguous(memory_format=torch.channels_last)
    return Batch(
        images=scaled,
        labels=labels.to(device, torch.int64, non_blocking=True),
        mask=plan.mask.to(device, non_blocking=True),
        indices=indices,
    )


def _check_shapes(plan: MicroBatchPlan, images: Tensor, labels: Tensor) -> None:
    size = len(plan.indices)
    if images.ndim != 4 or len(images) != size or len(labels) != size:
        raise ValueError(
            f"need images [{size}, C, H, W] and labels [{size}] for {size} indices; the data gave "
            f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(
            f"images must be uint8 in 0..255 or floats in [0, 1]; the data gave {images.dtype}"
        )
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers; the data gave {labels.dtype}")
