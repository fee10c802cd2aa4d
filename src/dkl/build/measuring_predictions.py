"""Measurements of predictions for clean images: calibration, and fidelity to a teacher.

Shapes: N samples, C classes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dkl import evaluation
from dkl.build.measuring import Row, Subject, Unit
from dkl.evaluation.calibration import NUM_BINS


@dataclass(frozen=True)
class MeasuredTeacher:
    """The teacher of the model that is measured.

    Args:
        model: in evaluation mode, on the device of the student.
        source: where it comes from, in words.
        weights_hash: of the model.
    """

    model: nn.Module
    source: str
    weights_hash: str


def prediction_units(subject: Subject, teacher: MeasuredTeacher | None) -> Iterator[Unit]:
    """Yield the measurements of predictions that are asked for.

    Args:
        subject: what is measured.
        teacher: of the model; needed where the settings ask for fidelity.
    """
    if subject.settings.calibration:
        facts: dict[str, Any] = {
            "measure": "calibration",
            "images": subject.split_hash,
            "num_bins": NUM_BINS,
        }
        yield Unit("calibration", "calibration", facts, partial(_calibration, subject))
    if subject.settings.fidelity:
        assert teacher is not None
        facts = {
            "measure": "fidelity",
            "images": subject.split_hash,
            "teacher": teacher.weights_hash,
            "source": teacher.source,
        }
        label = f"fidelity to {teacher.source}"
        yield Unit("fidelity", label, facts, partial(_fidelity, subject, teacher))


def _calibration(subject: Subject, _state: Path) -> list[Row]:
    """Return calibration error, likelihood and the bins of the reliability diagram."""
    started = time.perf_counter()
    logits, labels = subject.clean_logits, subject.data.labels
    found = evaluation.reliability(logits, labels)
    likelihood = evaluation.negative_log_likelihood(logits, labels)
    common = {"num_samples": len(labels), "seconds": time.perf_counter() - started}
    bins = {
        "confidence": found.confidence.tolist(),
        "accuracy": found.accuracy.tolist(),
        "count": found.count.tolist(),
    }
    return [
        {
            **common,
            "metric": "expected_calibration_error",
            "value": found.expected_calibration_error,
            "details": {"num_bins": NUM_BINS},
        },
        {**common, "metric": "negative_log_likelihood", "value": likelihood},
        # Mean confidence minus accuracy; what the diagram draws is in the details.
        {**common, "metric": "reliability", "value": found.overconfidence, "details": bins},
    ]


def _fidelity(subject: Subject, teacher: MeasuredTeacher, _state: Path) -> list[Row]:
    """Return how often the student agrees with its teacher, and how far its predictions are."""
    started = time.perf_counter()
    found = evaluation.fidelity(subject.clean_logits, subject.logits_of(teacher.model))
    common = {
        "num_samples": len(subject.data),
        "seconds": time.perf_counter() - started,
        "details": {"teacher": teacher.source, "teacher_weights_hash": teacher.weights_hash},
    }
    return [
        {**common, "metric": "teacher_agreement", "value": found.agreement},
        {**common, "metric": "teacher_kl", "value": found.kl},
    ]
