"""From the section ``method`` of a recipe to a method of distillation."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from dkl import config, methods
from dkl.build.image_access import LabelledImages
from dkl.methods.protocol import Method
from dkl.models import feature_maps, tap_norms, tap_shapes

LogitSettings = config.KD | config.JSDKD | config.DKD | config.DIST | config.IKLKD | config.GKLKD
FeatureSettings = config.AT | config.FitNet | config.RKD | config.CRD | config.OFD | config.ReviewKD


def build_logit_distillation(
    settings: LogitSettings, teacher: nn.Module, num_classes: int
) -> Method:
    """Build a method that compares logits.

    Args:
        settings: of the method.
        teacher: a trained network, or its cached answers.
        num_classes: C.
    """
    options = settings.model_dump(exclude={"kind", "teacher"})
    if isinstance(settings, config.KD):
        options["hard_weight"] = options.pop("ce_weight")
        options["soft_weight"] = options.pop("kd_weight")
    if isinstance(teacher, methods.CachedTopKTeacher):
        check_top_k(settings, teacher.temperature)
        if isinstance(settings, config.KD):
            del options["temperature"]
            return methods.top_k_kd(teacher, **options)
        for name in ("temperature", "class_weights"):
            del options[name]
        return methods.top_k_ikl_kd(teacher, **options)
    if isinstance(settings, config.KD):
        return methods.kd(teacher, **options)
    if isinstance(settings, config.JSDKD):
        return methods.jsd_kd(teacher, **options)
    if isinstance(settings, config.DKD):
        return methods.dkd(teacher, **options)
    if isinstance(settings, config.DIST):
        return methods.dist(teacher, **options)
    return methods.ikl_kd(teacher, num_classes, **options)


def check_top_k(settings: config.MethodSettings, temperature: float) -> None:
    """Refuse what cannot learn from a teacher's k most likely classes.

    Args:
        settings: of the method.
        temperature: at which the classes are cached.

    Raises:
        ValueError: the method needs all classes, or has another temperature.
    """
    has_table = isinstance(settings, config.IKLKD) and settings.class_weights
    if not isinstance(settings, config.KD | config.IKLKD) or has_table:
        raise ValueError(
            f"method {settings.kind} needs the log-probabilities of all classes"
            f"{' for its class table' if has_table else ''}, and this teacher cache has the most "
            "likely ones alone. Write one without --top-k, or choose kd, or ikl_kd with "
            "method.class_weights=false"
        )
    if settings.temperature != temperature:
        raise ValueError(
            f"method.temperature is {settings.temperature:g}, and the teacher's most likely "
            f"classes are cached at {temperature:g}: a temperature cannot be changed once classes "
            f"are left out. Set method.temperature={temperature:g}, or write another cache"
        )


def build_feature_distillation(
    settings: FeatureSettings,
    teacher: nn.Module,
    student: nn.Module,
    data: LabelledImages,
    seed: int,
) -> Method:
    """Build a method that compares features, with the layers and memory that it brings.

    Args:
        settings: of the method.
        teacher: a trained network.
        student: the network to be trained.
        data: its training data.
        seed: of the method's own layers and memory; torch's generator is left alone.
    """
    options = settings.model_dump(exclude={"kind", "teacher", "student_taps", "teacher_taps"})
    pair = feature_pair(
        student,
        teacher,
        image_shape(data),
        student_taps=settings.student_taps,
        teacher_taps=settings.teacher_taps,
    )
    with torch.random.fork_rng(devices=[]):
        # Not the generator of the student's weights, nor that of a second network.
        torch.manual_seed(seed + 2)
        if isinstance(settings, config.AT):
            return methods.attention_transfer(teacher, pair, **options)
        if isinstance(settings, config.FitNet):
            return methods.fitnet(teacher, pair, **options)
        if isinstance(settings, config.RKD):
            return methods.rkd(teacher, pair, **options)
        if isinstance(settings, config.CRD):
            return methods.crd(teacher, pair, data.labels, **options)
        if isinstance(settings, config.OFD):
            norms = tap_norms(teacher, settings.teacher_taps)
            return methods.ofd(teacher, pair, norms, **options)
        return methods.reviewkd(teacher, pair, **options)


def feature_pair(
    student: nn.Module,
    teacher: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    student_taps: Sequence[str] | None = None,
    teacher_taps: Sequence[str] | None = None,
) -> methods.FeaturePair:
    """Say how the features of two networks are read, their sizes found by one dry run of each.

    Args:
        student: a classifier; see ``dkl.models.feature_maps`` for which ones say where to look.
        teacher: likewise.
        image_shape: (C, H, W) of the images.
        student_taps: names of modules whose outputs are the student's maps, the stem's first; None
            for what the network itself says.
        teacher_taps: likewise of the teacher.

    Returns:
        What the methods on features take.

    Raises:
        ValueError: the places are not known or do not exist.

    Example:
        >>> from dkl.models import create_model
        >>> student, teacher = create_model("resnet8", 10), create_model("resnet8x4", 10)
        >>> pair = feature_pair(student, teacher, (3, 32, 32))
        >>> pair.student.num_features, pair.teacher.num_features
        (64, 256)
    """
    return methods.FeaturePair(
        partial(feature_maps, points=student_taps),
        partial(feature_maps, points=teacher_taps),
        tap_shapes(student, image_shape, student_taps),
        tap_shapes(teacher, image_shape, teacher_taps),
    )


def image_shape(data: LabelledImages) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that training sees."""
    return data.image_shape
