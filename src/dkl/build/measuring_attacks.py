"""Measurements of accuracy: clean, under each attack, at the worst of them, and over the radius."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dkl import evaluation
from dkl.build.measuring import Row, Subject, Unit
from dkl.evaluation import AutoAttackResult
from dkl.evaluation.accuracy import check_clean_logits

Objective = Literal["ce", "margin"]


def accuracy_units(subject: Subject) -> Iterator[Unit]:
    """Yield the measurements of accuracy that the settings ask for, in the order of a table."""
    settings = subject.settings
    if settings.clean:
        facts = {"measure": "clean", "images": subject.split_hash}
        yield Unit("clean", "clean accuracy", facts, partial(_clean, subject))
    attacks = list(_attack_units(subject))
    yield from attacks
    if len(attacks) > 1:
        yield _worst_case_unit(subject, attacks)
    if attacks:
        yield _class_robust_unit(subject, attacks)
    yield from _sweep_units(subject, attacks)


def _clean(subject: Subject, _state: Path) -> list[Row]:
    """Return clean accuracy, margins and accuracies of classes, on the whole test split."""
    started = time.perf_counter()
    data, logits, labels = subject.data, subject.clean_logits, subject.data.labels
    check_clean_logits(logits, labels)
    rows: list[Row] = [
        {
            "metric": "clean_accuracy",
            "value": float((logits.argmax(1) == labels).double().mean()),
            "num_samples": len(data),
            "seconds": time.perf_counter() - started,
        }
    ]
    num_classes = logits.shape[1]
    margins = evaluation.class_margins(logits, labels, num_classes)
    accuracies = evaluation.per_class_accuracy(logits, labels, num_classes)
    rows += _class_rows(subject, "class_margin", margins, labels, {})
    rows += _class_rows(subject, "class_accuracy", accuracies, labels, {})
    return rows


def _class_rows(
    subject: Subject, metric: str, values: Tensor, labels: Tensor, fields: dict[str, Any]
) -> list[Row]:
    """Return a row for each class that has samples."""
    data = subject.data
    counts = evaluation.class_counts(labels, data.num_classes)
    details = fields.get("details", {})
    return [
        {
            **fields,
            "metric": metric,
            "value": float(values[index]),
            "num_samples": int(counts[index]),
            "class_index": index,
            "details": {"class_name": name, **details},
        }
        for index, name in enumerate(data.class_names)
        if counts[index] > 0
    ]


def _attack_units(subject: Subject) -> Iterator[Unit]:
    """Yield the attacks at the settings' radius."""
    settings = subject.settings
    by_gradient: tuple[tuple[str, Objective, tuple[int, ...]], ...] = (
        ("pgd", "ce", settings.pgd_steps),
        ("cw", "margin", settings.cw_steps),
    )
    for name, objective, steps in by_gradient:
        for num_steps in steps:
            yield Unit(
                f"{name}_{num_steps}",
                f"{name.upper()}-{num_steps}",
                subject.attack_facts(
                    measure="pgd",
                    objective=objective,
                    num_steps=num_steps,
                    step_size=settings.step_size,
                ),
                partial(_pgd, subject, objective, num_steps),
            )
    if settings.auto_attack is not None:
        name = "auto_attack" if settings.auto_attack == "standard" else "auto_attack_fast"
        yield _auto_attack_unit(subject, name, settings.auto_attack, "AutoAttack")
    if settings.square:
        yield _auto_attack_unit(subject, "square", "square", "Square alone")


def _pgd(subject: Subject, objective: Objective, num_steps: int, state: Path) -> list[Row]:
    """Return the row of PGD or CW."""
    settings, started = subject.settings, time.perf_counter()
    assert settings.eps is not None
    name = "pgd" if objective == "ce" else "cw"
    robust = evaluation.pgd_robust(
        subject.model,
        subject.images,
        subject.labels,
        eps=settings.eps,
        norm=settings.norm,
        num_steps=num_steps,
        step_size=settings.step_size,
        objective=objective,
        batch_size=settings.batch_size,
        seed=subject.seed,
        state_dir=state,
        progress=subject.progress_of(f"{name.upper()}-{num_steps}"),
        distributed=subject.distributed,
    )
    details = {"step_size": settings.step_size}
    metric = f"{name}_{num_steps}_accuracy"
    return [subject.robust_row(metric, robust, settings.eps, started, details)]


def _auto_attack_unit(
    subject: Subject, name: str, version: Literal["standard", "fast", "square"], label: str
) -> Unit:
    facts = subject.attack_facts(
        measure="auto_attack", version=version, batch_size=subject.settings.batch_size
    )

    def rows(state: Path) -> list[Row]:
        settings, started = subject.settings, time.perf_counter()
        assert settings.eps is not None
        result = evaluation.auto_attack(
            subject.model,
            subject.images,
            subject.labels,
            eps=settings.eps,
            norm=settings.norm,
            version=version,
            batch_size=settings.batch_size,
            seed=subject.seed,
            state_dir=state,
            progress=subject.progress_of(label),
            distributed=subject.distributed,
        )
        details = _auto_attack_details(result)
        row = subject.robust_row(f"{name}_accuracy", result.robust, settings.eps, started, details)
        # Batches that an earlier call finished took their time as well.
        return [row | {"seconds": max(row["seconds"], result.seconds)}]

    return Unit(name, label, facts, rows)


def _auto_attack_details(result: AutoAttackResult) -> dict[str, Any]:
    """Return what a reader of an AutoAttack number wants to know."""
    return {
        "standard": result.standard,
        "package_version": result.package_version,
        "batch_size": result.batch_size,
        "arithmetic": result.arithmetic,
        "notes": list(result.notes),
        "attacks": [
            {
                "name": record.name,
                "num_attacked": record.num_attacked,
                "robust_accuracy": record.robust_accuracy,
                "seconds": record.seconds,
                "n_restarts": record.n_restarts,
                "n_targets": record.n_targets,
            }
            for record in result.attacks
        ],
    }


def _worst_case_unit(subject: Subject, attacks: list[Unit]) -> Unit:
    """Count a sample that every attack left: the worst case of each, not the lowest accuracy."""

    def rows(_state: Path) -> list[Row]:
        started = time.perf_counter()
        names = [unit.name for unit in attacks]
        robust = torch.stack([subject.flags[name] for name in names]).all(dim=0)
        eps, details = subject.settings.eps, {"attacks": names}
        return [subject.robust_row("worst_case_accuracy", robust, eps, started, details)]

    facts = {"measure": "worst_case", "attacks": [subject.key(unit) for unit in attacks]}
    return Unit("worst_case", "worst case of all attacks", facts, rows)


def _class_robust_unit(subject: Subject, attacks: list[Unit]) -> Unit:
    """Take the strongest attack class by class: AutoAttack, else the one that broke the most."""

    def rows(_state: Path) -> list[Row]:
        names = [unit.name for unit in attacks]
        ensembles = [name for name in names if name.startswith("auto_attack")]
        attack = min(ensembles or names, key=lambda name: int(subject.flags[name].sum()))
        labels = subject.labels.cpu()
        counts = evaluation.class_counts(labels, subject.data.num_classes)
        survivors = labels[subject.flags[attack]]
        left = evaluation.class_counts(survivors, subject.data.num_classes)
        fields = {
            "epsilon": subject.settings.eps,
            "norm": subject.settings.norm,
            "details": {"attack": attack},
        }
        accuracies = left / counts.clamp(min=1)
        return _class_rows(subject, "class_robust_accuracy", accuracies, labels, fields)

    facts = {"measure": "class_robust", "attacks": [subject.key(unit) for unit in attacks]}
    return Unit("class_robust", "accuracy of classes under attack", facts, rows)


def _sweep_units(subject: Subject, attacks: list[Unit]) -> Iterator[Unit]:
    """Yield a measurement for each radius of the robustness curve, ascending.

    Radius 0 and the settings' own are among them; the latter takes the flags that the same attack
    has at that radius already.
    """
    settings = subject.settings
    if not settings.sweep:
        return
    name = {
        "pgd": f"pgd_{max(settings.pgd_steps, default=0)}",
        "cw": f"cw_{max(settings.cw_steps, default=0)}",
    }.get(settings.sweep_attack, settings.sweep_attack)
    own = next((unit for unit in attacks if unit.name == name), None)
    radii = sorted({0.0, settings.eps or 0.0, *settings.sweep})
    for index, radius in enumerate(radii):
        is_own = own is not None and radius == settings.eps
        facts = subject.attack_facts(
            measure="sweep",
            attack=name,
            step_size=settings.step_size if name.startswith(("pgd", "cw")) else None,
            batch_size=settings.batch_size if name.startswith("auto") else None,
            radii=radii[: index + 1],
            own=own is not None and radius >= (settings.eps or 0.0),
        )
        label = f"robustness curve, epsilon {radius:.4g} ({index + 1} of {len(radii)})"
        yield Unit(
            f"sweep_{radius!r}",
            label,
            facts,
            partial(_sweep_point, subject, name, radii[: index + 1], name if is_own else "", label),
        )


def _sweep_point(
    subject: Subject, attack: str, radii: list[float], own: str, label: str, state: Path
) -> list[Row]:
    """Return the row of the last of some radii, those before it having been measured.

    Args:
        subject: what is measured.
        attack: name of the attack, with its steps.
        radii: ascending.
        own: the measurement that has this radius's flags, or "".
        label: for the progress.
        state: folder for what is finished.
    """
    settings, started = subject.settings, time.perf_counter()
    steps: dict[str, Any] = {}
    if settings.sweep_attack in ("pgd", "cw"):
        assert settings.eps is not None
        assert settings.step_size is not None
        steps = {
            "num_steps": int(attack.partition("_")[2]),
            "relative_step": settings.step_size / settings.eps,
        }
    known = {radius: subject.flags[f"sweep_{radius!r}"] for radius in radii[:-1]}
    if own:
        known[radii[-1]] = subject.flags[own]
    sweep = evaluation.epsilon_sweep(
        subject.model,
        subject.images,
        subject.labels,
        radii[-1:],
        norm=settings.norm,
        attack=settings.sweep_attack,
        batch_size=settings.batch_size,
        seed=subject.seed,
        known=known,
        state_dir=state,
        progress=subject.progress_of(label),
        distributed=subject.distributed,
        **steps,
    )
    details = {"attack": attack}
    return [
        subject.robust_row("epsilon_sweep_accuracy", sweep.robust[0], radii[-1], started, details)
    ]
