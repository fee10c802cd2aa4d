"""Result rows on disk, and run folders read back."""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dkl.reports.origin import provenance, settings_hash

__all__ = ["ResultRow", "Run", "RunError", "append_results", "provenance", "read_run"]

logger = logging.getLogger(__name__)
# Details that say what was measured: a sweep under PGD does not replace one under AutoAttack.
_DISTINGUISHING = ("attack", "source", "check", "images", "measure", "method")
# Numbers that are no fractions, or none below zero; others lie between -1 and 1.
_RANGES = {
    "expected_calibration_error": (0.0, 1.0),
    "teacher_agreement": (0.0, 1.0),
    "negative_log_likelihood": (0.0, math.inf),
    "teacher_kl": (0.0, math.inf),
    "seconds_per_iteration": (0.0, math.inf),
    "extra_parameters": (0.0, math.inf),
}


class RunError(ValueError):
    """A folder or file that is not the run or the records it was taken for."""


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One measured number, with what is needed to trust and to repeat it.

    Args:
        run_name: name of the recipe.
        seed: seed of the run.
        metric: "clean_accuracy", "pgd_20_accuracy", "auto_attack_accuracy", "class_margin", ...
        value: a fraction in [0, 1] for accuracies, agreement and calibration error, in [-1, 1] for
            margins and silhouettes, a finite number for a ratio of distances (from 0 for
            likelihoods, divergences, seconds and counts); never percent.
        num_samples: how many samples it was measured on.
        settings_hash: see ``settings_hash``.
        epsilon: attack budget, None without attack.
        norm: "Linf" or "L2", None without attack.
        split: which data, usually "test".
        checkpoint: "best" or "last".
        class_index: for per-class metrics.
        weights_hash: identifies the weights that were measured.
        versions: package -> version.
        commit: commit of the dkl checkout, if any.
        device: machine in words.
        time: ISO time of the measurement.
        seconds: how long it took.
        details: anything else, JSON values only; "attack", "source", "check", "images", "measure"
            and "method" tell apart measurements that share a metric.

    Raises:
        ValueError: values out of range.

    Example:
        >>> row = ResultRow(run_name="digits_kd", seed=0, metric="clean_accuracy", value=0.98,
        ...                 num_samples=200, settings_hash="00")
        >>> ResultRow.from_json(row.to_json()) == row
        True
    """

    run_name: str
    seed: int
    metric: str
    value: float
    num_samples: int
    settings_hash: str
    epsilon: float | None = None
    norm: str | None = None
    split: str = "test"
    checkpoint: str = "best"
    class_index: int | None = None
    weights_hash: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    device: str = ""
    time: str = ""
    seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.details, Mapping):
            raise ValueError(f"details need a mapping, got {self.details!r}")
        low, high = self._range()
        known = isinstance(self.value, (int, float)) and math.isfinite(self.value)
        if not known or not low <= self.value <= high:
            wanted, hint = f"a fraction in [{low:g}, 1]", "; divide percentages by 100"
            if high > 1:
                wanted, hint = f"a finite number of at least {low:g}", ""
            raise ValueError(f"{self.metric} needs {wanted}, got {self.value!r}{hint}")
        if not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ValueError(f"num_samples needs an integer of at least 1, got {self.num_samples}")
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"epsilon needs a finite number of at least 0, got {self.epsilon}")

    def _range(self) -> tuple[float, float]:
        """Return what the value may be at least and at most."""
        if self.details.get("measure") == "intra_inter_ratio":
            return -1.0, math.inf
        whole = (0.0 if self.metric.endswith("_accuracy") else -1.0, 1.0)
        return _RANGES.get(self.metric, whole)

    @property
    def measures(self) -> tuple[object, ...]:
        """What is measured: rows that agree in it repeat the same measurement."""
        return (
            self.metric,
            self.norm,
            self.epsilon,
            self.class_index,
            self.split,
            self.checkpoint,
            self.settings_hash,
            *(str(self.details.get(key)) for key in _DISTINGUISHING),
        )

    def to_json(self) -> str:
        """Return the row as one line of JSON, without the line's end."""
        return json.dumps({"kind": "result", **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "ResultRow":
        """Read a row that ``to_json`` wrote.

        Raises:
            ValueError: no JSON object, unknown or missing fields, values out of range.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("kind", None) != "result":
            raise ValueError('a result row is a JSON object with "kind": "result"')
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown fields {unknown}; a result row has {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a result row: {error}") from error


@dataclass(frozen=True)
class Run:
    """A run folder in memory; see ``read_run``."""

    path: Path
    recipe: Mapping[str, Any]
    epochs: tuple[Mapping[str, Any], ...]
    steps: tuple[Mapping[str, Any], ...]
    results: tuple[ResultRow, ...]
    class_table: tuple[tuple[float, ...], ...] | None
    class_names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return str(self.recipe["name"])

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.recipe.get("seed", 0))

    @property
    def settings_hash(self) -> str:
        """Hash of the recipe without its seed."""
        return settings_hash(self.recipe)


def append_results(path: Path | str, rows: Iterable[ResultRow]) -> None:
    """Append rows to a results file so that a crash can cost the last line at most.

    The rows go out in one write of whole lines, followed by fsync. What an earlier crash left of an
    unfinished last line is removed first.

    Args:
        path: a results.jsonl; made where it is missing (its folder must exist).
        rows: what to append, in order.

    Example:
        >>> import tempfile
        >>> row = ResultRow(run_name="digits_kd", seed=0, metric="clean_accuracy", value=0.98,
        ...                 num_samples=200, settings_hash="00")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append_results(Path(folder) / "results.jsonl", [row, row])
        ...     len((Path(folder) / "results.jsonl").read_text().splitlines())
        2
    """
    data = "".join(row.to_json() + "\n" for row in rows).encode()
    if not data:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    with os.fdopen(descriptor, "r+b") as file:
        whole, line_end, rest = file.read().rpartition(b"\n")
        length = len(whole + line_end)
        if rest and _is_json(rest):
            length, data = length + len(rest), b"\n" + data
        file.truncate(length)
        file.seek(length)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_run(path: Path | str, *, with_steps: bool = False) -> Run:
    """Read a run folder.

    Of repeated measurements (same metric, threat, split, checkpoint and settings) and of repeated
    epochs (after a resume) the latest row is kept. A half-written last line is dropped with a
    warning.

    Args:
        path: the folder that holds recipe.yaml.
        with_steps: read step rows too; there are many of them.

    Returns:
        The run.

    Raises:
        RunError: no run in that folder, or files in it that cannot be read.
    """
    folder = Path(path)
    recipe = _read_recipe(folder)
    latest: dict[tuple[object, ...], ResultRow] = {}
    for where, line in _read_lines(folder / "results.jsonl"):
        try:
            row = ResultRow.from_json(line)
        except ValueError as error:
            raise RunError(f"{where}: {error}") from error
        latest.pop(row.measures, None)  # the order is that of the rows that stay
        latest[row.measures] = row
    epochs: dict[int, Mapping[str, Any]] = {}
    steps: dict[int, Mapping[str, Any]] = {}
    for where, line in _read_lines(folder / "records.jsonl"):
        record = json.loads(line)
        try:
            if record["kind"] == "epoch":
                epochs[int(record["epoch"])] = record
            elif record["kind"] == "step" and with_steps:
                steps[int(record["step"])] = record
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where}: not a training record ({error!r})") from error
    table, names = _read_class_table(folder / "class_table.json")
    return Run(
        path=folder,
        recipe=recipe,
        epochs=tuple(epochs[epoch] for epoch in sorted(epochs)),
        steps=tuple(steps[step] for step in sorted(steps)),
        results=tuple(latest.values()),
        class_table=table,
        class_names=names or _names_in_results(latest.values()),
    )


def _read_recipe(folder: Path) -> Mapping[str, Any]:
    import yaml

    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {what}; a run is a folder made by `dkl train`")
    file = folder / "recipe.yaml"
    if not file.is_file():
        message = f"{folder} is not a run: it has no recipe.yaml"
        if inside := sorted(str(child.parent) for child in folder.glob("*/recipe.yaml")):
            shown = ", ".join(inside[:4]) + (", ..." if len(inside) > 4 else "")
            message += f"; it contains {len(inside)} runs, name them instead: {shown}"
        raise RunError(message)
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{file} is not readable YAML: {error}") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("name"), str):
        raise RunError(f"{file} is not a resolved recipe: it needs a mapping with a name")
    return recipe


def _read_lines(file: Path) -> list[tuple[str, str]]:
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        if _is_json(line):
            kept.append((where, line.decode()))
        elif number == len(lines):  # no line end follows: the write was cut short
            logger.warning("%s: dropped a half-written line", where)
        else:
            raise RunError(f"{where}: not JSON; remove the line, or restore the file")
    return kept


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _read_class_table(
    file: Path,
) -> tuple[tuple[tuple[float, ...], ...] | None, tuple[str, ...]]:
    if not file.exists():
        return None, ()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        table = tuple(tuple(float(value) for value in row) for row in content["table"])
        names = tuple(str(name) for name in content.get("class_names") or ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{file} is not a class table: {error!r}") from error
    if not table or any(len(row) != len(table) for row in table):
        raise RunError(f"{file}: a class table has as many columns as rows, got {len(table)} rows")
    if names and len(names) != len(table):
        raise RunError(f"{file}: {len(names)} class names for {len(table)} classes")
    return table, names


def _names_in_results(rows: Iterable[ResultRow]) -> tuple[str, ...]:
    """Return class names that per-class rows carry in their details, if they do for all classes."""
    names = {row.class_index: row.details.get("class_name") for row in rows}
    names.pop(None, None)
    ordered = [names.get(index) for index in range(len(names))]
    return tuple(str(name) for name in ordered) if all(ordered) else ()
