"""From the section ``method`` of a recipe to a training method and the networks it brings."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from dkl import config, methods
from dkl.attacks import PGDSettings, ThreatModel
from dkl.build.distillation import build_feature_distillation, build_logit_distillation
from dkl.build.image_access import LabelledImages
from dkl.build.objects import build_model
from dkl.engine import schedules
from dkl.methods.protocol import Method

Needed = TypeVar("Needed")


def build_second_model(
    settings: config.MethodSettings, data: LabelledImages, seed: int
) -> nn.Module | None:
    """Build the network that the method trains beside the model, or None."""
    if isinstance(settings, config.LBGAT):
        return build_model(settings.guide, data, seed + 1)
    if isinstance(settings, config.LASAT):
        choices = (
            settings.eps_choices,
            settings.steps_choices,
            settings.step_size_choices,
            settings.beta_choices or (),
        )
        # One logit for every option of every decision.
        return build_model(settings.strategy, data, seed + 1, num_classes=sum(map(len, choices)))
    return None


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
    second_model: nn.Module | None = None,
    num_views: int = 0,
    student: nn.Module | None = None,
    data: LabelledImages | None = None,
    seed: int = 0,
) -> Method:
    """Build the training method.

    Args:
        settings: of the method.
        num_classes: C.
        num_epochs: of the run.
        teacher: needed by the distillation methods.
        second_model: needed by LBGAT and LAS-AT; see ``build_second_model``.
        num_views: views of every image beside the basic one.
        student: the network to be trained, which methods on features look at.
        data: its training data, for the sizes of features and for labels.
        seed: of the layers and memory that a method brings; torch's generator is left alone.
    """
    options = settings.model_dump(exclude={"kind", "attack", "teacher", "guide", "strategy"})
    if isinstance(settings, config.Natural):
        return methods.NaturalTraining(**options)
    if isinstance(settings, config.LOGIT_METHODS):
        return build_logit_distillation(
            settings, _needed(teacher, settings.kind, "teacher"), num_classes
        )
    if isinstance(settings, config.FEATURE_METHODS):
        if data is None:
            raise ValueError(f"method {settings.kind} needs data; give build_method data=")
        return build_feature_distillation(
            settings,
            _needed(teacher, settings.kind, "teacher"),
            _needed(student, settings.kind, "student"),
            data,
            seed,
        )
    if isinstance(settings, config.LASAT):
        return methods.las_at(_needed(second_model, settings.kind, "second_model"), **options)
    attack = build_attack(settings.attack, num_epochs)
    if isinstance(settings, config.LBGAT):
        return methods.lbgat(
            attack, _needed(second_model, settings.kind, "second_model"), **options
        )
    if isinstance(settings, config.PGDAT):
        return methods.pgd_at(attack, **options)
    if isinstance(settings, config.TRADES):
        return methods.trades(attack, **options)
    if isinstance(settings, config.MART):
        return methods.mart(attack, **options)
    if isinstance(settings, config.DAJAT):
        return methods.dajat(attack, num_views=num_views, **options)
    return methods.ikl_at(attack, num_classes, **options)


def _needed(value: Needed | None, kind: str, name: str) -> Needed:
    if value is None:
        raise ValueError(f"method {kind} needs {name}; give build_method {name}=")
    return value
