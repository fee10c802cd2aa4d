"""Benchmarks: what is timed, against what, and the rows that come out; see ``dkl bench``."""

from dkl.bench.memory import MemoryMeasurementError, peak_memory
from dkl.bench.rows import BenchRow, read_rows, write_rows
from dkl.bench.timing import Timing, interleaved, percentile, ratios, time_rows

__all__ = [
    "BenchRow",
    "MemoryMeasurementError",
    "Timing",
    "interleaved",
    "peak_memory",
    "percentile",
    "ratios",
    "read_rows",
    "time_rows",
    "write_rows",
]
