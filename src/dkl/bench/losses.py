"""``dkl bench losses``: forward and backward of IKL against KL and against IKL's published forms.

Shapes: N rows, C classes. For each case all methods take turns on the same logits; beside them
stand what the arithmetic and the bytes cost at least (``floor.py``).
"""

from collections.abc import Mapping
from functools import partial

import torch

from dkl.bench.cases import (
    MakeRow,
    Progress,
    Step,
    case_name,
    is_form_of_ours,
    loss_memory_rows,
    usable_steps,
)
from dkl.bench.floor import (
    COPY_BYTES,
    ROOFLINE,
    TWO_EXPS,
    CopySpeed,
    bytes_that_move,
    measure_copy,
)
from dkl.bench.peers import KL, PAIRWISE, method_names
from dkl.bench.rows import BenchRow
from dkl.bench.settings import LossSettings
from dkl.bench.steps import random_logits, torch_threads, two_exps
from dkl.bench.sweep import run_sweep
from dkl.bench.timing import Timing, interleaved, ratios, time_rows
from dkl.reports.origin import provenance

TABLE = "losses"


def run(settings: LossSettings, progress: Progress = lambda _: None) -> list[BenchRow]:
    """Measure all cases, then the sweep over C.

    Args:
        settings: what to measure.
        progress: told what is being measured, in words.

    Returns:
        Rows with metrics "time" (of a step, ratio to eager KL), "copy_bandwidth_share" (roofline
        over time), "ratio_to_pairwise", "peak_memory" (beyond the inputs),
        "peak_memory_beyond_gradients", and "bandwidth" of copying; from the sweep
        "time_per_element", "slope" and memory.
    """
    rows = []
    with torch_threads(settings.threads):
        for target_grad in (False, True) if settings.target_grad else (False,):
            for shape in settings.shapes:
                rows += _case_rows(settings, shape, target_grad, progress)
        if settings.sweep_classes:
            rows += run_sweep(TABLE, settings, _copy_speed(settings), progress)
    return rows


def _copy_speed(settings: LossSettings) -> CopySpeed:
    kind = torch.device(settings.device).type
    return measure_copy(settings.device, settings.copy_bytes or COPY_BYTES[kind], settings.rounds)


def _case_rows(
    settings: LossSettings, shape: tuple[int, int], target_grad: bool, progress: Progress
) -> list[BenchRow]:
    case = case_name(shape, settings.dtype, target_grad)
    described = settings.describe(shape=list(shape), target_grad=target_grad)
    origin = provenance(described, device=settings.device)
    row = partial(BenchRow, table=TABLE, case=case, settings=described, origin=origin)
    progress(f"time: {case}")
    copy = _copy_speed(settings)
    # In a function of its own: on a GPU these tensors would count as memory.
    timings = _case_timings(settings, shape, target_grad, progress)
    rows = time_rows(
        timings, table=TABLE, case=case, baseline=KL, settings=described, origin=origin
    )
    num_bytes = bytes_that_move(shape, settings.item_size, target_grad=target_grad)
    rows += _floor_rows(row, timings, copy, num_bytes)
    if PAIRWISE in timings:
        rows += _pairwise_rows(row, timings)
    methods = [name for name in timings if name != TWO_EXPS]
    return rows + loss_memory_rows(row, settings, shape, methods, progress, target_grad=target_grad)


def _case_timings(
    settings: LossSettings, shape: tuple[int, int], target_grad: bool, progress: Progress
) -> dict[str, Timing]:
    torch.compiler.reset()  # each case is compiled for its own shape
    logits = random_logits(
        shape, settings.dtype, settings.device, target_grad=target_grad, seed=settings.seed
    )
    methods = method_names(
        shape,
        backends=settings.chosen_backends(),
        device=settings.device,
        item_size=settings.item_size,
        target_grad=target_grad,
        compile=settings.compile,
    )
    steps: dict[str, Step] = usable_steps(methods, *logits, progress)
    steps[TWO_EXPS] = two_exps(*logits)
    return interleaved(
        steps, warmup=settings.warmup, rounds=settings.rounds, device=settings.device
    )


def _floor_rows(
    row: MakeRow, timings: Mapping[str, Timing], copy: CopySpeed, num_bytes: int
) -> list[BenchRow]:
    """Return the copy's bandwidth, the roofline, and how near each method comes to it."""
    median, low, high = copy.seconds_to_move(num_bytes)
    moved = 2 * copy.num_bytes
    row = partial(row, repeats=len(copy.timing.seconds))
    rows = [
        row(
            method="copy",
            metric="bandwidth",
            unit="bytes/s",
            value=copy.bandwidth,
            low=moved / copy.timing.high,
            high=moved / copy.timing.low,
        ),
        # Copied before the rounds of the methods, not in them: copying a large tensor would clear
        # the caches for the method that comes next. So the ratio is one of medians.
        row(
            method=ROOFLINE,
            metric="time",
            unit="s",
            value=median,
            low=low,
            high=high,
            baseline=KL,
            ratio=median / timings[KL].median,
        ),
    ]
    return rows + [
        row(
            method=name,
            metric="copy_bandwidth_share",
            unit="ratio",
            value=median / timing.median,
            low=median / timing.high,
            high=median / timing.low,
        )
        for name, timing in timings.items()
        if name != TWO_EXPS
    ]


def _pairwise_rows(row: MakeRow, timings: Mapping[str, Timing]) -> list[BenchRow]:
    return [
        row(
            method=name,
            metric="ratio_to_pairwise",
            unit="ratio",
            value=median,
            low=low,
            high=high,
            repeats=len(timings[name].seconds),
        )
        for name, (median, low, high) in ratios(timings, PAIRWISE).items()
        if is_form_of_ours(name)
    ]
