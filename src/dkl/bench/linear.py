"""``dkl bench linear``: head and loss in one pass over chunks, against dense logits.

Shapes: N rows, H hidden, V classes (the vocabulary). The dense form holds logits [N, V] of student
and teacher; gradients go to the student's hidden states and weight.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dkl.bench.cases import Progress, check_agreement, memory_rows
from dkl.bench.memory import peak_memory
from dkl.bench.peers import eager_kl, our_ikl
from dkl.bench.rows import BenchRow
from dkl.bench.settings import LinearSettings
from dkl.bench.steps import DTYPES, torch_threads
from dkl.bench.timing import interleaved, time_rows
from dkl.reports.origin import provenance

TABLE = "linear"
LINEAR = "linear ikl"
DENSE = "dense ikl, auto"
DENSE_KL = "dense kl, eager"
METHODS = (DENSE, DENSE_KL, LINEAR)

LinearLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Takes hidden states and weight of the student, then those of the teacher."""


def run(settings: LinearSettings, progress: Progress = lambda _: None) -> list[BenchRow]:
    """Measure time and peak memory of a step; the baseline is the dense form of the same loss.

    Args:
        settings: what to measure.
        progress: told what is being measured, in words.

    Returns:
        Rows with metrics "time", "peak_memory" (beyond the inputs) and
        "peak_memory_beyond_gradients".
    """
    shape = [settings.num_rows, settings.num_hidden, settings.num_classes]
    case = f"N = {shape[0]}, H = {shape[1]}, V = {shape[2]}, {settings.dtype}"
    with torch_threads(settings.threads) as threads:
        described = settings.describe(shape=shape)
        origin = provenance(described, device=settings.device)
        progress(f"time: {case}")
        timings = interleaved(
            _agreeing_steps(settings, shape),
            warmup=settings.warmup,
            rounds=settings.rounds,
            device=settings.device,
        )
    rows = time_rows(
        timings, table=TABLE, case=case, baseline=DENSE, settings=described, origin=origin
    )
    wanted = {"all": METHODS, "auto": (DENSE, LINEAR), "none": ()}[settings.memory]
    peaks: dict[str, int] = {}
    for method in wanted:
        progress(f"memory: {case}, {method}")
        arguments = {
            "method": method,
            "shape": shape,
            "dtype": settings.dtype,
            "device": settings.device,
            "seed": settings.seed,
        }
        entry = "dkl.bench.linear:step_for_memory"
        peaks[method] = peak_memory(entry, arguments, device=settings.device, threads=threads)
    row = partial(BenchRow, table=TABLE, case=case, settings=described, origin=origin)
    gradients = (shape[0] + shape[2]) * shape[1] * settings.item_size
    return rows + memory_rows(row, peaks, gradients, DENSE)


def find_loss(method: str) -> LinearLoss:
    """Return the loss with one of the names in ``METHODS``."""
    from dkl.losses.linear import linear_ikl_loss

    known: dict[str, LinearLoss] = {
        LINEAR: linear_ikl_loss,
        DENSE: partial(_dense_loss, our_ikl("auto")),
        DENSE_KL: partial(_dense_loss, eager_kl),
    }
    return known[method]


def _dense_loss(
    loss: Callable[[Tensor, Tensor], Tensor],
    input_NH: Tensor,
    weight_VH: Tensor,
    target_NH: Tensor,
    target_weight_VH: Tensor,
) -> Tensor:
    return loss(F.linear(input_NH, weight_VH), F.linear(target_NH, target_weight_VH))


def step_for_memory(
    method: str, shape: list[int], dtype: str, device: str, seed: int
) -> Callable[[], None]:
    """Prepare a step that leaves nothing behind: an entry for ``peak_memory``."""
    tensors = _random_tensors(shape, dtype, device, seed)
    step = _step(find_loss(method), tensors)

    def work() -> None:
        step()
        for tensor in tensors:
            tensor.grad = None

    return work


def _random_tensors(shape: list[int], dtype: str, device: str, seed: int) -> list[Tensor]:
    """Return hidden [N, H] and weight [V, H] of the student, then of the teacher."""
    num_rows, num_hidden, num_classes = shape
    generator = torch.Generator(device).manual_seed(seed)
    tensors = []
    for is_student in (True, False):
        for num, scale in ((num_rows, 1.0), (num_classes, num_hidden**-0.5)):
            tensor = torch.empty((num, num_hidden), device=device, dtype=DTYPES[dtype])
            tensor.normal_(0.0, scale, generator=generator)  # logits of order one
            tensors.append(tensor.requires_grad_(is_student))
    return tensors


def _step(loss: LinearLoss, tensors: list[Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        for tensor in tensors:
            tensor.grad = None
        value = loss(tensors[0], tensors[1], tensors[2], tensors[3])
        torch.autograd.backward(value)
        return value.detach()

    return step


def _agreeing_steps(settings: LinearSettings, shape: list[int]) -> dict[str, Callable[[], Tensor]]:
    tensors = _random_tensors(shape, settings.dtype, settings.device, settings.seed)
    steps = {method: _step(find_loss(method), tensors) for method in METHODS}
    values = {method: float(steps[method]()) for method in (DENSE, LINEAR)}
    check_agreement(values, settings.dtype)
    return steps
