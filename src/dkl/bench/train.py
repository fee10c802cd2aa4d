"""Time a training step of `dkl.train` against the same step written as published scripts do it.

What is timed is two ways to the same result, which ``train_agreement`` proves first. See
``train_sides`` for what the sides share, ``straightforward`` for the scripts' one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from dkl.bench.rows import BenchRow
from dkl.bench.step_profile import KINDS, PHASES, Shares
from dkl.bench.timing import Timing, interleaved, ratios, time_rows
from dkl.bench.train_agreement import (
    EXACT_SAMPLES,
    Differences,
    compare_float32,
    compare_float64,
)
from dkl.bench.train_sides import (
    BASELINE,
    CASES,
    IMAGE_GRADIENTS,
    OPTIONS,
    OURS,
    PLAIN_KD,
    Case,
    OurStep,
    ScriptStep,
    make_case,
    make_problem,
    our_settings,
)
from dkl.engine.randomness import numerics, preserved_rng
from dkl.engine.settings import LoopSettings
from dkl.reports.origin import provenance

__all__ = ["CASES", "OPTIONS", "make_sides", "run", "share_table"]

# Weights hardly move while a step is timed, so that many rounds train nothing to pieces.
TIMED_LEARNING_RATE = 1e-8

Side = OurStep | ScriptStep
Progress = Callable[[str], None]


def make_sides(case: Case, loop: LoopSettings, options: Sequence[str] = ()) -> dict[str, Side]:
    """Return every way to take the step of a case that is to be timed, by the name in its rows.

    Args:
        case: what is trained.
        loop: settings of our side.
        options: further settings of our side, from ``OPTIONS``.

    Raises:
        ValueError: an unknown option.
    """
    problem = make_problem(case, loop.seed)
    numbers = replace(case.numbers, learning_rate=TIMED_LEARNING_RATE)
    sides: dict[str, Side] = {}
    for name, changes in our_settings(options).items():
        sides[name] = OurStep(problem, numbers, case.kind, replace(loop, **changes))
        if name == OURS and case.teacher is not None:
            sides[PLAIN_KD] = OurStep(problem, numbers, "kd", loop)
    ours = sides[OURS]
    assert isinstance(ours, OurStep)
    settings: dict[str, Any] = {"seed": loop.seed, "device": ours.training.device}
    sides[BASELINE] = ScriptStep(problem, numbers, **settings)
    if case.teacher is None:
        sides[IMAGE_GRADIENTS] = ScriptStep(problem, numbers, parameter_gradients=False, **settings)
    return sides


def run(
    *,
    cases: Sequence[str] = CASES,
    quick: bool = False,
    rounds: int = 5,
    batch_size: int | None = None,
    channels_last: bool = True,
    options: Sequence[str] = (),
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[BenchRow]:
    """Compare, time and profile training steps.

    Args:
        cases: from ``CASES``: IKL-AT, IKL-AT with AWP, IKL-KD.
        quick: tiny networks and images, to see that it works; the numbers mean nothing.
        rounds: timings of each side; three times as many in distillation, whose step is shorter.
        batch_size: samples of a step; 64 by default.
        channels_last: memory format of our side.
        options: further settings under which our side is timed, from ``OPTIONS``.
        seed: of weights, images and noise.
        threads: of PyTorch; as many as it has by default.
        progress: told what is being done.

    Returns:
        Per case: "parameter_difference" (relative to the parameters), "update_difference" (to what
        the step changed) and "adversarial_difference" (share of pixels), in float32 and in float64;
        "time" of every side with its ratio to the straightforward step; "ratio_to_kd"; and on the
        CPU "share" and "phase_share" of our step's time.

    Raises:
        StepMismatchError: sides that do not end in the same place.
        ValueError: settings that do not fit.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    rows: list[BenchRow] = []
    try:
        with preserved_rng(torch.device("cpu")), numerics(deterministic=False):
            for name in cases:
                case = make_case(name, quick=quick, batch_size=batch_size)
                count = rounds * (3 if case.teacher else 1)
                bench = _CaseBench(case, seed, channels_last, progress or (lambda _: None))
                rows += bench.rows(count, options)
    finally:
        torch.set_num_threads(before)
    return rows


class _CaseBench:
    """Measures one case."""

    def __init__(self, case: Case, seed: int, channels_last: bool, progress: Progress) -> None:
        self.case, self.seed, self.progress = case, seed, progress
        self.loop = LoopSettings(
            epochs=1, batch_size=case.batch_size, seed=seed, channels_last=channels_last
        )
        self.device = "cpu"
        self._origins: dict[str, dict[str, Any]] = {}

    def rows(self, rounds: int, options: Sequence[str]) -> list[BenchRow]:
        """Compare in float64 and float32, time, profile."""
        case, loop, numbers = self.case, self.loop, self.case.numbers
        self.progress(f"{case.describe()}: comparing")
        exact = compare_float64(case, loop, options, script=numbers)
        single = {f"{OURS}, contiguous": compare_float32(case, loop, script=numbers)}
        self.progress(f"{case.describe()}: timing")
        sides = make_sides(case, loop, options)
        ours = sides[OURS]
        assert isinstance(ours, OurStep)
        self.device = ours.training.device.type
        timings = interleaved(sides, warmup=1, rounds=rounds, device=self.device)
        few = replace(case, batch_size=min(case.batch_size, EXACT_SAMPLES))
        rows = self._difference_rows(exact, few, "float64")
        rows += self._difference_rows(single, case, "float32")
        rows += self._time_rows(timings)
        if self.device == "cpu":
            rows += self._share_rows(ours.profile())
        return rows

    def _difference_rows(
        self, found: Mapping[str, Differences], case: Case, dtype: str
    ) -> list[BenchRow]:
        rows = []
        for name, values in found.items():
            metrics = {
                "parameter_difference": ("1", values.parameters),
                "update_difference": ("1", values.update),
            }
            if case.teacher is None:
                metrics["adversarial_difference"] = ("share", values.adversarial)
            rows += [
                self._row(case, dtype, name, metric, unit, value)
                for metric, (unit, value) in metrics.items()
            ]
        return rows

    def _time_rows(self, timings: Mapping[str, Timing]) -> list[BenchRow]:
        rows = time_rows(
            timings,
            table="train",
            case=f"{self.case.describe()}, float32",
            baseline=BASELINE,
            settings={},
            origin={},
        )
        rows = [self._with_source(row, self.case, "float32") for row in rows]
        if PLAIN_KD in timings:
            median, low, high = ratios(timings, PLAIN_KD)[OURS]
            row = self._row(self.case, "float32", OURS, "ratio_to_kd", "ratio", median)
            rows.append(replace(row, low=low, high=high, repeats=len(timings[OURS].seconds)))
        return rows

    def _share_rows(self, shares: Shares) -> list[BenchRow]:
        sums = {
            "share": {kind: sum(shares[phase, kind] for phase in PHASES) for kind in KINDS},
            "phase_share": {phase: sum(shares[phase, kind] for kind in KINDS) for phase in PHASES},
        }
        return [
            self._row(self.case, "float32", f"{OURS}: {part}", metric, "share", value)
            for metric, parts in sums.items()
            for part, value in parts.items()
        ]

    def _row(
        self, case: Case, dtype: str, method: str, metric: str, unit: str, value: float
    ) -> BenchRow:
        row = BenchRow(
            table="train",
            case=f"{case.describe()}, {dtype}",
            method=method,
            metric=metric,
            unit=unit,
            value=value,
        )
        return self._with_source(row, case, dtype)

    def _with_source(self, row: BenchRow, case: Case, dtype: str) -> BenchRow:
        """Return the row with settings and origin of what its method did."""
        is_script = row.method.startswith(BASELINE)
        option = row.method.removeprefix(f"{OURS}, ")
        settings = {
            **asdict(case),
            "dtype": dtype,
            "channels_last": self.loop.channels_last and not is_script,
            **OPTIONS.get(option, {}),
            "threads": torch.get_num_threads(),
            "seed": self.seed,
            "device": self.device,
        }
        key = repr(settings)
        if key not in self._origins:
            # Asks git, which takes longer than a small step.
            self._origins[key] = provenance(settings, device=self.device)
        return replace(row, settings=settings, origin=self._origins[key])


def share_table(rows: Sequence[BenchRow]) -> str:
    """Return where the time of our step goes as text, a block per case.

    Args:
        rows: what ``run`` returned; other rows than shares are passed over.

    Example:
        >>> row = BenchRow(table="train", case="ikl_at", method="dkl: batch norm", metric="share",
        ...                unit="share", value=0.125)
        >>> print(share_table([row]))
        ikl_at
          batch norm              12.5 %
    """
    lines: list[str] = []
    for row in rows:
        if row.metric not in ("share", "phase_share"):
            continue
        if row.case not in lines:
            lines.append(row.case)
        part = row.method.partition(": ")[2]
        name = f"phase {part}" if row.metric == "phase_share" else part
        lines.append(f"  {name:22} {100 * row.value:5.1f} %")
    return "\n".join(lines)
