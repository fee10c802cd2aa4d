"""From the sections of a recipe to objects: data, model, method, optimiser, schedules."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkl import config
from dkl.attacks import AdversarialWeightPerturbation
from dkl.build.image_access import LabelledImages
from dkl.data import (
    Augment,
    ClassBalancedSource,
    Decoding,
    GeneratedImages,
    ImageData,
    MixedSource,
    cutmix,
    load_data,
    load_image_files,
    long_tailed,
    make_augment,
    mixup_or_cutmix,
    split_validation,
    write_npz,
)
from dkl.engine import LoopSettings, schedules
from dkl.engine.averaging import AverageSettings
from dkl.engine.batches import Mix
from dkl.models import create_model, load_checkpoint
from dkl.models.dual_batch_norm import add_dual_batch_norm

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_MIXING = {"cutmix", "mixup", "mixup_alpha"}


@dataclass(frozen=True)
class Splits:
    """The data of a run; ``validation`` is held out of the training data, or None.

    ``unused`` are the training images beyond ``data.train_limit``, where ``generated`` wants them.
    """

    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages
    unused: ImageData | None = None


def build_data(settings: config.DataSettings, seed: int) -> Splits:
    """Read the dataset and hold the validation part out of its training data.

    In this order: validation is held out, ``train_limit`` takes the first images of the rest, and
    of these ``long_tailed`` keeps a part. So validation stays as balanced as the dataset is, and
    classes have exactly the sizes of the long tail.
    """
    train, validation, test = _load(settings, seed)
    tail = settings.long_tailed
    if tail is not None and tail.seed is not None:
        # What is held out decides what is left to keep: one seed for both is one split.
        seed = tail.seed
    if settings.validation_fraction > 0:
        train, validation = _hold_out(train, settings.validation_fraction, seed)
    unused = None
    limit, generated = settings.train_limit, settings.generated
    # A copy, made only where it is used: evaluation reads the data too.
    if generated is not None and generated.held_out and limit is not None and limit < len(train):
        assert isinstance(train, ImageData)
        unused = train.subset(torch.arange(limit, len(train)))
    train, test = _first(train, limit), _first(test, settings.test_limit)
    if tail is not None:
        train = _cut(train, seed, tail)
    return Splits(train, validation, test, unused)


def _load(
    settings: config.DataSettings, seed: int
) -> tuple[LabelledImages, LabelledImages | None, LabelledImages]:
    """Return training images, those for validation that the dataset brings, and test images."""
    if not settings.in_files:
        train, test = load_data(settings.name, folder=settings.folder, download=settings.download)
        return train, None, test
    how = Decoding() if settings.decoding is None else Decoding(**settings.decoding.model_dump())
    files = load_image_files(settings.name, folder=settings.folder, decoding=how, seed=seed)
    return files.train, files.validation, files.test


def _hold_out(
    data: LabelledImages, fraction: float, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    if isinstance(data, ImageData):
        return split_validation(data, fraction, seed)
    train, validation = split_validation(data, fraction, seed)
    return train, validation.for_evaluation()


def _cut(data: LabelledImages, seed: int, tail: config.LongTailedSettings) -> LabelledImages:
    options = tail.model_dump(exclude={"seed"})
    if isinstance(data, ImageData):
        return long_tailed(data, seed=seed, **options)
    return long_tailed(data, seed=seed, **options)


def _first(data: LabelledImages, limit: int | None) -> LabelledImages:
    return data if limit is None else data.subset(torch.arange(min(limit, len(data))))


def build_source(
    settings: config.DataSettings, splits: Splits, batch_size: int, folder: Path
) -> LabelledImages | MixedSource | ClassBalancedSource:
    """Return what the loop trains on: the real images, drawn class by class or mixed with others.

    Args:
        settings: of the data.
        splits: the real images.
        batch_size: samples of an optimiser step.
        folder: where ``held_out`` images are written as a file.

    Raises:
        ValueError: files that are missing or do not fit.
    """
    generated, balanced, train = settings.generated, settings.class_balanced, splits.train
    if balanced is not None:
        return ClassBalancedSource(train, **balanced.model_dump())
    if generated is None:
        return train
    parts = [Path(part).expanduser() for part in generated.parts]
    if generated.held_out:
        if splits.unused is None:
            raise ValueError(
                f"data.generated.held_out takes the images beyond data.train_limit, and there are "
                f"none: {len(train)} images are left for training; lower data.train_limit"
            )
        parts = [folder / "held_out.npz"]
        if not parts[0].exists():
            write_npz(splits.unused, parts[0])
    assert isinstance(train, ImageData)
    pool = GeneratedImages(parts, num_classes=train.num_classes, image_shape=train.image_shape)
    return MixedSource(
        train,
        pool,
        fraction=generated.fraction,
        samples_per_epoch=generated.samples_per_epoch or len(train),
        batch_size=batch_size,
    )


def build_augment(settings: config.AugmentSettings | None) -> Augment | None:
    """Return the batch augmentation, or None."""
    return None if settings is None else make_augment(**settings.model_dump(exclude=_MIXING))


def build_views(settings: config.DataSettings) -> list[Augment]:
    """Return the augmentations of the further views of every image."""
    views = (build_augment(view) for view in settings.views)
    return [view for view in views if view is not None]


def build_mix(settings: config.AugmentSettings | None) -> Mix | None:
    """Return what mixes two images and says whose share is how large, or None."""
    if settings is None or settings.cutmix == settings.mixup == 0:
        return None
    if settings.mixup == 0:
        return partial(cutmix, probability=settings.cutmix)
    return partial(
        mixup_or_cutmix,
        mixup_probability=settings.mixup,
        cutmix_probability=settings.cutmix,
        alpha=settings.mixup_alpha,
    )


def build_model(
    settings: config.ModelSettings,
    data: LabelledImages,
    seed: int,
    *,
    num_classes: int | None = None,
) -> nn.Module:
    """Build the network for the data, initialised by the seed, and leave torch's generator be."""
    mean, std = settings.mean, settings.std
    if settings.normalize and mean is None:
        mean, std = data.mean_std()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(
            settings.name,
            data.num_classes if num_classes is None else num_classes,
            in_channels=data.image_shape[0],
            mean=mean,
            std=std,
            **settings.kwargs,
        )
    return add_dual_batch_norm(model) if settings.dual_batch_norm else model


def load_teacher_checkpoint(settings: config.TeacherSettings, data: LabelledImages) -> nn.Module:
    """Build the teacher that a checkpoint file describes and load its weights."""
    if settings.model is None or settings.checkpoint is None:
        raise ValueError("a teacher from a checkpoint file needs checkpoint and model")
    model = build_model(settings.model, data, seed=0)
    load_checkpoint(model, Path(settings.checkpoint))
    return model


def build_loop_settings(recipe: config.Recipe) -> LoopSettings:
    """Return the settings of the training loop."""
    training = recipe.training
    options = training.model_dump(exclude={"compile", "threads"})
    return LoopSettings(
        **options,
        compile_model=training.compile,
        seed=recipe.seed,
        trackers=recipe.trackers,
    )


def build_optimizer(settings: config.OptimizerSettings) -> MakeOptimizer:
    """Return what makes the optimiser from parameters."""
    options: dict[str, Any] = settings.model_dump(exclude={"kind"})
    if isinstance(settings, config.Lamb):
        return partial(_lamb(), **options)
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adamw": torch.optim.AdamW,
    }
    return partial(kinds[settings.kind], **options)


def _lamb() -> MakeOptimizer:
    try:
        from timm.optim.lamb import Lamb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "optimizer.kind lamb is timm's, and timm is missing: pip install 'dkl[timm]'"
        ) from error
    make: MakeOptimizer = Lamb
    return make


def build_schedule(settings: config.ScheduleSettings, num_epochs: int) -> schedules.Schedule:
    """Return the learning-rate schedule over epochs."""
    if isinstance(settings, config.OneCycle):
        # Evaluated once an epoch, torch's OneCycleLR counts evaluations: see ``one_cycle``.
        cycle = schedules.one_cycle(
            num_epochs,
            pct_start=settings.pct_start,
            div=settings.div,
            final_div=settings.final_div,
            unit=1.0 if settings.per_epoch else 0.0,
        )
        return schedules.per_epoch(cycle) if settings.per_epoch else cycle
    if isinstance(settings, config.Cosine):
        # Per epoch as published: (1 + cos(pi e / (E + 1))) / 2 for e = 1..E.
        shift = 1.0 if settings.per_epoch and not settings.from_full else 0.0
        length = num_epochs - (settings.warmup_epochs if settings.after_warmup else 0.0)
        schedule = schedules.cosine(length + shift, offset=shift)
        if settings.after_warmup:
            unit = 1.0 if settings.per_epoch else 0.0
            schedule = schedules.after_warmup(schedule, settings.warmup_epochs, unit=unit)
            return schedules.per_epoch(schedule) if settings.per_epoch else schedule
    elif isinstance(settings, config.Step):
        schedule = schedules.step_decay(settings.milestones, settings.factor)
        if settings.first_epoch_factor != 1:
            schedule = schedules.with_first_epoch(schedule, settings.first_epoch_factor)
    else:
        schedule = schedules.constant()
    if settings.warmup_epochs > 0:
        schedule = schedules.with_warmup(schedule, settings.warmup_epochs)
    return schedules.per_epoch(schedule) if settings.per_epoch else schedule


def build_momentum_schedule(
    settings: config.ScheduleSettings, num_epochs: int
) -> schedules.Schedule | None:
    """Return the momentum over epochs where the schedule cycles it, or None."""
    if not isinstance(settings, config.OneCycle) or not settings.cycle_momentum:
        return None
    momentum = schedules.one_cycle_momentum(
        num_epochs, pct_start=settings.pct_start, unit=1.0 if settings.per_epoch else 0.0
    )
    return schedules.per_epoch(momentum) if settings.per_epoch else momentum


def build_average(settings: config.AveragingSettings | None) -> AverageSettings | None:
    """Return how weights are averaged, or None."""
    return None if settings is None else AverageSettings(**settings.model_dump())


def build_perturbation(
    settings: config.WeightPerturbationSettings | None,
) -> AdversarialWeightPerturbation | None:
    """Return the adversarial weight perturbation, or None."""
    return None if settings is None else AdversarialWeightPerturbation(**settings.model_dump())
