"""The cost of an element against the number of classes C, at constant N * C.

All sizes and methods take turns in one run, so that a slow moment of the machine does not tilt
the line: the slope of log time per element against log C is fitted in every round.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from dkl.bench.cases import (
    MakeRow,
    Progress,
    Step,
    case_name,
    loss_memory_rows,
    usable_steps,
)
from dkl.bench.floor import ROOFLINE, CopySpeed, bytes_that_move
from dkl.bench.peers import KL, OURS
from dkl.bench.rows import BenchRow
from dkl.bench.settings import SWEEP_ELEMENTS, LossSettings
from dkl.bench.steps import random_logits
from dkl.bench.timing import Timing, interleaved, percentile, ratios
from dkl.reports.origin import provenance

_SWEPT = ("auto", "compile", "triton")


def fit_slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of log y against log x by least squares.

    Args:
        xs: positive, at least two different values.
        ys: positive, as many.

    Raises:
        ValueError: fewer than two different x.

    Example:
        >>> round(fit_slope([1, 10, 100], [2, 20, 200]), 9)
        1.0
    """
    if len(set(xs)) < 2:
        raise ValueError(f"a slope needs two different x, got {list(xs)}")
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def swept_shapes(settings: LossSettings) -> list[tuple[int, int]]:
    """Return (N, C) of the sweep, N * C as near to the wanted number as whole rows allow."""
    kind = torch.device(settings.device).type
    elements = settings.sweep_elements or SWEEP_ELEMENTS[kind]
    return [(max(1, elements // num), num) for num in settings.sweep_classes]


def swept_methods(settings: LossSettings) -> list[str]:
    """Return the methods of the sweep: eager KL and what ``auto`` may be, or what was asked for."""
    chosen = settings.chosen_backends()
    kept = chosen if settings.backends else [name for name in chosen if name in _SWEPT]
    return [KL, *(f"{OURS}{backend}" for backend in kept)]


def run_sweep(
    table: str, settings: LossSettings, copy: CopySpeed, progress: Progress
) -> list[BenchRow]:
    """Measure the sweep: rows "time_per_element", "slope" and peak memory."""
    shapes, methods = swept_shapes(settings), swept_methods(settings)
    progress(f"time: sweep over C = {', '.join(str(shape[1]) for shape in shapes)}")
    torch.compiler.reset()
    steps: dict[str, Step] = {}
    for shape in shapes:
        logits = random_logits(
            shape, settings.dtype, settings.device, target_grad=False, seed=settings.seed
        )
        usable = usable_steps(methods, *logits, progress)
        steps |= {_name(method, shape): step for method, step in usable.items()}
    timings = interleaved(
        steps, warmup=settings.warmup, rounds=settings.rounds, device=settings.device
    )
    steps.clear()  # their tensors would count as memory on a GPU
    rows = []
    for shape in shapes:
        row = _row_maker(table, settings, shape)
        rows += _element_rows(row, settings, shape, methods, timings, copy)
        if settings.memory == "all":
            rows += loss_memory_rows(row, settings, shape, methods, progress)
    if len(set(settings.sweep_classes)) > 1:
        rows += _slope_rows(table, settings, shapes, methods, timings)
    return rows


def _name(method: str, shape: tuple[int, int]) -> str:
    return f"{method}, C = {shape[1]}"


def _row_maker(table: str, settings: LossSettings, shape: tuple[int, int]) -> MakeRow:
    described = settings.describe(shape=list(shape), target_grad=False, sweep=True)
    return partial(
        BenchRow,
        table=table,
        case=case_name(shape, settings.dtype),
        settings=described,
        origin=provenance(described, device=settings.device),
    )


def _element_rows(
    row: MakeRow,
    settings: LossSettings,
    shape: tuple[int, int],
    methods: Sequence[str],
    timings: Mapping[str, Timing],
    copy: CopySpeed,
) -> list[BenchRow]:
    row = partial(row, metric="time_per_element", unit="s", repeats=settings.rounds)
    elements = shape[0] * shape[1]
    against = ratios(
        {name: timings[name] for name in timings if name.endswith(_name("", shape))},
        _name(KL, shape),
    )
    rows = []
    for method in methods:
        name = _name(method, shape)
        if name not in timings:  # did not fit the GPU's memory
            continue
        timing = timings[name]
        rows.append(
            row(
                method=method,
                value=timing.median / elements,
                low=timing.low / elements,
                high=timing.high / elements,
                baseline=KL,
                ratio=against[name][0],
                ratio_low=against[name][1],
                ratio_high=against[name][2],
            )
        )
    num_bytes = bytes_that_move(shape, settings.item_size, target_grad=False)
    median, low, high = (seconds / elements for seconds in copy.seconds_to_move(num_bytes))
    return [*rows, row(method=ROOFLINE, value=median, low=low, high=high)]


def _slope_rows(
    table: str,
    settings: LossSettings,
    shapes: Sequence[tuple[int, int]],
    methods: Sequence[str],
    timings: Mapping[str, Timing],
) -> list[BenchRow]:
    described = settings.describe(shapes=[list(shape) for shape in shapes], target_grad=False)
    origin = provenance(described, device=settings.device)
    classes = [shape[1] for shape in shapes]
    rows = []
    for method in methods:
        names = [_name(method, shape) for shape in shapes]
        if not all(name in timings for name in names):
            continue
        slopes = [
            fit_slope(
                classes,
                [
                    timings[name].seconds[number] / (shape[0] * shape[1])
                    for name, shape in zip(names, shapes, strict=True)
                ],
            )
            for number in range(settings.rounds)
        ]
        rows.append(
            BenchRow(
                table=table,
                case=f"C = {min(classes)} to {max(classes)}, constant N C",
                method=method,
                metric="slope",
                unit="1",
                value=percentile(slopes, 50),
                low=percentile(slopes, 20),
                high=percentile(slopes, 80),
                repeats=settings.rounds,
                settings=described,
                origin=origin,
            )
        )
    return rows
