"""From the sections of a recipe to objects: data, model, method, optimiser, schedules."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkl import config, methods
from dkl.attacks import AdversarialWeightPerturbation, PGDSettings, ThreatModel
from dkl.data import Augment, ImageData, basic_augment, load_data, split_validation
from dkl.engine import schedules
from dkl.engine.averaging import AverageSettings
from dkl.methods.protocol import Method
from dkl.models import create_model, load_checkpoint

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Splits:
    """The data of a run; ``validation`` is held out of the training data, or None."""

    train: ImageData
    validation: ImageData | None
    test: ImageData


def build_data(settings: config.DataSettings, seed: int) -> Splits:
    """Read the dataset and hold the validation part out of its training data."""
    train, test = load_data(settings.name, folder=settings.folder, download=settings.download)
    validation = None
    if settings.validation_fraction > 0:
        train, validation = split_validation(train, settings.validation_fraction, seed)
    train, test = _first(train, settings.train_limit), _first(test, settings.test_limit)
    return Splits(train, validation, test)


def _first(data: ImageData, limit: int | None) -> ImageData:
    return data if limit is None else data.subset(torch.arange(min(limit, len(data))))


def build_augment(settings: config.AugmentSettings | None) -> Augment | None:
    """Return the batch augmentation, or None."""
    if settings is None:
        return None
    return basic_augment(settings.padding, settings.padding_mode, settings.flip)


def build_model(settings: config.ModelSettings, data: ImageData, seed: int) -> nn.Module:
    """Build the network for the data, initialised by the seed, and leave torch's generator be."""
    mean, std = data.mean_std() if settings.normalize else (None, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model(
            settings.name,
            data.num_classes,
            in_channels=data.images.shape[1],
            mean=mean,
            std=std,
            **settings.kwargs,
        )


def load_teacher_checkpoint(settings: config.TeacherSettings, data: ImageData) -> nn.Module:
    """Build the teacher that a checkpoint file describes and load its weights."""
    if settings.model is None or settings.checkpoint is None:
        raise ValueError("a teacher from a checkpoint file needs checkpoint and model")
    model = build_model(settings.model, data, seed=0)
    load_checkpoint(model, Path(settings.checkpoint))
    return model


def build_attack(
    settings: config.AttackSettings, num_epochs: int
) -> Callable[[int, int], PGDSettings]:
    """Return the training attack of every epoch: eps ramp and step budget applied."""
    ramp_epochs = settings.epsilon_ramp_epochs
    ramp = schedules.linear_ramp(num_epochs if ramp_epochs == "all" else ramp_epochs or 1)
    budget = (
        None if settings.budget is None else schedules.attack_steps(settings.budget, num_epochs)
    )

    def attack_of(epoch: int, num_epochs: int) -> PGDSettings:  # noqa: ARG001
        eps = settings.eps * ramp(epoch)
        if budget is not None:
            num_steps, step_factor = budget(epoch)
            step_size = step_factor * eps
        else:
            num_steps, step_size = settings.num_steps or 1, settings.step_size or eps
        return PGDSettings(
            ThreatModel(settings.norm, eps),
            num_steps,
            step_size,
            settings.random_start,
            settings.batch_norm,
        )

    return attack_of


def build_method(
    settings: config.MethodSettings,
    num_classes: int,
    num_epochs: int,
    teacher: nn.Module | None = None,
) -> Method:
    """Build the training method; ``teacher`` is needed by the distillation methods."""
    options = settings.model_dump(exclude={"kind", "attack", "teacher"})
    if isinstance(settings, config.Natural):
        return methods.NaturalTraining(**options)
    if isinstance(settings, config.KD | config.IKLKD | config.GKLKD):
        if teacher is None:
            raise ValueError(f"method {settings.kind} needs a teacher")
        if isinstance(settings, config.KD):
            return methods.kd(
                teacher,
                temperature=settings.temperature,
                hard_weight=settings.ce_weight,
                soft_weight=settings.kd_weight,
            )
        return methods.ikl_kd(teacher, num_classes, **options)
    attack = build_attack(settings.attack, num_epochs)
    if isinstance(settings, config.PGDAT):
        return methods.pgd_at(attack, **options)
    if isinstance(settings, config.TRADES):
        return methods.trades(attack, **options)
    return methods.ikl_at(attack, num_classes, **options)


def build_optimizer(settings: config.OptimizerSettings) -> MakeOptimizer:
    """Return what makes the optimiser from parameters."""
    options: dict[str, Any] = settings.model_dump(exclude={"kind"})
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adamw": torch.optim.AdamW,
    }
    return lambda parameters: kinds[settings.kind](parameters, **options)


def build_schedule(settings: config.ScheduleSettings, num_epochs: int) -> schedules.Schedule:
    """Return the learning-rate schedule over epochs."""
    if isinstance(settings, config.OneCycle):
        return schedules.one_cycle(
            num_epochs,
            pct_start=settings.pct_start,
            div=settings.div,
            final_div=settings.final_div,
        )
    if isinstance(settings, config.Cosine):
        # Per epoch as published: (1 + cos(pi e / (E + 1))) / 2 for e = 1..E.
        shift = 1.0 if settings.per_epoch else 0.0
        schedule = schedules.cosine(num_epochs + shift, offset=shift)
    elif isinstance(settings, config.Step):
        schedule = schedules.step_decay(settings.milestones, settings.factor)
    else:
        schedule = schedules.constant()
    if settings.warmup_epochs > 0:
        schedule = schedules.with_warmup(schedule, settings.warmup_epochs)
    return schedules.per_epoch(schedule) if settings.per_epoch else schedule


def build_average(settings: config.AveragingSettings | None) -> AverageSettings | None:
    """Return how weights are averaged, or None."""
    return None if settings is None else AverageSettings(**settings.model_dump())


def build_perturbation(
    settings: config.WeightPerturbationSettings | None,
) -> AdversarialWeightPerturbation | None:
    """Return the adversarial weight perturbation, or None."""
    return None if settings is None else AdversarialWeightPerturbation(**settings.model_dump())
