"""Measurements one after the other: each is written down when it is done, and not made twice.

Shapes: N samples, C classes or channels.
"""

import base64
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dkl import config
from dkl.build.image_access import LabelledImages, first_images, hash_images, predict_all
from dkl.data import ImageData
from dkl.engine.recorder import read_rows
from dkl.evaluation import AttackProgress, Processes
from dkl.reports import ResultRow, append_results

Row = dict[str, Any]
"""Fields of a ``ResultRow`` that belong to a measurement alone."""

Progress = Callable[[str, AttackProgress | None], None]
"""Called with what is being measured, and where an attack stands while one runs."""

# Changes where the same settings give other numbers than before.
_KEY_FORMAT = 1
STATE_FOLDER = "evaluation_state"


@dataclass(frozen=True)
class Unit:
    """A measurement: rows that are made together.

    Args:
        name: unique in an evaluation; per-sample flags of the measurement are found under it.
        label: for the progress.
        facts: what decides the numbers beside the weights, JSON values only; a hash of the images
            is one of them.
        rows: makes the rows; given a folder for what it has finished, which is removed once the
            rows are written.
        is_whole: given the measurement's key, whether what it leaves beside its rows is there.
    """

    name: str
    label: str
    facts: Mapping[str, Any]
    rows: Callable[[Path], list[Row]]
    is_whole: Callable[[str], bool] = lambda _key: True


@dataclass
class Subject:
    """What is measured, and how.

    Args:
        model: in evaluation mode, on its device.
        data: the test split.
        settings: what is to be measured.
        seed: of the attacks.
        weights_hash: of the model.
        run_dir: where features are written, and unfinished attacks while they run.
        on_progress: told what is measured.
        processes: who shares the work.
        flags: [N] bool on the CPU, which samples survive the attacks that were measured so far.
    """

    model: nn.Module
    data: LabelledImages
    settings: config.EvaluationSettings
    seed: int
    weights_hash: str
    run_dir: Path
    on_progress: Progress | None = None
    processes: Processes = field(default_factory=Processes)
    flags: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def distributed(self) -> bool:
        """Whether several processes share the work."""
        return self.processes.count > 1

    @cached_property
    def attacked(self) -> ImageData:
        """The images that are attacked, in memory."""
        return first_images(self.data, self.settings.num_images)

    @cached_property
    def images(self) -> Tensor:
        """The images that are attacked, on the device."""
        return self.attacked.images.to(self.device)

    @cached_property
    def labels(self) -> Tensor:
        """Their labels, on the device."""
        return self.attacked.labels.to(self.device)

    @cached_property
    def attacked_hash(self) -> str:
        """Hash of the images that are attacked, and of their labels."""
        return hash_images(self.data, self.settings.num_images)

    @cached_property
    def split_hash(self) -> str:
        """Hash of the whole test split."""
        return hash_images(self.data)

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits of the whole test split, on the CPU; all processes ask for them alike."""
        return self.logits_of(self.model)

    def logits_of(self, model: nn.Module) -> Tensor:
        """Return another model's logits of the whole test split, on the CPU."""
        return predict_all(
            model,
            self.data,
            batch_size=self.settings.batch_size,
            distributed=self.distributed,
        )

    def key(self, unit: Unit) -> str:
        """Return the hash of what decides a measurement's numbers."""
        facts = {
            "format": _KEY_FORMAT,
            "weights": self.weights_hash,
            **unit.facts,
        }
        text = json.dumps(facts, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def attack_facts(self, **facts: Any) -> dict[str, Any]:
        """Return the facts of an attack at the settings' radius, with others."""
        return {
            "images": self.attacked_hash,
            "eps": self.settings.eps,
            "norm": self.settings.norm,
            "seed": self.seed,
            **facts,
        }

    def progress_of(self, label: str) -> Callable[[AttackProgress], None]:
        """Return what an attack is to call after every batch."""
        return lambda state: self.tell(label, state)

    def tell(self, label: str, state: AttackProgress | None = None) -> None:
        """Tell the caller, if it wants to know."""
        if self.on_progress is not None:
            self.on_progress(label, state)

    def robust_row(
        self,
        metric: str,
        robust: Tensor,
        eps: float | None,
        started: float,
        details: Mapping[str, Any],
    ) -> Row:
        """Return the row of an attack, with the flag of every sample."""
        return {
            "metric": metric,
            "value": float(robust.double().mean()),
            "num_samples": len(robust),
            "epsilon": eps,
            "norm": self.settings.norm,
            "seconds": time.perf_counter() - started,
            "details": {**details, "robust": pack_flags(robust)},
        }


class Ledger:
    """The results of a run: what was measured before, and where new rows go.

    Args:
        file: the results; made where it is missing.
        identity: fields that all rows share.
        processes: the first one reads and writes.
        again: measure anew what was measured before.
    """

    def __init__(
        self, file: Path, identity: Mapping[str, Any], processes: Processes, *, again: bool = False
    ) -> None:
        self.file, self.identity, self.processes = file, identity, processes
        known = processes.first(lambda: [] if again else _read_results(file))
        wanted = {name: identity[name] for name in ("checkpoint", "weights_hash", "settings_hash")}
        self._rows: dict[str, list[ResultRow]] = {}
        for row in known:
            if all(getattr(row, name) == value for name, value in wanted.items()):
                self._rows.setdefault(str(row.details.get("key")), []).append(row)

    def find(self, key: str) -> list[ResultRow] | None:
        """Return the rows of a measurement, or None where they are not all there."""
        rows = self._rows.get(key, [])
        count = int(rows[-1].details["rows"]) if rows else 0
        # A crash may have cut off the end of them.
        return rows[-count:] if 0 < count <= len(rows) else None

    def add(self, key: str, rows: Iterable[Row]) -> list[ResultRow]:
        """Write down the rows of a measurement, all in one go."""
        rows = list(rows)
        mark = {"key": key, "rows": len(rows)}
        made = [
            ResultRow(**self.identity, **row | {"details": {**row.get("details", {}), **mark}})
            for row in rows
        ]
        self.processes.first(lambda: append_results(self.file, made))
        return made


def measure(units: Iterable[Unit], subject: Subject, ledger: Ledger) -> list[ResultRow]:
    """Make the measurements that were not made before, and return the rows of all.

    Args:
        units: in order; each may use the flags of those before it.
        subject: what is measured.
        ledger: the results of the run.

    Returns:
        One row per number.
    """
    found = []
    for unit in units:
        rows = _rows_of(unit, subject, ledger)
        if "robust" in rows[0].details:
            packed = str(rows[0].details["robust"])
            subject.flags[unit.name] = unpack_flags(packed, rows[0].num_samples)
        found += rows
    return found


def _rows_of(unit: Unit, subject: Subject, ledger: Ledger) -> list[ResultRow]:
    """Return the rows of a measurement, made now or before."""
    key = subject.key(unit)
    rows = ledger.find(key)
    state_dir = subject.run_dir / STATE_FOLDER
    if rows is None or not subject.processes.first(lambda: unit.is_whole(key)):
        subject.tell(unit.label)
        rows = ledger.add(key, unit.rows(state_dir / key))
    # Here and not above: a crash may have come between the rows and this.
    if subject.processes.rank == 0 and state_dir.is_dir():
        shutil.rmtree(state_dir / key, ignore_errors=True)
        if not any(state_dir.iterdir()):
            state_dir.rmdir()
    return rows


def _read_results(file: Path) -> list[ResultRow]:
    """Read all rows of a results file, also those that later ones replace."""
    if not file.exists():
        return []
    return [ResultRow.from_json(json.dumps(row)) for row in read_rows(file)]


def pack_flags(flags_N: Tensor) -> str:
    """Write flags as text, eight to a byte.

    Example:
        >>> pack_flags(torch.tensor([True, False, True])), unpack_flags("oA==", 3)
        ('oA==', tensor([ True, False,  True]))
    """
    return base64.b64encode(np.packbits(flags_N.cpu().numpy()).tobytes()).decode()


def unpack_flags(text: str, count: int) -> Tensor:
    """Read the flags that ``pack_flags`` wrote."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=count).astype(bool))
