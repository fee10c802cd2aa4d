"""What ``dkl reproduce`` runs: the rows of every table of the paper, in plain sight.

A row is a shipped recipe and what it changes in it. ``small`` runs on a laptop (Fashion-MNIST);
``paper`` is the published scale (CIFAR-100).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

SCALES = ("small", "paper")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        recipe: name of a shipped recipe, or the path of a YAML file.
        overrides: ``key=value`` laid over it. Those of ``evaluation.`` change what is measured, not
            what is trained.
        scaled: numbers of the recipe by key, and the factor each is multiplied by.
        teacher: key of the row whose run of the first seed teaches all seeds of this one; "" where
            the recipe says where its teacher comes from, or has none.
        once: trained with the first seed alone, because it only teaches others.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    scaled: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    teacher: str = ""
    once: bool = False


Rows = Mapping[str, Row]
Experiments = Mapping[str, Mapping[str, Rows]]
"""Name of the experiment -> scale -> key of the row -> row."""

_SMALL_METHODS = {
    "natural": Row("fashion_mnist_natural_small"),
    "pgd_at": Row("fashion_mnist_pgd_at_small"),
    "trades": Row("fashion_mnist_trades_small"),
    "trades_awp": Row("fashion_mnist_trades_awp_small"),
    "mart": Row("fashion_mnist_mart_small"),
    "lbgat": Row("fashion_mnist_lbgat_small"),
    "las_at": Row("fashion_mnist_las_at_small"),
    "acat": Row("fashion_mnist_acat_small"),
    "dajat": Row("fashion_mnist_dajat_small"),
    "ikl_at": Row("fashion_mnist_ikl_at_small"),
    "gkl_at": Row("fashion_mnist_gkl_at_small"),
    "ikl_at_autoaugment": Row("fashion_mnist_ikl_at_autoaugment_small"),
    "dm_at": Row("fashion_mnist_dm_at_small"),
    "ikl_at_generated": Row("fashion_mnist_ikl_at_generated_small"),
}
_PAPER_METHODS = {
    "pgd_at_awp": Row("cifar100_pgd_at_awp"),
    "trades": Row("cifar100_kl_at"),
    "trades_awp": Row("cifar100_trades_awp"),
    "lbgat": Row("cifar100_lbgat"),
    "las_at": Row("cifar100_las_at"),
    "acat": Row("cifar100_acat"),
    "acat_autoaugment": Row("cifar100_acat_autoaugment"),
    "dajat": Row("cifar100_dajat"),
    "ikl_at": Row("cifar100_ikl_at"),
    "gkl_at": Row("cifar100_gkl_at"),
    "ikl_at_autoaugment": Row("cifar100_ikl_at_autoaugment"),
    "dm_at": Row("cifar100_dm_at"),
    "ikl_at_generated": Row("cifar100_ikl_at_generated"),
}

# All four with the settings that were tuned for KL; "ikl_at" above has settings of its own.
_SMALL_ABLATION = {
    "kl": Row("fashion_mnist_trades_small"),
    "dkl": Row("fashion_mnist_dkl_at_small"),
    "ba": Row("fashion_mnist_ba_at_small"),
    "ikl": Row("fashion_mnist_ba_gi_at_small"),
}
_PAPER_ABLATION = {
    "kl": Row("cifar100_kl_at"),
    "dkl": Row("cifar100_dkl_at"),
    "ba": Row("cifar100_ba_at"),
    "ikl": Row("cifar100_ikl_at"),
}

_SMALL_SWEEP = (
    "evaluation.sweep=[0.025,0.05,0.075,0.125,0.15]",
    "evaluation.sweep_attack=auto_attack",
)
_OTHER_ATTACKS = ("evaluation.pgd_steps=[10,20]", "evaluation.cw_steps=[10,20]")

_SMALL_IKL, _PAPER_IKL = "fashion_mnist_ikl_at_small", "cifar100_ikl_at"
# Tables 7 to 9 change one number at a time around 20 (a/4 = 5), 5 and 4. The weights of the small
# recipe are others (a tenth of the classes, larger logits): they are scaled by the same factors.
_SMALL_HYPERPARAMETERS = {
    **{f"mse_{n}": Row(_SMALL_IKL, scaled={"method.mse_weight": n / 5}) for n in (3, 4, 5, 6)},
    **{f"ce_{n}": Row(_SMALL_IKL, scaled={"method.ce_weight": n / 5}) for n in (2, 3, 4, 5)},
    **{f"tau_{n}": Row(_SMALL_IKL, (f"method.weight_temperature={n}",)) for n in (1, 2, 3, 4)},
}
# The recipe itself has a/4 = 5, b = 5 and tau = 4.
_PAPER_HYPERPARAMETERS = {
    **{f"mse_{n}": Row(_PAPER_IKL if n == 5 else f"{_PAPER_IKL}_mse_{n}") for n in (3, 4, 5, 6)},
    **{f"ce_{n}": Row(_PAPER_IKL if n == 5 else f"{_PAPER_IKL}_ce_{n}") for n in (2, 3, 4, 5)},
    **{f"tau_{n}": Row(_PAPER_IKL if n == 4 else f"{_PAPER_IKL}_tau_{n}") for n in (1, 2, 3, 4)},
}


def _attacked(rows: Rows, keys: tuple[str, ...]) -> dict[str, Row]:
    return {key: Row(rows[key].recipe, _OTHER_ATTACKS) for key in keys}


_ATTACKED_KEYS = ("trades", "ikl_at", "ikl_at_autoaugment", "ikl_at_generated")

_DISTILLATION = (
    "fitnet", "rkd", "crd", "ofd", "reviewkd", "dkd", "kd", "ikl_kd", "gkl_kd",
)  # fmt: skip
_SMALL_STUDENTS = {
    "student": Row("fashion_mnist_student_small"),
    **{
        key: Row(f"fashion_mnist_{key}_small", teacher="teacher")
        for key in (*_DISTILLATION, "at", "dist", "jsd_kd")
    },
}
_SMALL_DISTILLATION = {
    "teacher": Row("fashion_mnist_teacher_small", once=True),
    **_SMALL_STUDENTS,
}
# Columns of tables 13 and 14; their teachers are published checkpoints.
_PAIRS = {
    "resnet56_resnet20": "resnet20",
    "resnet110_resnet32": "resnet32",
    "resnet32x4_resnet8x4": "resnet8x4",
    "wrn_40_2_wrn_16_2": "wrn_16_2",
    "wrn_40_2_wrn_40_1": "wrn_40_1",
    "vgg13_vgg8": "vgg8",
    "resnet32x4_shufflenet_v1": "shufflenet_v1",
    "wrn_40_2_shufflenet_v1": "shufflenet_v1",
    "vgg13_mobilenet_v2_half": "mobilenet_v2_half",
    "resnet50_cifar_mobilenet_v2_half": "mobilenet_v2_half",
    "resnet32x4_shufflenet_v2": "shufflenet_v2",
}
_PAPER_PAIR = "resnet32x4_resnet8x4"


def _paper_distillation(pair: str) -> dict[str, Row]:
    return {
        "student": Row(f"cifar100_natural_{_PAIRS[pair]}"),
        **{key: Row(f"cifar100_{key}_{pair}") for key in _DISTILLATION},
    }


_SMALL_LONG_TAILED = {
    "teacher": Row("fashion_mnist_lt_teacher_small", once=True),
    "student": Row("fashion_mnist_lt_student_small"),
    **{
        key: Row(f"fashion_mnist_lt_{key}_small", teacher="teacher")
        for key in ("kl", "jsd", "ikl", "gkl")
    },
    **{
        key: Row(f"fashion_mnist_lt_{key}_small", teacher="student")
        for key in ("self_kl", "self_jsd", "self_ikl")
    },
}
_LT_METHODS = {"kl": "kd", "jsd": "jsd_kd", "ikl": "ikl_kd", "gkl": "gkl_kd"}
_LT_PAIR, _LT_SELF = "resnext101_resnet50", "resnet50_resnet50"
_PAPER_LONG_TAILED = {
    "teacher": Row("imagenet_lt_natural_resnext101", once=True),
    "student": Row("imagenet_lt_natural_resnet50"),
    **{
        key: Row(f"imagenet_lt_{method}_{_LT_PAIR}", teacher="teacher")
        for key, method in _LT_METHODS.items()
    },
    **{
        f"self_{key}": Row(f"imagenet_lt_{method}_{_LT_SELF}", teacher="student")
        for key, method in _LT_METHODS.items()
        if key != "gkl"
    },
}
# Tables 4 and 15, with the rows of table 1; their teachers are published checkpoints.
_IMAGENET_METHODS = (
    "at", "ofd", "crd", "reviewkd", "dkd", "dist", "kd", "ikl_kd", "gkl_kd",
)  # fmt: skip
_IMAGENET = {
    "student": Row("imagenet_natural_resnet18"),
    **{
        key: Row(f"imagenet_{key}_resnet34_resnet18")
        for key in (*_IMAGENET_METHODS, "dkl_kd", "ba_kd")
    },
}
_IMAGENET_MOBILENET = {
    "student": Row("imagenet_natural_mobilenet_v1"),
    **{key: Row(f"imagenet_{key}_resnet50_mobilenet_v1") for key in _IMAGENET_METHODS},
}
_IMAGENET_STRONG = {
    key: Row(f"imagenet_strong_{key}_beit_l_resnet50") for key in ("kd", "dkd", "dist", "ikl_kd")
}
_ON_IMAGENET = {
    "distillation-imagenet": _IMAGENET,
    "distillation-imagenet-mobilenet": _IMAGENET_MOBILENET,
    "distillation-imagenet-strong": _IMAGENET_STRONG,
}

EXPERIMENTS: dict[str, dict[str, Rows]] = {
    "robust-ablation": {"small": _SMALL_ABLATION, "paper": _PAPER_ABLATION},
    "robust-methods": {"small": _SMALL_METHODS, "paper": _PAPER_METHODS},
    "epsilon-sweep": {
        "small": {
            "trades": Row("fashion_mnist_trades_small", _SMALL_SWEEP),
            "ikl_at": Row("fashion_mnist_ikl_at_small", _SMALL_SWEEP),
        },
        # Their recipes hold the sweep over 2, 4, ..., 12 / 255.
        "paper": {"trades": Row("cifar100_kl_at"), "ikl_at": Row("cifar100_ikl_at")},
    },
    "hyperparameters": {"small": _SMALL_HYPERPARAMETERS, "paper": _PAPER_HYPERPARAMETERS},
    "other-attacks": {
        "small": _attacked(_SMALL_METHODS, _ATTACKED_KEYS),
        "paper": _attacked(_PAPER_METHODS, _ATTACKED_KEYS),
    },
    "distillation": {"small": _SMALL_DISTILLATION, "paper": _paper_distillation(_PAPER_PAIR)},
    # One experiment for each further column of tables 13 and 14, at full scale alone.
    **{
        f"distillation-{pair.replace('_', '-')}": {"paper": _paper_distillation(pair)}
        for pair in _PAIRS
        if pair != _PAPER_PAIR
    },
    **{name: {"paper": rows} for name, rows in _ON_IMAGENET.items()},
    "long-tailed": {"small": _SMALL_LONG_TAILED, "paper": _PAPER_LONG_TAILED},
    "distillation-speed": {
        "small": {key: Row(row.recipe) for key, row in _SMALL_STUDENTS.items()},
        "paper": _paper_distillation(_PAPER_PAIR),
    },
}

COSTS = frozenset({"distillation-speed"})
"""Experiments that time steps, and train and evaluate nothing."""

_BASELINES = {"robust-ablation": "kl"}


def baseline_of(experiment: str) -> str:
    """Return the key of the row that others are tested against.

    Example:
        >>> [baseline_of(name) for name in ("robust-ablation", "epsilon-sweep", "distillation")]
        ['kl', 'trades', 'kd']
    """
    if experiment.startswith("distillation"):
        return "kd"
    if experiment == "long-tailed":
        return "kl"
    return _BASELINES.get(experiment, "trades")


def layout_of(experiment: str) -> str:
    """Return the name of the experiment's table among those of ``dkl.reports``.

    Example:
        >>> layout_of("distillation-vgg13-vgg8"), layout_of("distillation-imagenet-strong")
        ('distillation', 'distillation-imagenet')
    """
    if experiment in _ON_IMAGENET:
        return "distillation-imagenet"
    pair = experiment.removeprefix("distillation-").replace("-", "_")
    return "distillation" if pair in _PAIRS else experiment


def rows_of(experiment: str, scale: str, experiments: Experiments | None = None) -> Rows:
    """Return the rows of an experiment.

    Args:
        experiment: a key of ``EXPERIMENTS``.
        scale: "small" or "paper".
        experiments: another table of experiments.

    Raises:
        ValueError: unknown name or scale.

    Example:
        >>> list(rows_of("robust-ablation", "small"))
        ['kl', 'dkl', 'ba', 'ikl']
    """
    table = EXPERIMENTS if experiments is None else experiments
    if experiment not in table:
        raise ValueError(f"unknown experiment {experiment!r}; there are: {', '.join(table)}")
    if scale not in table[experiment]:
        known = ", ".join(table[experiment])
        raise ValueError(f"{experiment} has no scale {scale!r}; it has: {known}")
    return table[experiment][scale]
