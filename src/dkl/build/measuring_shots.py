"""Accuracy on classes with many, medium and few training images, for long-tailed data.

Shapes: C classes.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dkl.build.measuring import Row, Subject, Unit
from dkl.data import group_accuracies, shot_groups


def shot_units(subject: Subject, train_counts_C: Tensor | None) -> Iterator[Unit]:
    """Yield the measurement of the groups of classes, where clean accuracy is asked for.

    Args:
        subject: what is measured.
        train_counts_C: [C] int64, training images of each class; None where they are not
            long-tailed.
    """
    if train_counts_C is None or not subject.settings.clean:
        return
    facts: dict[str, Any] = {
        "measure": "shots",
        "images": subject.split_hash,
        "train_counts": train_counts_C.tolist(),
        "thresholds": list(subject.settings.shot_thresholds),
    }
    label = "accuracy on classes with many, medium and few training images"
    yield Unit("shots", label, facts, partial(_shots, subject, train_counts_C))


def _shots(subject: Subject, train_counts_C: Tensor, _state: Path) -> list[Row]:
    """Return a row for each group that has test images: the share of them that is right."""
    started = time.perf_counter()
    few, many = subject.settings.shot_thresholds
    labels = subject.data.labels.cpu()
    correct = subject.clean_logits.argmax(1) == labels
    accuracies = group_accuracies(
        correct, labels, train_counts_C, many=many, few=few, average="samples"
    )
    seconds = time.perf_counter() - started
    rows: list[Row] = []
    for name, members_C in shot_groups(train_counts_C, many=many, few=few).items():
        if name in accuracies:
            sizes = train_counts_C[members_C]
            details = {
                "classes": len(sizes),
                "least": int(sizes.min()),
                "most": int(sizes.max()),
                "thresholds": [few, many],
            }
            rows.append(
                {
                    "metric": f"{name}_accuracy",
                    "value": accuracies[name],
                    "num_samples": int(members_C[labels].sum()),
                    "seconds": seconds,
                    "details": details,
                }
            )
    return rows
