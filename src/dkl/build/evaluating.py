"""From a finished run to result rows: what its recipe says is to be measured."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkl import config, evaluation
from dkl.build.checks import measurable
from dkl.build.objects import build_data
from dkl.build.runs import checkpoint_name, device_for_evaluation, load_run_model, read_recipe
from dkl.data import ImageData
from dkl.evaluation import AttackProgress
from dkl.evaluation.accuracy import check_clean_logits
from dkl.reports import ResultRow, append_results, provenance

# Other keys of the data decide the training images, whose mean the model normalises with.
_CHANGEABLE = ("evaluation.", "data.folder=", "data.download=", "data.test_limit=")
Progress = Callable[[str, AttackProgress | None], None]
"""Called with what is being measured, and AutoAttack's state where it runs."""


def evaluate_run(
    path: Path,
    *,
    recipe_overrides: list[str] | None = None,
    which: str = "best",
    progress: Progress | None = None,
) -> list[ResultRow]:
    """Measure a run on its test data and add the rows to its results.

    Args:
        path: a run folder, or one of its checkpoints.
        recipe_overrides: ``evaluation.key=value``, and ``data.folder``, ``data.download`` and
            ``data.test_limit``, laid over the run's own recipe.
        which: "best" (chosen on the validation split) or "last".
        progress: told what is being measured.

    Returns:
        One row per number.

    Raises:
        ValueError: not a run, overrides that do not fit, or weights that do not.
    """
    run_dir, recipe = read_recipe(path)
    overrides = recipe_overrides or []
    if settled := [text for text in overrides if not text.startswith(_CHANGEABLE)]:
        raise ValueError(
            f"training has settled {', '.join(settled)}; what may be changed for an evaluation is "
            "evaluation.KEY, data.folder, data.download and data.test_limit"
        )
    changed = config.override(recipe, overrides)
    splits = build_data(changed.data, recipe.seed)
    device = device_for_evaluation()
    model, weights_hash = load_run_model(path, recipe, splits.train, which)
    if recipe.training.channels_last:
        model.to(memory_format=torch.channels_last)
    measure = _Measurement(
        model=measurable(model.to(device)),
        data=splits.test,
        settings=changed.evaluation,
        seed=recipe.seed,
        weights_hash=weights_hash,
        state_dir=run_dir / "evaluation_state",
        progress=progress,
    )
    source = provenance(config.resolved(recipe), device=device.type)
    rows = [
        ResultRow(
            run_name=recipe.name,
            seed=recipe.seed,
            checkpoint=checkpoint_name(run_dir, path, which),
            weights_hash=weights_hash,
            **source,
            **numbers,
        )
        for numbers in measure.rows()
    ]
    append_results(run_dir / "results.jsonl", rows)
    return rows


class _Measurement:
    """Runs one evaluation section on one model."""

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        settings: config.EvaluationSettings,
        seed: int,
        weights_hash: str,
        state_dir: Path,
        progress: Progress | None,
    ) -> None:
        self.model, self.data, self.settings, self.seed = model, data, settings, seed
        self.weights_hash, self.state_dir, self.on_progress = weights_hash, state_dir, progress
        self.device = next(model.parameters()).device
        count = len(data) if settings.num_images is None else settings.num_images
        self.images = data.images[:count].to(self.device)
        self.labels = data.labels[:count].to(self.device)

    def progress(self, what: str, state: AttackProgress | None) -> None:
        """Tell the caller, if it wants to know."""
        if self.on_progress is not None:
            self.on_progress(what, state)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the fields of each row, cheapest measurement first."""
        if self.settings.clean:
            yield from self._clean_rows()
        for objective, steps in (
            ("ce", self.settings.pgd_steps),
            ("margin", self.settings.cw_steps),
        ):
            for num_steps in steps:
                yield self._pgd_row(objective, num_steps)
        if self.settings.sweep:
            yield from self._sweep_rows()
        if self.settings.auto_attack is not None:
            yield self._auto_attack_row(self.settings.auto_attack)

    def _clean_rows(self) -> Iterator[dict[str, Any]]:
        """Yield clean accuracy and class margins, on the whole test split."""
        self.progress("clean accuracy", None)
        started = time.perf_counter()
        images, labels = self.data.images.to(self.device), self.data.labels.to(self.device)
        logits = evaluation.predict_logits(
            self.model, images, batch_size=self.settings.batch_size
        ).to(labels.device)
        check_clean_logits(logits, labels)
        yield {
            "metric": "clean_accuracy",
            "value": float((logits.argmax(1) == labels).double().mean()),
            "num_samples": len(self.data),
            "seconds": time.perf_counter() - started,
        }
        margins = evaluation.class_margins(logits, labels, self.data.num_classes)
        counts = evaluation.class_counts(labels, self.data.num_classes)
        for index, name in enumerate(self.data.class_names):
            if counts[index] > 0:
                yield {
                    "metric": "class_margin",
                    "value": float(margins[index]),
                    "num_samples": int(counts[index]),
                    "class_index": index,
                    "details": {"class_name": name},
                }

    def _threat(self) -> dict[str, Any]:
        return {"eps": self.settings.eps, "norm": self.settings.norm, "seed": self.seed}

    def _pgd_row(self, objective: Any, num_steps: int) -> dict[str, Any]:
        name = {"ce": "pgd", "margin": "cw"}[objective]
        self.progress(f"{name.upper()}-{num_steps}", None)
        started = time.perf_counter()
        robust = evaluation.pgd_robust(
            self.model,
            self.images,
            self.labels,
            num_steps=num_steps,
            step_size=self.settings.step_size,
            objective=objective,
            batch_size=self.settings.batch_size,
            **self._threat(),
        )
        return self._robust_row(
            f"{name}_{num_steps}_accuracy",
            robust,
            self.settings.eps,
            started,
            {"step_size": self.settings.step_size},
        )

    def _sweep_rows(self) -> Iterator[dict[str, Any]]:
        """Yield a point of the robustness curve per radius, 0 and the recipe's eps among them."""
        eps, num_steps = self.settings.eps or 0.0, max(self.settings.pgd_steps)
        radii = sorted({0.0, eps, *self.settings.sweep})
        self.progress(f"robustness curve, {len(radii)} epsilons", None)
        started = time.perf_counter()
        sweep = evaluation.epsilon_sweep(
            self.model,
            self.images,
            self.labels,
            radii,
            norm=self.settings.norm,
            attack="pgd",
            num_steps=num_steps,
            batch_size=self.settings.batch_size,
            seed=self.seed,
        )
        for radius, robust in zip(sweep.epsilons, sweep.robust, strict=True):
            yield self._robust_row(
                "epsilon_sweep_accuracy", robust, radius, started, {"attack": f"pgd_{num_steps}"}
            )

    def _auto_attack_row(self, version: Any) -> dict[str, Any]:
        started = time.perf_counter()
        # A folder for these very settings; the state itself checks weights and data.
        settings = [version, self._threat(), len(self.images), self.settings.batch_size]
        what = json.dumps([self.weights_hash, *settings])
        key = hashlib.sha256(what.encode()).hexdigest()[:16]
        result = evaluation.auto_attack(
            self.model,
            self.images,
            self.labels,
            version=version,
            batch_size=self.settings.batch_size,
            state_dir=self.state_dir / key,
            progress=lambda state: self.progress("AutoAttack", state),
            **self._threat(),
        )
        details = {
            "standard": result.standard,
            "package_version": result.package_version,
            "batch_size": result.batch_size,
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
        metric = "auto_attack_accuracy" if version == "standard" else "auto_attack_fast_accuracy"
        row = self._robust_row(metric, result.robust, self.settings.eps, started, details)
        # Batches that an earlier call finished took their time as well.
        attacking = sum(record.seconds for record in result.attacks)
        return row | {"seconds": max(row["seconds"], attacking)}

    def _robust_row(
        self,
        metric: str,
        robust: Tensor,
        eps: float | None,
        started: float,
        details: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            "metric": metric,
            "value": float(robust.double().mean()),
            "num_samples": len(robust),
            "epsilon": eps,
            "norm": self.settings.norm,
            "seconds": time.perf_counter() - started,
            "details": details,
        }
