"""What processes share: buffers averaged, gradients averaged, states that differ."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def average_batch_norm_buffers(accelerator: Accelerator, *modules: nn.Module) -> None:
    """Replace running means and variances of batch-norm layers by their mean over processes."""
    if accelerator.num_processes == 1:
        return
    for buffer in _running_statistics(modules):
        buffer.copy_(accelerator.reduce(buffer, "mean"))


def _running_statistics(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                statistics = (layer.running_mean, layer.running_var)
                yield from (buffer for buffer in statistics if buffer is not None)


@torch.no_grad()
def average_gradients(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Replace gradients by their mean over processes, in one collective per dtype.

    A parameter that got no gradient in a process counts as zero there.
    """
    if accelerator.num_processes == 1 or not parameters:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        flat = torch.cat([_gradient_or_zero(parameter).flatten() for parameter in group])
        pieces = accelerator.reduce(flat, "mean").split([p.numel() for p in group])
        for parameter, piece in zip(group, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).clone()


def _gradient_or_zero(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@torch.no_grad()
def copy_from_first(accelerator: Accelerator, module: nn.Module) -> None:
    """Give every process the parameters and buffers that the first one has."""
    if accelerator.num_processes == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        torch.distributed.broadcast(tensor, src=0)


def gather_objects(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the value of every process, in the order of their ranks."""
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[Any] = gather_object([value])
    return gathered


def from_first(accelerator: Accelerator, value: Any) -> Any:
    """Return the value that the first process has."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def entries_unlike_first(accelerator: Accelerator, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict that differ from those of the first process.

    Batch-norm statistics in the middle of an epoch, and what methods collect per process, are not
    the same everywhere; a checkpoint must hold both the first process's and these.
    """
    if accelerator.num_processes == 1:
        return {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    reference = from_first(accelerator, digests)
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in tensors.items()
        if digests[name] != reference.get(name)
    }


def _digest(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).digest()
