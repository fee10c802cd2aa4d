"""One forward and backward of a loss on random logits, for the clock and for the memory meter.

Shapes: N rows, C classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dkl.bench.peers import Loss, find_loss

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def random_logits(
    shape: tuple[int, int], dtype: str, device: str, *, target_grad: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Return input and target [N, C], normally distributed; the input needs a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    input_NC, target_NC = (
        torch.randn(shape, generator=generator, device=device, dtype=DTYPES[dtype])
        for _ in range(2)
    )
    return input_NC.requires_grad_(), target_NC.requires_grad_(target_grad)


def loss_step(loss: Loss, input_NC: Tensor, target_NC: Tensor) -> Callable[[], Tensor]:
    """Return a function that forgets the gradients, then goes forward and backward."""

    def step() -> Tensor:
        input_NC.grad = None
        target_NC.grad = None
        value = loss(input_NC, target_NC)
        torch.autograd.backward(value)
        return value.detach()

    return step


def step_for_memory(
    method: str, shape: list[int], dtype: str, device: str, target_grad: bool, seed: int
) -> Callable[[], None]:
    """Prepare a step that leaves nothing behind: an entry for ``peak_memory``."""
    input_NC, target_NC = random_logits(
        (shape[0], shape[1]), dtype, device, target_grad=target_grad, seed=seed
    )
    step = loss_step(find_loss(method), input_NC, target_NC)

    def work() -> None:
        step()
        input_NC.grad = None
        target_NC.grad = None

    return work


def two_exps(input_NC: Tensor, target_NC: Tensor) -> Callable[[], None]:
    """Return exp of both into buffers: arithmetic that every softmax of the two needs."""
    sources = input_NC.detach(), target_NC.detach()
    buffers = [torch.empty_like(source) for source in sources]

    def work() -> None:
        for source, buffer in zip(sources, buffers, strict=True):
            torch.exp(source, out=buffer)

    return work


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Set torch's threads for a while; gives their number, the present one for None."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
