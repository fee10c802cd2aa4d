"""Numbers of the paper on distillation, as plain data; nothing in this file was measured here.

Source as in ``dkl.reports.published``; each row names its table. Accuracies are top-1, percent;
pairs are teacher-student.
"""

from collections.abc import Mapping, Sequence

from dkl.reports.published import PublishedRow

__all__ = [
    "CIFAR_OTHER_PAIRS",
    "CIFAR_PAIRS",
    "DISTILLATION_CONFLICTS",
    "IMAGENET_PAIRS",
    "LONG_TAILED_PAIRS",
    "PUBLISHED_DISTILLATION",
    "SHOTS",
]

# Pairs of table 13 (one family of networks) and 14 (two): name -> short name.
CIFAR_PAIRS = {
    "resnet56-resnet20": "R56-R20",
    "resnet110-resnet32": "R110-R32",
    "resnet32x4-resnet8x4": "R32x4-R8x4",
    "wrn_40_2-wrn_16_2": "W40-2-W16-2",
    "wrn_40_2-wrn_40_1": "W40-2-W40-1",
    "vgg13-vgg8": "V13-V8",
}
CIFAR_OTHER_PAIRS = {
    "resnet32x4-shufflenet_v1": "R32x4-ShV1",
    "wrn_40_2-shufflenet_v1": "W40-2-ShV1",
    "vgg13-mobilenet_v2_half": "V13-MV2",
    "resnet50_cifar-mobilenet_v2_half": "R50-MV2",
    "resnet32x4-shufflenet_v2": "R32x4-ShV2",
}
IMAGENET_PAIRS = {"resnet34-resnet18": "R34-R18", "resnet50-mobilenet_v1": "R50-MV1"}
LONG_TAILED_PAIRS = {
    "resnext101-resnet18": "ResNeXt-101 to ResNet-18",
    "resnext101-resnet50": "ResNeXt-101 to ResNet-50",
}
SHOTS = ("many", "medium", "few", "all")

# Every row of every table, so that tables agree in what they call a method.
_LABELS = {
    "teacher": "teacher",
    "student": "student (no teacher)",
    "fitnet": "FitNet",
    "at": "AT",
    "rkd": "RKD",
    "crd": "CRD",
    "ofd": "OFD",
    "reviewkd": "ReviewKD",
    "dkd": "DKD",
    "dist": "DIST",
    "kd": "KD",
    "jsd_kd": "JSD-KD",
    "ikl_kd": "IKL-KD",
    "gkl_kd": "GKL-KD",
}


def _absent(key: str, label: str = "") -> PublishedRow:
    """Make a row that the paper does not have."""
    return PublishedRow(key=key, label=label or _LABELS[key], table=0, dataset="", architecture="")


def _row(
    key: str, table: int, dataset: str, others: Mapping[str, float], label: str = ""
) -> PublishedRow:
    return PublishedRow(
        key=key,
        label=label or _LABELS[key],
        table=table,
        dataset=dataset,
        architecture="",
        others=others,
    )


def _cifar(
    key: str, same: Sequence[float] = (), other: Sequence[float] = ()
) -> tuple[PublishedRow, ...]:
    """Make the rows of a method in tables 13 and 14."""
    if not same:
        return (_absent(key),)
    tables = ((13, CIFAR_PAIRS, same), (14, CIFAR_OTHER_PAIRS, other))
    return tuple(
        _row(key, table, "CIFAR-100", dict(zip(pairs, values, strict=True)))
        for table, pairs, values in tables
    )


CIFAR_METHODS = (
    *_cifar(
        "teacher",
        (72.34, 74.31, 79.42, 75.61, 75.61, 74.64),
        (79.42, 75.61, 74.64, 79.34, 79.42),
    ),
    *_cifar(
        "student",
        (69.06, 71.14, 72.50, 73.26, 71.98, 70.36),
        (70.50, 70.50, 64.60, 64.60, 71.82),
    ),
    *_cifar(
        "fitnet",
        (69.21, 71.06, 73.50, 73.58, 72.24, 71.02),
        (73.59, 73.73, 64.14, 63.16, 73.54),
    ),
    *_cifar("at"),
    *_cifar(
        "rkd",
        (69.61, 71.82, 71.90, 73.35, 72.22, 71.48),
        (72.28, 72.21, 64.52, 64.43, 73.21),
    ),
    *_cifar(
        "crd",
        (71.16, 73.48, 75.51, 75.48, 74.14, 73.94),
        (75.11, 76.05, 69.73, 69.11, 75.65),
    ),
    *_cifar(
        "ofd",
        (70.98, 73.23, 74.95, 75.24, 74.33, 73.95),
        (75.98, 75.85, 69.48, 69.04, 76.82),
    ),
    *_cifar(
        "reviewkd",
        (71.89, 73.89, 75.63, 76.12, 75.09, 74.84),
        (77.45, 77.14, 70.37, 69.89, 77.78),
    ),
    *_cifar(
        "dkd",
        (71.97, 74.11, 76.32, 76.24, 74.81, 74.68),
        (76.45, 76.70, 69.71, 70.35, 77.07),
    ),
    *_cifar("dist"),
    *_cifar(
        "kd",
        (70.66, 73.08, 73.33, 74.92, 73.54, 72.98),
        (74.07, 74.83, 67.37, 67.35, 74.45),
    ),
    *_cifar("jsd_kd"),
    *_cifar(
        "ikl_kd",
        (71.44, 74.26, 76.59, 76.45, 74.98, 74.98),
        (76.64, 77.19, 70.40, 70.62, 77.16),
    ),
    *_cifar("gkl_kd"),
    _absent("self_kd", "KD (self-distillation)"),
)

STRONG_PAIR = "beit_l-resnet50"


def _imagenet(
    key: str,
    top1: Sequence[float] = (),
    strong: float | None = None,
    *,
    seconds: Sequence[float] = (),
) -> tuple[PublishedRow, ...]:
    """Make the rows of a method in tables 4 (two pairs) and 15 (a long recipe)."""
    rows = []
    if top1:
        others = dict(zip(IMAGENET_PAIRS, top1, strict=True))
        times = {
            f"seconds_{pair}": time for pair, time in zip(IMAGENET_PAIRS, seconds, strict=False)
        }
        rows.append(_row(key, 4, "ImageNet", {**others, **times}))
    if strong is not None:
        rows.append(_row(key, 15, "ImageNet", {STRONG_PAIR: strong}))
    return tuple(rows) or (_absent(key),)


IMAGENET_METHODS = (
    *_imagenet("teacher", (73.31, 76.16)),
    *_imagenet("student", (69.75, 68.87)),
    *_imagenet("at", (70.69, 69.56)),
    *_imagenet("ofd", (70.81, 71.25)),
    *_imagenet("crd", (71.17, 71.37)),
    *_imagenet("reviewkd", (71.61, 72.56), seconds=(0.319, 0.526)),
    *_imagenet("dkd", (71.70, 72.05), 80.77),
    *_imagenet("dist", (), 80.70),
    *_imagenet("kd", (71.03, 70.50), 80.89),
    # Table 1's column on distillation; its KL and IKL are KD and IKL-KD of table 4.
    _row("dkl_kd", 1, "ImageNet", {"resnet34-resnet18": 71.03}, "DKL-KD"),
    _row("ba_kd", 1, "ImageNet", {"resnet34-resnet18": 71.80}, "DKL-KD + BA"),
    *_imagenet("ikl_kd", (71.91, 72.84), 80.98, seconds=(0.197, 0.252)),
    *_imagenet("gkl_kd"),
)

_SPEED_KEYS = [key for key in _LABELS if key != "teacher"]
SPEED = tuple(
    next((row for row in IMAGENET_METHODS if row.key == key and row.table == 4), _absent(key))
    for key in _SPEED_KEYS
)


def _shots(pair: str, *accuracies: float) -> dict[str, float]:
    """Name the accuracies on classes with many, medium and few images, and on all."""
    return {f"{pair} {shot}": value for shot, value in zip(SHOTS, accuracies, strict=True)}


def _long_tailed(
    key: str, label: str, *parts: Mapping[str, float], again: Mapping[str, float] | None = None
) -> tuple[PublishedRow, ...]:
    """Make the rows of a method in tables 5 and 18 (``again``: all classes only)."""
    rows = []
    if parts:
        others = {name: value for part in parts for name, value in part.items()}
        rows.append(_row(key, 5, "ImageNet-LT", others, label))
    if again is not None:
        rows.append(_row(key, 18, "ImageNet-LT", again, label))
    return tuple(rows) or (_absent(key, label),)


_R18, _R50 = LONG_TAILED_PAIRS
_SELF = "self resnet50"
LONG_TAILED = (
    *_long_tailed(
        "teacher",
        "teacher",
        _shots(_R18, 68.91, 42.32, 11.24, 48.33),
        _shots(_R50, 68.91, 42.32, 11.24, 48.33),
    ),
    *_long_tailed(
        "student",
        "student (no teacher)",
        _shots(_R18, 63.16, 33.47, 5.88, 41.15),
        _shots(_R50, 67.25, 38.56, 8.21, 45.47),
    ),
    *_long_tailed(
        "kl",
        "KL",
        _shots(_R18, 64.60, 37.88, 9.53, 44.32),
        _shots(_R50, 68.83, 42.31, 11.37, 48.31),
        again={_R50: 48.31},
    ),
    *_long_tailed("jsd", "JSD", again={_R50: 47.82}),
    *_long_tailed(
        "ikl",
        "IKL",
        _shots(_R18, 66.60, 38.53, 8.19, 45.21),
        _shots(_R50, 70.06, 43.47, 10.99, 49.29),
        again={_R50: 49.22},
    ),
    *_long_tailed("gkl", "GKL"),
    *_long_tailed("self_kl", "KL (self-distillation)", again={_SELF: 47.04}),
    *_long_tailed("self_jsd", "JSD (self-distillation)", again={_SELF: 46.64}),
    *_long_tailed("self_ikl", "IKL (self-distillation)", again={_SELF: 47.50}),
)

PUBLISHED_DISTILLATION: Mapping[str, tuple[PublishedRow, ...]] = {
    "distillation": CIFAR_METHODS,
    "distillation-imagenet": IMAGENET_METHODS,
    "distillation-speed": SPEED,
    "long-tailed": LONG_TAILED,
}

# Where these tables disagree: name of the table here -> what to know.
DISTILLATION_CONFLICTS: Mapping[str, tuple[str, ...]] = {
    "long-tailed": (
        "IKL from ResNeXt-101 to ResNet-50 has 49.29 in table 5 and 49.22 in table 18.",
        "The teacher's 48.33 stands under ResNet-101 in table 5, while table 18 distils from "
        "ResNeXt-101; the authors' code reports 48.02 for ResNeXt-101.",
    ),
}
