"""From a finished run, or a file of weights, to result rows: what a recipe wants measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkl import config, evaluation
from dkl.build.checks import check_classes, measurable
from dkl.build.measuring import Ledger, Progress, Subject, measure
from dkl.build.measuring_attacks import accuracy_units
from dkl.build.measuring_checks import Surrogate, check_units
from dkl.build.measuring_predictions import MeasuredTeacher, prediction_units
from dkl.build.measuring_shots import shot_units
from dkl.build.objects import Splits, build_data, build_model
from dkl.build.runs import (
    RECIPE_FILE,
    checkpoint_name,
    device_for_evaluation,
    hash_weights,
    load_run_model,
    read_recipe,
    write_text,
)
from dkl.build.teachers import load_teacher
from dkl.engine.settings import LoopSettings
from dkl.engine.setup import make_accelerator
from dkl.evaluation import Processes
from dkl.models import load_checkpoint
from dkl.reports import ResultRow, provenance
from dkl.reports.origin import settings_hash

# Other keys of the data decide the training images, whose mean the model normalises with.
_CHANGEABLE = (
    "evaluation.",
    "data.folder=",
    "data.download=",
    "data.test_limit=",
    "data.decoding.workers=",
    "data.decoding.prefetch=",
    "method.teacher.run=",
)
# Training validates under the same norm as the evaluation, which need not bind a finished model.
_NO_VALIDATION = ("training.best_metric=null", "evaluation.validation_attack_steps=0")
RESULTS_FILE = "results.jsonl"


def evaluate_run(
    path: Path,
    *,
    recipe_overrides: list[str] | None = None,
    which: str = "best",
    progress: Progress | None = None,
    transfer_from: Path | None = None,
    again: bool = False,
    distributed: bool = False,
) -> list[ResultRow]:
    """Measure a run on its test data and add the rows to its results.

    Rows are written as they are measured. What is in the results already, of the same weights,
    images and settings, is not measured again; an attack that was cut short goes on.

    Args:
        path: a run folder, or one of its checkpoints.
        recipe_overrides: ``evaluation.key=value``, and ``data.folder``, ``data.download``,
            ``data.test_limit`` and ``method.teacher.run``, laid over the run's own recipe.
        which: "best" (chosen on the validation split) or "last".
        progress: told what is being measured.
        transfer_from: another run of the same data, or one of its checkpoints, on whose model
            adversarial images are made as well.
        again: measure anew what was measured before.
        distributed: share the work with the other processes that torchrun started, which all call
            this alike; the first one writes, all get the rows.

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
            "evaluation.KEY, data.folder, data.download, data.test_limit and method.teacher.run"
        )
    changed = _changed(recipe, overrides)
    processes, device = _processes_and_device(distributed)
    splits = build_data(changed.data, recipe.seed)
    model, weights_hash = load_run_model(path, recipe, splits.train, which)
    measured = _Measured(
        model,
        weights_hash,
        recipe=changed,
        settings_of=recipe,
        checkpoint=checkpoint_name(run_dir, path, which),
        folder=run_dir,
    )
    return _measure(
        measured, splits, processes, device, progress, transfer_from=transfer_from, again=again
    )


def evaluate_weights(
    file: Path,
    recipe: config.Recipe,
    *,
    recipe_overrides: list[str] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    transfer_from: Path | None = None,
    again: bool = False,
    distributed: bool = False,
) -> list[ResultRow]:
    """Measure a bare file of weights as a recipe says, which names its architecture and data.

    Args:
        file: weights in any of the formats of ``dkl.models.load_checkpoint``.
        recipe: model, normalisation, test data, seed and evaluation are taken from it.
        recipe_overrides: ``evaluation.key=value``, laid over the recipe.
        out: folder for the results, which becomes one that `dkl compare` and `dkl report` read;
            None: ``NAME_evaluation`` beside the file.
        progress: told what is being measured.
        transfer_from: see ``evaluate_run``.
        again: measure anew what was measured before.
        distributed: see ``evaluate_run``.

    Returns:
        One row per number.

    Raises:
        ValueError: weights that cannot be read or do not fit, overrides that do not, or a folder
            that holds the results of another recipe.
    """
    overrides = recipe_overrides or []
    if others := [text for text in overrides if not text.startswith("evaluation.")]:
        raise ValueError(f"{', '.join(others)} belongs in the recipe; give evaluation.KEY here")
    changed = _changed(recipe, overrides)
    folder = out if out is not None else file.with_name(f"{file.stem}_evaluation")
    processes, device = _processes_and_device(distributed)
    splits = build_data(recipe.data, recipe.seed)
    model = build_model(recipe.model, splits.train, recipe.seed)
    load_checkpoint(model, file)
    weights_hash = hash_weights(model.state_dict())
    check_classes(model.eval(), splits.test)
    processes.first(lambda: _claim_folder(folder, recipe))
    measured = _Measured(
        model,
        weights_hash,
        recipe=changed,
        settings_of=recipe,
        checkpoint=file.name,
        folder=folder,
    )
    return _measure(
        measured, splits, processes, device, progress, transfer_from=transfer_from, again=again
    )


def _changed(recipe: config.Recipe, overrides: list[str]) -> config.Recipe:
    """Return what is to be measured, free of what only training minds."""
    given = {text.partition("=")[0].strip() for text in overrides}
    free = [text for text in _NO_VALIDATION if text.partition("=")[0] not in given]
    return config.override(recipe, [*overrides, *free])


@dataclass(frozen=True)
class _Measured:
    """A model, where it comes from, and where its results go."""

    model: nn.Module
    weights_hash: str
    recipe: config.Recipe
    settings_of: config.Recipe
    checkpoint: str
    folder: Path


def _measure(
    measured: _Measured,
    splits: Splits,
    processes: Processes,
    device: torch.device,
    progress: Progress | None,
    *,
    transfer_from: Path | None,
    again: bool,
) -> list[ResultRow]:
    """Measure a model as its recipe says and write the rows down."""
    recipe = measured.recipe
    subject = Subject(
        model=_placed(measured.model, recipe, device),
        data=splits.test,
        settings=recipe.evaluation,
        seed=recipe.seed,
        weights_hash=measured.weights_hash,
        run_dir=measured.folder,
        on_progress=progress,
        processes=processes,
    )
    surrogate = None
    if transfer_from is not None:
        surrogate = _surrogate(transfer_from, recipe, device)
    # Made before the first measurement, so that what is missing is found before the work begins.
    units = [
        *accuracy_units(subject),
        *shot_units(subject, _train_counts(recipe, splits)),
        *prediction_units(subject, _teacher(measured, splits, device)),
        *check_units(subject, surrogate),
    ]
    identity: Mapping[str, Any] = {
        "run_name": recipe.name,
        "seed": recipe.seed,
        "checkpoint": measured.checkpoint,
        "weights_hash": measured.weights_hash,
        **provenance(config.resolved(measured.settings_of), device=device.type),
    }
    ledger = Ledger(measured.folder / RESULTS_FILE, identity, processes, again=again)
    return measure(units, subject, ledger)


def _processes_and_device(distributed: bool) -> tuple[Processes, torch.device]:
    """Join the other processes, if there are any, and return them and this one's device."""
    if not distributed:
        return Processes(), device_for_evaluation()
    device: torch.device = make_accelerator(LoopSettings(epochs=1, batch_size=1)).device
    return Processes.of_this_run(distributed=torch.distributed.is_initialized()), device


def _placed(model: nn.Module, recipe: config.Recipe, device: torch.device) -> nn.Module:
    """Return a model on its device, in the memory format of its training, ready for attacks."""
    return _on_device(model, device, channels_last=recipe.training.channels_last)


def _on_device(model: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return measurable(model.to(device).eval())


def _train_counts(recipe: config.Recipe, splits: Splits) -> Tensor | None:
    """Return the training images of each class where these are long-tailed."""
    if not recipe.data.is_long_tailed:
        return None
    return evaluation.class_counts(splits.train.labels.cpu(), splits.train.num_classes)


def _teacher(measured: _Measured, splits: Splits, device: torch.device) -> MeasuredTeacher | None:
    """Load the teacher of a run where its student is to be compared with it."""
    if not measured.recipe.evaluation.fidelity:
        return None
    found = load_teacher(measured.recipe, measured.folder, splits.train)
    check_classes(found.model, splits.test)
    model = _on_device(found.model, device, channels_last=found.channels_last)
    return MeasuredTeacher(model, found.source, found.weights_hash)


def _surrogate(path: Path, recipe: config.Recipe, device: torch.device) -> Surrogate:
    """Load the model of another run, on which adversarial images are made."""
    run_dir, other = read_recipe(path)
    if other.data.name != recipe.data.name:
        raise ValueError(
            f"{path} was trained on {other.data.name}, and {recipe.data.name} is measured here: "
            "choose a run of the same data"
        )
    which = "last" if other.training.best_metric is None else "best"
    places = {"folder": recipe.data.folder, "download": recipe.data.download}
    own = build_data(other.data.model_copy(update=places), other.seed)
    model, weights_hash = load_run_model(path, other, own.train, which)
    name = checkpoint_name(run_dir, path, which)
    source = f"{other.name}, seed {other.seed}, {name} checkpoint"
    return Surrogate(_placed(model, other, device), source, weights_hash)


def _claim_folder(folder: Path, recipe: config.Recipe) -> None:
    """Make the folder of a weight file's results, or check that it is one for this recipe.

    Raises:
        ValueError: the folder holds something else.
    """
    file = folder / RECIPE_FILE
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds other files and no {RECIPE_FILE}: choose another --out"
            )
        write_text(file, config.to_yaml(recipe))
        return
    there = config.load_recipe(file)
    if settings_hash(config.resolved(there)) != settings_hash(config.resolved(recipe)):
        raise ValueError(
            f"{folder} holds the results of another recipe (see {file}): give its settings, or "
            "choose another --out"
        )
