"""What building and measuring ask of images, in memory or in files alike.

Shapes: N images, C classes.
"""

import torch
from torch import Tensor, nn

from dkl import evaluation
from dkl.data import ImageData, ImageFiles
from dkl.evaluation import Processes
from dkl.evaluation.state import hash_tensors

LabelledImages = ImageData | ImageFiles


def some_images(data: LabelledImages, indices: Tensor) -> ImageData:
    """Return the images at positions [M], in memory, as evaluation sees them."""
    return data.subset(indices) if isinstance(data, ImageData) else data.in_memory(indices)


def first_images(data: LabelledImages, count: int | None) -> ImageData:
    """Return the first so many images in memory, or all of them."""
    if count is None and isinstance(data, ImageData):
        return data
    return some_images(data, torch.arange(len(data))[:count])


def hash_images(data: LabelledImages, count: int | None = None) -> str:
    """Return a hash of the first so many images, or of all, and of their labels."""
    if isinstance(data, ImageData):
        return hash_tensors(data.images[:count], data.labels[:count])
    return data.subset(torch.arange(len(data))[:count]).fingerprint()


def predict_all(
    model: nn.Module, data: LabelledImages, *, batch_size: int, distributed: bool = False
) -> Tensor:
    """Return the model's logits for all images, decoding files as they are needed.

    Args:
        model: in evaluation mode, on its device.
        data: the images.
        batch_size: images per forward pass.
        distributed: deal the batches to the processes of torch.distributed.

    Returns:
        [N, C] float32 on the CPU.
    """
    device = next(model.parameters()).device
    if isinstance(data, ImageData):
        logits_NC = evaluation.predict_logits(
            model, data.images.to(device), batch_size=batch_size, distributed=distributed
        )
        return logits_NC.cpu()
    processes = Processes.of_this_run(distributed)
    parts = torch.split(torch.arange(len(data)), batch_size)
    own = [parts[number] for number in processes.share(range(len(parts)))]
    stream = data.for_evaluation().batches(own, device)

    def logits_of(_number: int) -> Tensor:
        images, _ = next(stream)  # ``deal`` goes through this process's share in order
        return evaluation.predict_logits(model, images, batch_size=batch_size).cpu()

    return torch.cat(processes.deal(len(parts), logits_of))
