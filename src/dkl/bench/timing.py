"""Time several functions fairly: warm, in turns, in seconds per call, with ratios within rounds.

A busy machine slows whole stretches of time. Functions that take turns within each round share
them, so that a ratio of two timings of the same round is steadier than a ratio of two medians.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from dkl.bench.rows import BenchRow

SHORTEST = 1e-3  # seconds: below it the clock and the call of the function weigh too much
_MOST_CALLS = 100_000


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, once per round and in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the rounds were faster."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """A fifth of the rounds were faster."""
        return percentile(self.seconds, 20)

    @property
    def high(self) -> float:
        """Four fifths of the rounds were faster."""
        return percentile(self.seconds, 80)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, linear between neighbours (numpy's default).

    Args:
        values: at least one number, in any order.
        percent: in [0, 100].

    Raises:
        ValueError: no values.

    Example:
        >>> percentile([4.0, 1.0, 2.0], 50), percentile([0.0, 10.0], 20)
        (2.0, 2.0)
    """
    if not values:
        raise ValueError("a percentile needs at least one value, got none")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 2,
    rounds: int = 15,
    min_seconds: float = 0.0,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time functions in turns: each once per round, the order rotated from round to round.

    Memory is freed once before, so that the C library has settled as in a process that trains.
    A function that is shorter than a millisecond is called several times within one timing, as
    often in every round; the timing is per call. Garbage is collected between rounds, not in them.

    Args:
        functions: name -> what to call; at least one.
        warmup: untimed calls of each before the first round (allocators, caches, compilers).
        rounds: timings of each, at least 1.
        min_seconds: the shortest timing, where that should be longer than a millisecond.
        device: where the work runs; "cuda" is waited for around every timing.

    Returns:
        name -> ``Timing`` with ``rounds`` values, in the order of ``functions``.

    Raises:
        ValueError: no functions, no rounds or less than no warm-up.

    Example:
        >>> timings = interleaved({"sum": lambda: sum(range(9)), "nothing": lambda: None}, rounds=3)
        >>> [(name, len(timing.seconds)) for name, timing in timings.items()]
        [('sum', 3), ('nothing', 3)]
    """
    if not functions or rounds < 1 or warmup < 0:
        raise ValueError(
            f"timing needs a function, rounds >= 1 and warmup >= 0, got {len(functions)} "
            f"functions, rounds={rounds} and warmup={warmup}"
        )
    wait = _waiter(device)
    _grow_heap()
    for _ in range(warmup):
        for function in functions.values():
            function()
    shortest = max(min_seconds, SHORTEST)
    calls = {name: _calls(function, shortest, wait) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    with _old_objects_left_alone():
        for number in range(rounds):
            first = number % len(names)
            with _no_garbage_collection():
                for name in names[first:] + names[:first]:
                    elapsed = _seconds(functions[name], calls[name], wait)
                    seconds[name].append(elapsed / calls[name])
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _grow_heap() -> None:
    """Let the C library keep memory that is freed, as it does in any process that trains.

    Until a tensor of some megabytes has been freed, glibc gives memory back to the system after
    every small one, and what is timed is page faults. 32 MiB is the largest size that it learns.
    """
    for _ in range(2):
        torch.zeros(31 << 20, dtype=torch.uint8)


def ratios(timings: Mapping[str, Timing], baseline: str) -> dict[str, tuple[float, float, float]]:
    """Return median, 20th and 80th percentile of each timing over the baseline's, round by round.

    Args:
        timings: of one run of ``interleaved``.
        baseline: one of its names.

    Raises:
        ValueError: the baseline was not timed, or timings come from different runs.

    Example:
        >>> ratios({"a": Timing((1.0, 4.0, 9.0)), "b": Timing((2.0, 4.0, 6.0))}, "b")["a"][0]
        1.0
    """
    if baseline not in timings:
        raise ValueError(f"the baseline {baseline!r} was not timed; there are {sorted(timings)}")
    below = timings[baseline].seconds
    found = {}
    for name, timing in timings.items():
        if len(timing.seconds) != len(below):
            raise ValueError(
                f"{name!r} has {len(timing.seconds)} rounds and {baseline!r} {len(below)}: "
                "ratios are within the rounds of one run"
            )
        each = [own / base for own, base in zip(timing.seconds, below, strict=True)]
        found[name] = (statistics.median(each), percentile(each, 20), percentile(each, 80))
    return found


def time_rows(
    timings: Mapping[str, Timing],
    *,
    table: str,
    case: str,
    baseline: str,
    settings: dict[str, Any],
    origin: dict[str, Any],
) -> list[BenchRow]:
    """Return one row with metric "time" per timing, with ratios to the baseline.

    Args:
        timings: of one run of ``interleaved``.
        table: see ``BenchRow``, as are ``case``, ``settings`` and ``origin``.
        case: what was worked on.
        baseline: one of the names of ``timings``.
        settings: what decides the numbers.
        origin: ``provenance(settings)``.
    """
    against = ratios(timings, baseline)
    return [
        BenchRow(
            table=table,
            case=case,
            method=name,
            metric="time",
            unit="s",
            value=timing.median,
            low=timing.low,
            high=timing.high,
            repeats=len(timing.seconds),
            baseline=baseline,
            ratio=against[name][0],
            ratio_low=against[name][1],
            ratio_high=against[name][2],
            settings=settings,
            origin=origin,
        )
        for name, timing in timings.items()
    ]


def _waiter(device: str) -> Callable[[], None]:
    if torch.device(device).type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


def _seconds(function: Callable[[], object], calls: int, wait: Callable[[], None]) -> float:
    wait()
    start = perf_counter()
    for _ in range(calls):
        function()
    wait()
    return perf_counter() - start


def _calls(function: Callable[[], object], shortest: float, wait: Callable[[], None]) -> int:
    """Return how many calls take as long as a timing must; the first calls are warm-up too."""
    calls = 1
    while calls < _MOST_CALLS:
        elapsed = _seconds(function, calls, wait)
        if elapsed >= shortest:
            break
        # Grows at most tenfold a step: the first timings of a very short call are noise.
        wanted = calls * shortest / max(elapsed, 1e-9)
        calls = min(_MOST_CALLS, calls * 10, max(calls + 1, int(1.2 * wanted)))
    return calls


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Make the collections between rounds quick: a compiler leaves a million objects behind."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
