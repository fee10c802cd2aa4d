"""Further measurements: another model's attacks, masked gradients, and features.

Shapes: N samples, D features.
"""

import os
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dkl import evaluation
from dkl.build.checks import Float32Interface
from dkl.build.image_access import some_images
from dkl.build.measuring import Row, Subject, Unit
from dkl.evaluation.penultimate import last_layer

FEATURES_FILE = "features.npz"
MAX_FEATURE_CLASSES = 20


@dataclass(frozen=True)
class Surrogate:
    """Another run's model, on which adversarial images are made.

    Args:
        model: in evaluation mode, on the device of the model that is measured.
        source: the run in words.
        weights_hash: of the model.
    """

    model: nn.Module
    source: str
    weights_hash: str


def check_units(subject: Subject, surrogate: Surrogate | None) -> Iterator[Unit]:
    """Yield the further measurements that are asked for.

    Raises:
        ValueError: what a measurement needs is missing.
    """
    settings = subject.settings
    if surrogate is not None:
        yield _transfer_unit(subject, surrogate)
    if settings.masking_checks:
        yield _masking_unit(subject)
    if settings.features > 0:
        yield _features_unit(subject)


def _transfer_unit(subject: Subject, surrogate: Surrogate) -> Unit:
    """Measure accuracy on images that were made on another model."""
    settings = subject.settings
    if settings.eps is None or not settings.pgd_steps:
        raise ValueError(
            "images of another run are made with the most of evaluation.pgd_steps at "
            "evaluation.eps, which this evaluation lacks: set both, and evaluation.step_size"
        )
    num_steps, eps = max(settings.pgd_steps), settings.eps
    label = f"images made on {surrogate.source}"
    facts = subject.attack_facts(
        measure="transfer",
        num_steps=num_steps,
        step_size=settings.step_size,
        surrogate=surrogate.weights_hash,
        source=surrogate.source,
    )

    def rows(state: Path) -> list[Row]:
        started = time.perf_counter()
        robust = evaluation.transfer_robust(
            subject.model,
            surrogate.model,
            subject.images,
            subject.labels,
            eps=eps,
            norm=settings.norm,
            num_steps=num_steps,
            step_size=settings.step_size,
            batch_size=settings.batch_size,
            seed=subject.seed,
            state_dir=state,
            progress=subject.progress_of(label),
            distributed=subject.distributed,
        )
        details = {
            "source": surrogate.source,
            "source_weights_hash": surrogate.weights_hash,
            "made_with": f"pgd_{num_steps}",
        }
        return [subject.robust_row("transfer_accuracy", robust, eps, started, details)]

    return Unit("transfer", label, facts, rows)


def _masking_unit(subject: Subject) -> Unit:
    """Look for the signs of masked gradients."""
    settings = subject.settings
    label = "checks for masked gradients"
    facts = subject.attack_facts(
        measure="masking_checks", batch_size=settings.batch_size, square=settings.square
    )

    def rows(state: Path) -> list[Row]:
        assert settings.eps is not None
        started = time.perf_counter()
        checks = evaluation.masking_checks(
            subject.model,
            subject.images,
            subject.labels,
            eps=settings.eps,
            norm=settings.norm,
            batch_size=settings.batch_size,
            seed=subject.seed,
            square=subject.flags.get("square"),
            state_dir=state,
            progress=subject.progress_of(label),
            distributed=subject.distributed,
        )
        return [
            {
                "metric": "masking_check",
                "value": float(check.passed),
                "num_samples": len(subject.images),
                "epsilon": settings.eps,
                "norm": settings.norm,
                "seconds": time.perf_counter() - started,
                "details": {
                    "check": check.name,
                    "measured": check.measured,
                    "expected": check.expected,
                    "message": check.message,
                },
            }
            for check in checks
        ]

    return Unit("masking_checks", label, facts, rows)


def _features_unit(subject: Subject) -> Unit:
    """Keep features of clean and adversarial images, and measure how compact the classes are."""
    settings, file = subject.settings, subject.run_dir / FEATURES_FILE
    inner = subject.model
    if isinstance(inner, Float32Interface):
        inner = inner.model
    classifier = last_layer(inner)  # before anything is measured: many models have none
    facts = subject.attack_facts(
        measure="features",
        images=subject.split_hash,
        per_class=settings.features,
        num_steps=max(settings.pgd_steps),
        step_size=settings.step_size,
    )
    unit = Unit(
        "features",
        "features of clean and adversarial images",
        facts,
        lambda _state: _feature_rows(subject, classifier, subject.key(unit)),
        lambda key: _features_key(file) == key,
    )
    return unit


def _feature_rows(subject: Subject, classifier: nn.Module, key: str) -> list[Row]:
    settings, started = subject.settings, time.perf_counter()
    assert settings.eps is not None
    chosen = first_of_each_class(subject.data.labels, settings.features, MAX_FEATURE_CLASSES)
    some = some_images(subject.data, chosen)
    images, labels = some.images.to(subject.device), some.labels.to(subject.device)
    adversarial_images = evaluation.pgd_images(
        subject.model,
        images,
        labels,
        eps=settings.eps,
        norm=settings.norm,
        num_steps=max(settings.pgd_steps),
        step_size=settings.step_size,
        batch_size=settings.batch_size,
        seed=subject.seed,
        sample_ids=chosen,
    )
    clean, adversarial = (
        evaluation.penultimate_features(
            subject.model, some, classifier=classifier, batch_size=settings.batch_size
        ).cpu()
        for some in (images, adversarial_images)
    )
    labels = labels.cpu()
    if subject.processes.rank == 0:
        write_arrays(
            subject.run_dir / FEATURES_FILE,
            {
                "clean": clean,
                "adversarial": adversarial,
                "labels": labels,
                "class_indices": torch.tensor(sorted(set(labels.tolist()))),
            },
            key,
        )
    both = torch.cat([clean, adversarial])
    measured = {"clean": (clean, labels), "adversarial": (adversarial, labels)}
    measured["both"] = (both, torch.cat([labels, labels]))
    seconds = time.perf_counter() - started
    return [
        row | {"seconds": seconds}
        for name, (features, own) in measured.items()
        for row in _compactness_rows(subject, name, features, own)
    ]


def _compactness_rows(subject: Subject, name: str, features: Tensor, labels: Tensor) -> list[Row]:
    """Return both measures of compactness; the attack is named where its images take part."""
    found = evaluation.compactness(features, labels)
    threat: dict[str, Any] = {}
    if name != "clean":
        threat = {"epsilon": subject.settings.eps, "norm": subject.settings.norm}
    return [
        {
            "metric": "feature_compactness",
            "value": value,
            "num_samples": len(labels),
            "details": {"images": name, "measure": measure},
            **threat,
        }
        for measure, value in (
            ("intra_inter_ratio", found.intra_inter_ratio),
            ("silhouette", found.silhouette),
        )
    ]


def first_of_each_class(labels: Tensor, per_class: int, max_classes: int) -> Tensor:
    """Return the positions of the first samples of each of the first classes, class by class.

    Example:
        >>> first_of_each_class(torch.tensor([1, 0, 1, 2, 0, 1]), per_class=2, max_classes=2)
        tensor([1, 4, 0, 2])
    """
    classes = sorted(set(labels.tolist()))[:max_classes]
    return torch.cat([(labels == index).nonzero().squeeze(1)[:per_class] for index in classes])


def write_arrays(file: Path, arrays: dict[str, Tensor], key: str) -> None:
    """Write arrays and the key of their measurement; a crash leaves the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as target:
            content: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
            np.savez(target, **content, key=np.array(key))
            target.flush()
            os.fsync(target.fileno())
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _features_key(file: Path) -> str:
    """Return the key in a file of features, "" where there is none."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return str(arrays["key"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return ""
