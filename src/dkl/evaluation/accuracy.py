"""Predictions and clean accuracy.

Shapes: N samples, C classes or channels.
"""

import torch
from torch import Tensor, nn

from dkl.evaluation.inputs import (
    check_batching,
    check_data,
    check_images,
    check_model,
    checked_logits,
    float_images,
    isolated,
    model_device,
)
from dkl.evaluation.processes import Processes


def predict_logits(
    model: nn.Module,
    images: Tensor,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    distributed: bool = False,
) -> Tensor:
    """Return the model's logits for all images, in evaluation mode and without gradients.

    Args:
        model: returns logits [N, C]; its mode is restored afterwards.
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        batch_size: images per forward pass.
        device: where to run; None: where the model is.
        distributed: deal the batches to the processes of torch.distributed, which all call this
            alike and all get the whole.

    Returns:
        [N, C] float32 logits on the device of ``images``.

    Raises:
        ValueError: when the images or the model's output have the wrong shape, type or range;
            ``distributed`` without a process group.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> predict_logits(model, torch.zeros(5, 1, 2, 2), batch_size=2).shape
        torch.Size([5, 3])
    """
    check_model(model)
    check_images(images)
    check_batching(batch_size, seed=0)
    place = model_device(model, images.device) if device is None else torch.device(device)
    processes = Processes.of_this_run(distributed)
    # What travels between processes is on the CPU: each has a device of its own.
    home = images.device if processes.count == 1 else torch.device("cpu")
    batches = torch.split(images, batch_size)

    def logits_of(number: int) -> Tensor:
        batch_BCHW = float_images(batches[number].to(place))
        return checked_logits(model(batch_BCHW), len(batch_BCHW)).to(home)

    with isolated(model, place), torch.no_grad():
        logits_NC = torch.cat(processes.deal(len(batches), logits_of))
    return logits_NC.to(images.device)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 256) -> float:
    """Return the share of images that the model classifies correctly.

    Args:
        model: returns logits [N, C]; its mode is restored afterwards.
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        labels: [N] int64 class indices.
        batch_size: images per forward pass.

    Returns:
        The accuracy, from 0 to 1.

    Raises:
        ValueError: for wrong inputs, labels without a logit, and logits that are not finite.

    Example:
        >>> labels = torch.tensor([0, 1, 1, 1])
        >>> images = labels.float().reshape(4, 1, 1, 1).expand(4, 1, 1, 2)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        >>> accuracy(model, images, labels)
        1.0
    """
    data = check_data(model, images, labels)
    logits_NC = predict_logits(model, images, batch_size=batch_size)
    check_clean_logits(logits_NC, data.labels)
    return float((logits_NC.argmax(dim=1) == data.labels).double().mean())


def check_clean_logits(logits_NC: Tensor, labels_N: Tensor) -> None:
    """Refuse logits of unperturbed images that cannot be judged.

    Raises:
        ValueError: when a label has no logit, or a logit is not finite.
    """
    num_classes = logits_NC.shape[1]
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, the model has {num_classes}.")
    if int(labels_N.max()) >= num_classes:
        raise ValueError(
            f"labels must be in [0, {num_classes}), as the model has {num_classes} logits: "
            f"got {int(labels_N.max())}."
        )
    num_bad = int((~logits_NC.isfinite()).any(dim=1).sum())
    if num_bad:
        raise ValueError(
            f"the logits of {num_bad} of {len(logits_NC)} clean images are NaN or infinite. "
            "Check the weights (did training diverge?) and the normalisation."
        )
