"""The whole recipe, and what its sections demand from each other."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from dkl.config.base import Problem, Section
from dkl.config.data import DataSettings, ModelSettings
from dkl.config.distillation import FEATURE_METHODS
from dkl.config.evaluation import SHOT_THRESHOLDS, EvaluationSettings
from dkl.config.method import MethodSettings
from dkl.config.training import (
    AveragingSettings,
    OneCycle,
    OptimizerSettings,
    ScheduleSettings,
    Step,
    TrainingSettings,
    WeightPerturbationSettings,
)
from dkl.config.tuning import TuningSettings


class Recipe(Section):
    """Everything that decides a run.

    Args:
        name: letters, digits, "_", "-" and "."; names the run's folder.
        description: one sentence for ``dkl recipes list``.
        seed: of initialisation, data order, augmentation, attacks and splits.
        data: the dataset.
        model: the network.
        method: what is trained.
        training: how long and in what numbers.
        optimizer: its settings.
        schedule: of the learning rate.
        weight_perturbation: AWP, or null.
        averaging: moving average of the weights, or null.
        evaluation: what is measured.
        trackers: where records go besides the run's own files.
        tuning: what ``dkl tune`` searches, or null.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: DataSettings
    model: ModelSettings
    method: MethodSettings
    training: TrainingSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    weight_perturbation: WeightPerturbationSettings | None = None
    averaging: AveragingSettings | None = None
    evaluation: EvaluationSettings = EvaluationSettings()
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = (
        "tensorboard",
    )
    tuning: TuningSettings | None = None

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return section_problems(sections)


def section_problems(sections: dict[str, Any]) -> Iterator[Problem]:
    """Yield what sections demand from each other, as far as those at hand can tell.

    Args:
        sections: valid sections by name; a check that needs another one is left out.
    """
    for needed, check in _CHECKS:
        if all(name in sections for name in needed):
            yield from check(*(sections[name] for name in needed))


def _robust_validation(
    training: TrainingSettings, evaluation: EvaluationSettings
) -> Iterator[Problem]:
    if training.best_metric == "val_robust_accuracy" and evaluation.validation_attack_steps == 0:
        yield (
            "training.best_metric",
            "val_robust_accuracy needs an attack on the validation split: set "
            "evaluation.validation_attack_steps (10, for example), or choose val_accuracy",
        )


def _validation_split(training: TrainingSettings, data: DataSettings) -> Iterator[Problem]:
    if training.best_metric is not None and not data.has_validation:
        yield (
            "data.validation_fraction",
            f"must be > 0, because training.best_metric ({training.best_metric}) is measured "
            "on the held-out part; or set training.best_metric=null",
        )


def _validation_attack(data: DataSettings, evaluation: EvaluationSettings) -> Iterator[Problem]:
    if evaluation.validation_attack_steps > 0 and not data.has_validation:
        yield (
            "evaluation.validation_attack_steps",
            "would be ignored: data.validation_fraction is 0, so there is nothing to validate on",
        )


def _epochs(training: TrainingSettings, schedule: ScheduleSettings) -> Iterator[Problem]:
    if isinstance(schedule, Step) and schedule.milestones[-1] >= training.epochs:
        yield (
            "schedule.milestones",
            f"must be below training.epochs ({training.epochs}), or they are never reached",
        )
    if isinstance(schedule, OneCycle):
        if schedule.per_epoch and schedule.pct_start * training.epochs <= 1:
            yield (
                "schedule.per_epoch",
                f"leaves less than an epoch to go up: pct_start {schedule.pct_start:g} of "
                f"{training.epochs} epochs; set it false, or train longer",
            )
    elif schedule.warmup_epochs >= training.epochs:
        yield "schedule.warmup_epochs", f"must be below training.epochs ({training.epochs})"


def _perturbation_epochs(
    training: TrainingSettings, perturbation: WeightPerturbationSettings | None
) -> Iterator[Problem]:
    if perturbation is not None and perturbation.start_epoch >= training.epochs:
        yield (
            "weight_perturbation.start_epoch",
            f"must be below training.epochs ({training.epochs}), or weights are never perturbed",
        )


def _averaging_epochs(
    training: TrainingSettings, averaging: AveragingSettings | None
) -> Iterator[Problem]:
    if averaging is not None and averaging.start_epoch >= training.epochs:
        yield (
            "averaging.start_epoch",
            f"must be below training.epochs ({training.epochs}), or nothing is ever averaged",
        )


def _method_epochs(training: TrainingSettings, method: MethodSettings) -> Iterator[Problem]:
    attack = getattr(method, "attack", None)
    ramp = None if attack is None else attack.epsilon_ramp_epochs
    if isinstance(ramp, int) and ramp > training.epochs:
        yield (
            "method.attack.epsilon_ramp_epochs",
            f"must be at most training.epochs ({training.epochs}), or eps is never reached; "
            'write "all" for the whole of training',
        )
    if getattr(method, "warmup_epochs", 0) > training.epochs:
        yield "method.warmup_epochs", f"must be at most training.epochs ({training.epochs})"


def _views(data: DataSettings, method: MethodSettings) -> Iterator[Problem]:
    if method.kind == "dajat":
        if not data.views:
            yield "data.views", "needed by method dajat: two views with auto_augment: true"
        return
    needed = int(getattr(method, "second_view_weight", None) is not None)
    if len(data.views) < needed:
        yield "data.views", "one view is needed by method.second_view_weight"
    elif len(data.views) > needed:
        reason = "set method.second_view_weight" if hasattr(method, "second_view_weight") else ""
        yield "data.views", f"would be ignored by method {method.kind}; remove it {reason}".strip()


_NO_MIXED_LABELS = {
    **{
        kind: f"method {kind} has no form for mixed labels; set it 0"
        for kind in ("mart", "las_at", "dajat")
    },
    "dkd": "method dkd tells one label from the other classes; set it 0, or choose another method",
    "crd": "method crd contrasts an image with memories of whole images of other classes; set it 0",
}


def _mixed_labels(data: DataSettings, method: MethodSettings) -> Iterator[Problem]:
    reason = _NO_MIXED_LABELS.get(method.kind)
    if reason is None and method.kind in ("gkl_at", "gkl_kd") and method.class_weights:
        reason = (
            "the denominator of GKL with class weights needs plain labels; set it 0, or "
            "method.class_weights false"
        )
    if reason is None or data.augment is None:
        return
    for key in ("cutmix", "mixup"):
        if getattr(data.augment, key) > 0:
            yield f"data.augment.{key}", reason


def _dual_batch_norm(model: ModelSettings, method: MethodSettings) -> Iterator[Problem]:
    if model.dual_batch_norm and method.kind != "dajat":
        yield "model.dual_batch_norm", f"would be ignored by method {method.kind}; set it false"
    if method.kind == "dajat" and not model.dual_batch_norm:
        yield "model.dual_batch_norm", "must be true for method dajat"


def _feature_methods(
    data: DataSettings, training: TrainingSettings, method: MethodSettings
) -> Iterator[Problem]:
    if isinstance(method, FEATURE_METHODS) and training.compile:
        yield (
            "training.compile",
            f"must be false for method {method.kind}: features are read by hooks, which compiled "
            "networks do not call",
        )
    if method.kind == "crd" and data.generated is not None:
        yield (
            "data.generated",
            "must be null for method crd, whose memory holds the images of the dataset alone",
        )


def _cached_teacher(data: DataSettings, method: MethodSettings) -> Iterator[Problem]:
    teacher = getattr(method, "teacher", None)
    if teacher is None or teacher.cache is None:
        return
    if data.in_files:
        yield (
            "method.teacher.cache",
            f"must be null: answers are cached for images in memory, and {data.name} is decoded "
            "from files, anew in every epoch",
        )
    for key in ("generated", "class_balanced"):
        if getattr(data, key) is not None:
            yield (
                f"data.{key}",
                "must be null with method.teacher.cache: it may draw an image twice an epoch, "
                "augmented otherwise, and the cache has one answer for each image and epoch",
            )


def _num_images(data: DataSettings, evaluation: EvaluationSettings) -> Iterator[Problem]:
    limit, wanted = data.test_limit, evaluation.num_images
    if limit is not None and wanted is not None and wanted > limit:
        yield "evaluation.num_images", f"must be at most data.test_limit ({limit})"


def _fidelity(method: MethodSettings, evaluation: EvaluationSettings) -> Iterator[Problem]:
    if evaluation.fidelity and getattr(method, "teacher", None) is None:
        yield (
            "evaluation.fidelity",
            f"compares a student with its teacher, and method {method.kind} has none; set it false",
        )
    teacher = getattr(method, "teacher", None)
    if not evaluation.fidelity or teacher is None or teacher.cache is None:
        return
    if teacher.run is None and teacher.checkpoint is None:
        yield (
            "evaluation.fidelity",
            "needs the teacher's network on the test images, and with method.teacher.cache none is "
            "trained: name it by method.teacher.run, or set fidelity false",
        )


def _shot_thresholds(data: DataSettings, evaluation: EvaluationSettings) -> Iterator[Problem]:
    if evaluation.shot_thresholds == SHOT_THRESHOLDS:
        return
    few, many = SHOT_THRESHOLDS
    if not data.is_long_tailed:
        reason = "data.long_tailed is null"
    elif not evaluation.clean:
        reason = "evaluation.clean is false"
    else:
        return
    yield "evaluation.shot_thresholds", f"would be ignored: {reason}; leave it [{few}, {many}]"


_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Problem]]], ...] = (
    (("training", "evaluation"), _robust_validation),
    (("training", "data"), _validation_split),
    (("data", "evaluation"), _validation_attack),
    (("training", "schedule"), _epochs),
    (("training", "weight_perturbation"), _perturbation_epochs),
    (("training", "averaging"), _averaging_epochs),
    (("training", "method"), _method_epochs),
    (("data", "method"), _views),
    (("data", "method"), _mixed_labels),
    (("model", "method"), _dual_batch_norm),
    (("data", "training", "method"), _feature_methods),
    (("data", "method"), _cached_teacher),
    (("data", "evaluation"), _num_images),
    (("method", "evaluation"), _fidelity),
    (("data", "evaluation"), _shot_thresholds),
)
