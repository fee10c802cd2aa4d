"""From a recipe to a trained run, and the same for a user's own method, model and data."""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dkl import config, evaluation
from dkl.build.cached_teachers import open_cached_teacher
from dkl.build.checks import check_classes, count_logits, measurable
from dkl.build.image_access import LabelledImages, first_images, predict_all
from dkl.build.methods import build_method, build_second_model
from dkl.build.objects import (
    MakeOptimizer,
    Splits,
    build_augment,
    build_average,
    build_data,
    build_loop_settings,
    build_mix,
    build_model,
    build_momentum_schedule,
    build_optimizer,
    build_perturbation,
    build_schedule,
    build_source,
    build_views,
)
from dkl.build.runs import RECIPE_FILE, write_text
from dkl.build.teachers import (
    TEACHER_FOLDER,
    load_teacher,
    teacher_settings,
    teaching_recipe,
)
from dkl.data import Augment, DatasetSource, ImageData
from dkl.engine import FitResult, LoopSettings, fit, schedules
from dkl.engine.averaging import AverageSettings
from dkl.engine.batches import Mix
from dkl.engine.state import has_checkpoint
from dkl.evaluation.accuracy import check_clean_logits
from dkl.methods.protocol import Method

logger = logging.getLogger(__name__)
Validate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class TrainOutcome:
    """Where a training command ended; see ``FitResult``."""

    run_dir: Path
    stopped_early: bool
    best_metric: str | None
    best_value: float | None
    seconds: float


def train_recipe(
    recipe: config.Recipe, out: Path, *, resume: bool = False, validate: bool = True
) -> TrainOutcome:
    """Train what a recipe describes into a run folder.

    Args:
        recipe: the checked recipe.
        out: the run folder; must not hold a run unless ``resume``.
        resume: go on from the last checkpoint.
        validate: False leaves validation out, where a few steps are to be timed.

    Returns:
        Where training ended.

    Raises:
        ValueError: whatever does not fit, before any work is lost.
    """
    started = time.perf_counter()
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    splits = build_data(recipe.data, recipe.seed)
    _refuse_other_run(out, resume)
    model = build_model(recipe.model, splits.train, recipe.seed)
    check_classes(model, splits.train)
    if _is_first_process() and not has_checkpoint(out):
        # Of a run that has begun the file stays: resuming may still be refused.
        write_text(out / RECIPE_FILE, config.to_yaml(recipe))
    try:
        teacher = _build_teacher(recipe, out, splits.train)
    except _TeacherStoppedError:
        return TrainOutcome(out, True, None, None, time.perf_counter() - started)
    method = build_method(
        recipe.method,
        splits.train.num_classes,
        recipe.training.epochs,
        teacher,
        build_second_model(recipe.method, splits.train, recipe.seed),
        num_views=len(recipe.data.views),
        student=model,
        data=splits.train,
        seed=recipe.seed,
    )
    result = fit(
        method,
        model,
        build_source(recipe.data, splits, recipe.training.batch_size, out),
        settings=build_loop_settings(recipe),
        out_dir=out,
        make_optimizer=build_optimizer(recipe.optimizer),
        schedule=build_schedule(recipe.schedule, recipe.training.epochs),
        momentum_schedule=build_momentum_schedule(recipe.schedule, recipe.training.epochs),
        views=build_views(recipe.data),
        mix=build_mix(recipe.data.augment),
        augment=build_augment(recipe.data.augment),
        validate=_validation(recipe, splits) if validate else None,
        weight_perturbation=build_perturbation(recipe.weight_perturbation),
        weight_average=build_average(recipe.averaging),
        recipe=_deciding(recipe),
        resume=resume and has_checkpoint(out),
    )
    _write_class_table(out, method, splits.train)
    return TrainOutcome(
        run_dir=out,
        stopped_early=result.stopped_early,
        best_metric=result.best_metric,
        best_value=result.best_value,
        seconds=time.perf_counter() - started,
    )


def _deciding(recipe: config.Recipe) -> dict[str, Any]:
    """Return what a resumed run must share: all but how many processes decode images."""
    values = config.resolved(recipe)
    for key in ("workers", "prefetch"):
        (values["data"]["decoding"] or {}).pop(key, None)
    return values


class _TeacherStoppedError(Exception):
    """A signal ended the training of the teacher; a half-trained one must not teach."""


def _refuse_other_run(out: Path, resume: bool) -> None:
    """Refuse before a teacher is trained, and before the recipe file is replaced."""
    if resume and not has_checkpoint(out) and not (out / RECIPE_FILE).is_file():
        raise ValueError(f"{out} holds no run to go on with; start it without --resume")
    if not resume and has_checkpoint(out):
        raise ValueError(
            f"{out} already holds a run; add --resume to go on with it, or choose another --out"
        )


def _build_teacher(recipe: config.Recipe, out: Path, data: LabelledImages) -> nn.Module | None:
    """Load the teacher that the method names, trained first where it is named by recipe.

    With a cache of its answers there is nothing to train or load.
    """
    settings = teacher_settings(recipe)
    if settings is None:
        return None
    if settings.cache is not None:
        assert isinstance(data, ImageData)  # a recipe with images in files has no cache
        return open_cached_teacher(recipe, Path(settings.cache), data)
    if settings.checkpoint is None and settings.run is None:
        run = out / TEACHER_FOLDER
        teaching = teaching_recipe(recipe)
        logger.info("training the teacher %s into %s", teaching.name, run)
        if train_recipe(teaching, run, resume=has_checkpoint(run)).stopped_early:
            raise _TeacherStoppedError
    return load_teacher(recipe, out, data).model


def _validation(recipe: config.Recipe, splits: Splits) -> Validate | None:
    """Return what is measured on the held-out part after an epoch."""
    if splits.validation is None:
        return None
    settings, data = recipe.evaluation, splits.validation
    attacked = None
    if settings.validation_attack_steps > 0:
        # Of images in files not more are kept in memory than an evaluation attacks.
        attacked = first_images(data, settings.num_images if recipe.data.in_files else None)

    def validate(model: nn.Module) -> dict[str, float]:
        values = {"val_accuracy": _accuracy(model, data, settings.batch_size)}
        if attacked is not None and settings.eps is not None:
            device = next(model.parameters()).device
            robust = evaluation.pgd_robust(
                measurable(model),
                attacked.images.to(device),
                attacked.labels.to(device),
                eps=settings.eps,
                norm=settings.norm,
                num_steps=settings.validation_attack_steps,
                step_size=settings.step_size,
                objective=settings.validation_attack,
                batch_size=settings.batch_size,
                seed=recipe.seed,
            )
            values["val_robust_accuracy"] = float(robust.double().mean())
        return values

    return validate


def _accuracy(model: nn.Module, data: LabelledImages, batch_size: int) -> float:
    if not isinstance(data, ImageData):
        # Decoding is what takes the time: processes share it.
        logits_NC = predict_all(
            measurable(model),
            data,
            batch_size=batch_size,
            distributed=torch.distributed.is_available() and torch.distributed.is_initialized(),
        )
        check_clean_logits(logits_NC, data.labels)
        return float((logits_NC.argmax(1) == data.labels).double().mean())
    device = next(model.parameters()).device
    return evaluation.accuracy(
        measurable(model), data.images.to(device), data.labels.to(device), batch_size=batch_size
    )


def _write_class_table(out: Path, method: Method, data: LabelledImages) -> None:
    statistics = getattr(getattr(method, "term", None), "statistics", None)
    if statistics is not None and _is_first_process():
        table = statistics.table.detach().cpu().double()
        content = {"table": table.tolist(), "class_names": list(data.class_names)}
        write_text(out / "class_table.json", json.dumps(content))


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def train(
    method: Method,
    model: nn.Module,
    train_data: ImageData | Dataset[Any],
    val_data: ImageData | Dataset[Any] | None = None,
    *,
    out: str | Path,
    epochs: int,
    batch_size: int = 128,
    optimizer: MakeOptimizer | None = None,
    schedule: schedules.Schedule | None = None,
    augment: Augment | None = None,
    views: Sequence[Augment] = (),
    mix: Mix | None = None,
    validate: Validate | None = None,
    averaging: AverageSettings | None = None,
    weight_perturbation: Any = None,
    resume: bool = False,
    **settings: Any,
) -> FitResult:
    """Train a model of your own with any method: what ``dkl train`` does, from Python.

    Args:
        method: such as ``dkl.methods.ikl_at(...)``.
        model: images in [0, 1] in, logits [N, C] out; trained in place.
        train_data: ``ImageData``, or a map-style torch Dataset of (image [C, H, W], label).
        val_data: likewise, to choose the best checkpoint; never the test data.
        out: the run folder: records, checkpoints, TensorBoard events.
        epochs: passes over the training data.
        batch_size: samples of one optimiser step over all processes.
        optimizer: makes an optimiser from parameters; default SGD, lr 0.1, momentum 0.9, weight
            decay 5e-4.
        schedule: progress in epochs -> factor of the learning rate; default: cosine to zero.
        augment: works on whole batches; see ``dkl.data.make_augment``.
        views: augmentations of further views, for methods that train on several.
        mix: mixes pairs of images and their labels, such as ``dkl.data.cutmix``.
        validate: model -> named values; default: ``val_accuracy`` on ``val_data``.
        averaging: moving average of the weights; it is validated in the model's place.
        weight_perturbation: ``dkl.attacks.AdversarialWeightPerturbation``.
        resume: go on from the last checkpoint in ``out``.
        settings: further fields of ``dkl.engine.LoopSettings`` (seed, mixed_precision, ...).

    Returns:
        Where the checkpoints are and which is best.

    Raises:
        ValueError: whatever does not fit, before any work is lost.

    Example:
        >>> import tempfile, dkl
        >>> from dkl.data import load_data
        >>> digits, test = load_data("digits")
        >>> few = digits.subset(torch.arange(64))
        >>> model = dkl.models.create_model("convnet_small", 10, in_channels=1)
        >>> with tempfile.TemporaryDirectory() as out:
        ...     result = train(dkl.methods.NaturalTraining(), model, few, test, out=out, epochs=1)
        >>> result.epochs_done
        1
    """
    if validate is None and val_data is not None:
        validate = _default_validation(val_data, model, batch_size)
    return fit(
        method,
        model,
        _as_source(train_data, model),
        settings=LoopSettings(epochs=epochs, batch_size=batch_size, **settings),
        out_dir=Path(out),
        make_optimizer=optimizer or _default_optimizer,
        schedule=schedule or schedules.cosine(epochs),
        augment=augment,
        views=views,
        mix=mix,
        validate=validate,
        weight_perturbation=weight_perturbation,
        weight_average=averaging,
        resume=resume,
    )


def _default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def _as_source(data: ImageData | Dataset[Any], model: nn.Module) -> ImageData | DatasetSource:
    """Return the data as batches whose images and labels fit the model."""
    if isinstance(data, ImageData):
        check_classes(model, data)
        return data
    return DatasetSource(data, num_classes=count_logits(model, DatasetSource(data)))


def _default_validation(
    data: ImageData | Dataset[Any], model: nn.Module, batch_size: int
) -> Validate:
    source = _as_source(data, model)
    if isinstance(source, ImageData):
        return lambda model: {"val_accuracy": _accuracy(model, source, batch_size)}

    def validate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        indices, correct = torch.arange(len(source)), list[Tensor]()
        for images, labels in source.batches(torch.split(indices, batch_size), device):
            float_images = images.float() if images.is_floating_point() else images
            logits = evaluation.predict_logits(
                measurable(model), float_images, batch_size=batch_size
            )
            correct.append(logits.argmax(1).to(labels.device) == labels)
        return {"val_accuracy": float(torch.cat(correct).double().mean())}

    return validate
