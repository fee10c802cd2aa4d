"""One measured number as data: what, on what, by which method, against what, and from where."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

_NUMBERS = ("value", "low", "high", "ratio", "ratio_low", "ratio_high")


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """A median over repeats, its spread, and its ratio to a baseline of the same run.

    Args:
        table: which benchmark: "losses", "linear", "train" or "evaluate".
        case: what is worked on, for people: "[8192, 1000] float32".
        method: what does the work: "ikl, blocked".
        metric: what is measured: "time", "peak_memory", "slope", ...
        unit: "s", "bytes", "ratio", ...
        value: the median over the repeats.
        low: 20th percentile over the repeats; None where there is one value only.
        high: 80th percentile, likewise.
        repeats: how often it was measured, at least 1.
        baseline: the method that ``ratio`` divides by, measured in the same interleaved run.
        ratio: median of the ratios within rounds; None without a baseline.
        ratio_low: 20th percentile of these ratios.
        ratio_high: 80th percentile of these ratios.
        settings: everything that decides the number: shape, dtype, threads, seed, ...
        origin: ``dkl.reports.origin.provenance(settings)``.

    Raises:
        ValueError: numbers that are not finite, no repeats, or a ratio without a baseline.

    Example:
        >>> row = BenchRow(table="losses", case="[128, 10] float32", method="ikl, auto",
        ...                metric="time", unit="s", value=2e-5, repeats=15)
        >>> BenchRow.from_json(row.to_json()) == row
        True
    """

    table: str
    case: str
    method: str
    metric: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    repeats: int = 1
    baseline: str | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            number = getattr(self, name)
            missing = number is None and name != "value"
            if not missing and not (isinstance(number, int | float) and math.isfinite(number)):
                raise ValueError(f"{name} of {self._what()} needs a finite number, got {number!r}")
        if self.repeats < 1:
            raise ValueError(f"repeats of {self._what()} must be at least 1, got {self.repeats}")
        if (self.ratio is None) != (self.baseline is None):
            raise ValueError(
                f"{self._what()} needs ratio and baseline together: what the ratio divides by "
                f"and the ratio itself, got ratio {self.ratio} and baseline {self.baseline!r}"
            )

    def _what(self) -> str:
        return f"{self.table}: {self.metric} of {self.method}, {self.case}"

    def to_json(self) -> str:
        """Return the row as one line of JSON, without the line's end."""
        return json.dumps({"kind": "bench", **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "BenchRow":
        """Read a row that ``to_json`` wrote.

        Raises:
            ValueError: no JSON object, unknown or missing fields, values out of range.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("kind", None) != "bench":
            raise ValueError('a benchmark row is a JSON object with "kind": "bench"')
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown fields {unknown}; a benchmark row has {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a benchmark row: {error}") from error


def write_rows(path: Path | str, rows: Iterable[BenchRow]) -> None:
    """Write rows as JSON lines; the file appears whole or not at all, and replaces an older one.

    Args:
        path: the file; its folder is made.
        rows: any number of rows.
    """
    target = Path(path)
    text = "".join(row.to_json() + "\n" for row in rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp lets nobody else read
        Path(name).replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def read_rows(path: Path | str) -> list[BenchRow]:
    """Read the rows that ``write_rows`` wrote.

    Raises:
        ValueError: a line that is no row, with its number.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), start=1):
        try:
            rows.append(BenchRow.from_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows
