"""What the benchmarks of losses share: a case in words, steps that run, rows of peak memory.

Shapes: N rows, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dkl.bench.memory import RESOLUTION, peak_memory
from dkl.bench.peers import EXPANDED, KL, KL_COMPILED, OURS, PAIRWISE, find_loss
from dkl.bench.rows import BenchRow
from dkl.bench.settings import LossSettings
from dkl.bench.steps import loss_step

Progress = Callable[[str], None]
Step = Callable[[], Any]
MakeRow = Callable[..., BenchRow]
"""Makes a row of one case from the fields that differ within it."""

# Relative. The published forms are as exact as this where logits have no offset, as here.
_TOLERANCES = {"float32": 1e-3, "float64": 1e-6}


def case_name(shape: tuple[int, int], dtype: str, target_grad: bool = False) -> str:
    """Return a case in words.

    Example:
        >>> case_name((128, 10), "float32", target_grad=True)
        '[128, 10] float32, target gradient'
    """
    return f"[{shape[0]}, {shape[1]}] {dtype}{', target gradient' if target_grad else ''}"


def usable_steps(
    methods: Sequence[str], input_NC: Tensor, target_NC: Tensor, progress: Progress
) -> dict[str, Step]:
    """Return the step of each method, called once, so that what is compiled is compiled now.

    Compiled KL is left out, with a message, where it cannot be compiled, and any method where its
    tensors do not fit the GPU's memory.

    Raises:
        RuntimeError: forms of IKL that do not return the same loss.
    """
    steps: dict[str, Step] = {}
    values: dict[str, float] = {}
    for name in methods:
        step = loss_step(find_loss(name), input_NC, target_NC)
        try:
            values[name] = float(step())
        except Exception as error:
            if name != KL_COMPILED and not isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            progress(f"left out: {name}, {list(input_NC.shape)}: {reason}")
            continue
        steps[name] = step
    same = {name: value for name, value in values.items() if name.startswith(OURS)}
    check_agreement(same, str(input_NC.dtype).removeprefix("torch."))
    return steps


def check_agreement(values: Mapping[str, float], dtype: str) -> None:
    """Refuse to time a wrong result; half precision is too coarse to tell.

    Args:
        values: method -> loss, of methods that compute the same one.
        dtype: of the logits.

    Raises:
        RuntimeError: the losses differ, or are not finite.
    """
    if dtype not in _TOLERANCES or not values:
        return
    first = next(iter(values.values()))
    tolerance = _TOLERANCES[dtype] * max(1.0, abs(first))
    # Written so that NaN fails too.
    if not all(abs(value - first) <= tolerance for value in values.values()):
        raise RuntimeError(f"these should all be the same loss, but are {dict(values)}")


def loss_memory_rows(
    row: MakeRow,
    settings: LossSettings,
    shape: tuple[int, int],
    methods: Sequence[str],
    progress: Progress,
    *,
    target_grad: bool = False,
) -> list[BenchRow]:
    """Measure the peak memory of methods on a case, as many as ``settings.memory`` asks for."""
    wanted = [name for name in methods if settings.memory == "all" or name in (KL, f"{OURS}auto")]
    peaks: dict[str, int] = {}
    for name in [] if settings.memory == "none" else wanted:
        progress(f"memory: {case_name(shape, settings.dtype, target_grad)}, {name}")
        arguments = {
            "method": name,
            "shape": list(shape),
            "dtype": settings.dtype,
            "device": settings.device,
            "target_grad": target_grad,
            "seed": settings.seed,
        }
        peaks[name] = peak_memory(
            "dkl.bench.steps:step_for_memory",
            arguments,
            device=settings.device,
            threads=torch.get_num_threads(),
        )
    gradients = (2 if target_grad else 1) * shape[0] * shape[1] * settings.item_size
    return memory_rows(row, peaks, gradients, KL)


def memory_rows(
    row: MakeRow, peaks: Mapping[str, int], gradients: int, baseline: str
) -> list[BenchRow]:
    """Return rows of peak memory beyond the inputs, and beyond the gradients as well.

    Args:
        row: makes a row of the case.
        peaks: method -> bytes beyond the inputs.
        gradients: bytes of the gradients, which every method has to return.
        baseline: the method whose memory the ratios divide by, where it has at least 1 MiB.
    """
    rows = []
    for metric, counted in (("peak_memory", 0), ("peak_memory_beyond_gradients", gradients)):
        beyond = {name: max(0, peak - counted) for name, peak in peaks.items()}
        base = beyond.get(baseline, 0)
        for name, value in beyond.items():
            compared = {}
            if base >= RESOLUTION:  # below it a ratio would be noise over noise
                compared = {"baseline": baseline, "ratio": value / base}
            rows.append(row(method=name, metric=metric, unit="bytes", value=value, **compared))
    return rows


def is_form_of_ours(method: str) -> bool:
    """Tell our backends from the published forms of IKL."""
    return method.startswith(OURS) and method not in (PAIRWISE, EXPANDED)
