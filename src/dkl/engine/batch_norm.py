"""Batch-norm layers in training: their momentum, and their parameters apart from weight decay."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_layers(*modules: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers inside modules, each once.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> batch_norm_layers(nn.Sequential(nn.Linear(2, 2), layer), layer) == [layer]
        True
    """
    found = (layer for module in modules for layer in module.modules())
    return list(dict.fromkeys(layer for layer in found if isinstance(layer, _BatchNorm)))


def require_batch_norm(model: nn.Module, setting: str) -> None:
    """Refuse a setting that a model without batch-norm layers would ignore.

    Raises:
        ValueError: if there are none.
    """
    if not batch_norm_layers(model):
        raise ValueError(
            f"{setting} would be ignored: {type(model).__name__} has no batch-norm layer; leave it "
            "None"
        )


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Set the momentum of all batch-norm layers of a model."""
    for layer in batch_norm_layers(model):
        layer.momentum = momentum


@contextmanager
def momentum_of(model: nn.Module, momentum: float) -> Iterator[None]:
    """Let all batch-norm layers of a model have another momentum inside.

    Example:
        >>> layer = nn.BatchNorm1d(2, momentum=0.01)
        >>> with momentum_of(layer, 1.0):
        ...     layer.momentum
        1.0
        >>> layer.momentum
        0.01
    """
    before = [(layer, layer.momentum) for layer in batch_norm_layers(model)]
    set_momentum(model, momentum)
    try:
        yield
    finally:
        for layer, own in before:
            layer.momentum = own


def without_decay(
    parameters: list[nn.Parameter], *modules: nn.Module
) -> tuple[list[dict[str, Any]], set[int]]:
    """Split parameters into two groups, the second of batch-norm layers and without weight decay.

    Args:
        parameters: what is trained.
        modules: what they belong to.

    Returns:
        The groups, as an optimiser takes them, and the ids of the parameters in the second.

    Raises:
        ValueError: if the second group would be empty.
    """
    inside = {
        id(parameter)
        for layer in batch_norm_layers(*modules)
        for parameter in layer.parameters(recurse=False)
    }
    spared = [parameter for parameter in parameters if id(parameter) in inside]
    if not spared:
        raise ValueError(
            "decay_batch_norm=False would be ignored: neither model nor method trains a parameter "
            "of a batch-norm layer; leave it True"
        )
    decayed = [parameter for parameter in parameters if id(parameter) not in inside]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return groups, {id(parameter) for parameter in spared}
