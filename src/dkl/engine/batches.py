"""From what a data source yields to what a method takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dkl.engine.noise import SampleNoise
from dkl.engine.plan import MicroBatchPlan, draw_partners
from dkl.engine.settings import DataSource, LoopSettings
from dkl.methods.protocol import Batch, Draw

Augment = Callable[[Tensor, Draw], Tensor]
"""(images [B, C, H, W] in [0, 1], draw) -> images of the same shape."""

Mix = Callable[[Tensor, Tensor, Draw], tuple[Tensor, Tensor]]
"""(images, partners, draw) -> mixed images and the share of the first in each, [B] in [0, 1]."""


@dataclass(frozen=True)
class Augmentations:
    """What happens to images on their way into a batch.

    Args:
        augment: applied to the images, or None.
        views: each applied to the same images; the results are ``extras["view_1"]`` and so on.
        mix: mixes every augmented image with another one, augmented by noise of its own; None
            leaves them apart.
        num_classes: needed by ``mix``.
    """

    augment: Augment | None = None
    views: Sequence[Augment] = ()
    mix: Mix | None = None
    num_classes: int | None = None


def augmentations_of(
    source: DataSource, augment: Augment | None, views: Sequence[Augment], mix: Mix | None
) -> Augmentations:
    """Collect the augmentations for the images of a source.

    Raises:
        ValueError: if images are to be mixed and the source does not know the number of classes.
    """
    num_classes = getattr(source, "num_classes", None)
    if mix is not None and num_classes is None:
        raise ValueError(
            f"mixing images mixes labels as well, which needs the number of classes; give "
            f"{type(source).__name__} an attribute num_classes, or leave out mix"
        )
    return Augmentations(augment, tuple(views), mix, num_classes)


def load_batches(
    source: DataSource,
    steps: list[list[MicroBatchPlan]],
    order: Tensor,
    *,
    first_step: int,
    settings: LoopSettings,
    augmentations: Augmentations,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield the micro-batches of steps, ready for a method.

    Args:
        source: training data.
        steps: plans of the micro-batches of each step.
        order: positions of the whole epoch; partners are drawn from them.
        first_step: 0-based step of the run that the first of ``steps`` is.
        settings: of the loop.
        augmentations: of the images.
        device: the training device.

    Raises:
        ValueError: if the source yields too few batches, or what does not fit.
    """
    plans = [(first_step + n, micro) for n, step in enumerate(steps) for micro in step]

    def positions(step: int, indices: Tensor) -> Tensor:
        if augmentations.mix is None:
            return indices
        partners = draw_partners(indices, order, seed=settings.seed, step=step)
        return torch.cat([indices, partners])

    stream = source.batches((positions(step, micro.indices) for step, micro in plans), device)
    for number, (step, micro) in enumerate(plans):
        loaded = next(stream, None)
        if loaded is None:
            raise ValueError(
                f"the training data gave {number} batches where {len(plans)} were asked for; "
                f"batches() must yield one for every index batch"
            )
        yield make_batch(
            micro,
            *loaded,
            settings=settings,
            augment=augmentations,
            step=step,
            device=device,
        )


@torch.no_grad()
def make_batch(
    plan: MicroBatchPlan,
    images: Tensor,
    labels: Tensor,
    *,
    settings: LoopSettings,
    augment: Augmentations | Augment | None,
    step: int,
    device: torch.device,
) -> Batch:
    """Return the batch of a plan: images in [0, 1], augmented, on the device.

    Args:
        plan: which samples, and which of them count.
        images: [B, C, H, W]; uint8 is divided by 255, floats are taken as they are. With ``mix``
            [2 B, C, H, W]: the second half are the partners.
        labels: [B] integers; with ``mix`` [2 B].
        settings: of the loop.
        augment: of the images; a function alone is ``Augmentations(function)``.
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
    how = augment if isinstance(augment, Augmentations) else Augmentations(augment)
    size = len(plan.indices)
    _check_shapes(size if how.mix is None else 2 * size, images, labels)
    indices = plan.indices.to(device, non_blocking=True)
    pixels = images.to(device, non_blocking=True)
    scaled = pixels.to(settings.torch_dtype)
    if not pixels.is_floating_point():
        scaled = scaled / 255

    def noise(stream: str) -> SampleNoise:
        return SampleNoise(settings.seed, stream, step, indices, settings.torch_dtype)

    def arranged(result: Tensor) -> Tensor:
        if settings.channels_last:
            return result.contiguous(memory_format=torch.channels_last)
        return result

    raw = scaled[:size]
    basic = raw if how.augment is None else how.augment(raw, noise("augment"))
    all_labels = labels.to(device, torch.int64, non_blocking=True)
    targets = None
    if how.mix is not None:
        partners = scaled[size:]
        if how.augment is not None:
            partners = how.augment(partners, noise("augment_partner"))
        basic, share_B = how.mix(basic, partners, noise("mix"))
        targets = _mixed_labels(all_labels, share_B, how.num_classes or 0, settings.torch_dtype)
    names = [f"view_{number}" for number in range(1, len(how.views) + 1)]
    return Batch(
        images=arranged(basic),
        labels=all_labels[:size],
        mask=plan.mask.to(device, non_blocking=True),
        indices=indices,
        extras={
            name: arranged(view(raw, noise(name)))
            for name, view in zip(names, how.views, strict=True)
        },
        targets=targets,
    )


def _mixed_labels(labels: Tensor, share_B: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return share onehot(own) + (1 - share) onehot(partner) as [B, num_classes]."""
    size = len(labels) // 2
    if tuple(share_B.shape) != (size,):
        raise ValueError(
            f"mix must return the share of the own image for each of {size} samples; got shape "
            f"{tuple(share_B.shape)}"
        )
    own_BC, other_BC = F.one_hot(labels, num_classes).to(dtype).chunk(2)
    return torch.lerp(other_BC, own_BC, share_B.to(dtype).unsqueeze(1))


def _check_shapes(size: int, images: Tensor, labels: Tensor) -> None:
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
