"""Whether model and data fit each other, found out before any work is done."""

import torch
from torch import Tensor, nn

from dkl import evaluation
from dkl.build.image_access import LabelledImages
from dkl.data import DatasetSource


class Float32Interface(nn.Module):
    """A model of any dtype as one that takes float32 images and returns float32 logits.

    Evaluation and attacks work in float32; models of float64 runs are measured through this.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
        >>> Float32Interface(model)(torch.zeros(2, 1, 2, 2)).dtype
        torch.float32
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return the logits [N, C]."""
        dtype = next((p.dtype for p in self.model.parameters()), images_NCHW.dtype)
        logits_NC: Tensor = self.model(images_NCHW.to(dtype))
        return logits_NC.float()


def measurable(model: nn.Module) -> nn.Module:
    """Return the model, behind a float32 interface where it needs one."""
    parameter = next(model.parameters(), None)
    is_float32 = parameter is None or parameter.dtype == torch.float32
    return model if is_float32 else Float32Interface(model)


def count_logits(model: nn.Module, source: LabelledImages | DatasetSource) -> int:
    """Return how many classes the model tells apart, by showing it the first image.

    Raises:
        ValueError: the model cannot take the images, or returns no logits [N, C].

    Example:
        >>> from dkl.data import ImageData
        >>> data = ImageData(
        ...     torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.tensor([0]), 1, ("a",)
        ... )
        >>> count_logits(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), data)
        3
    """
    # What a dataset's own random transform draws here must not move the run's generators.
    with torch.random.fork_rng(devices=[]):
        images, _ = next(iter(source.batches([torch.tensor([0])], torch.device("cpu"))))
    if images.is_floating_point():
        images = images.float()
    try:
        logits = evaluation.predict_logits(measurable(model), images, batch_size=1)
    except RuntimeError as error:
        raise ValueError(
            f"the model cannot take images of shape {list(images.shape[1:])}: {error}"
        ) from error
    return logits.shape[1]


def check_classes(model: nn.Module, data: LabelledImages) -> None:
    """Refuse a model that cannot take the images or has no logit for some label.

    Raises:
        ValueError: with what the model has and what the data need.
    """
    num_logits = count_logits(model, data)
    highest = int(data.labels.max()) if len(data) else -1
    if highest >= num_logits:
        raise ValueError(
            f"the model has {num_logits} logits, so labels must be in [0, {num_logits}); got "
            f"{highest}. Give the model {data.num_classes} classes, or renumber the labels."
        )
