"""Numbers of the paper, as plain data; nothing in this file was measured here.

Source of every number: Cui, Tian, Zhong, Qi, Yu, Zhang, "Decoupled Kullback-Leibler Divergence
Loss", NeurIPS 2024 (arXiv 2305.13948); each row names its table. Accuracies are percent; attacks
are bounded by 8/255 in Linf unless a row says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "CONFLICTS",
    "EPSILON_SWEEP",
    "HYPERPARAMETERS",
    "OTHER_ATTACKS",
    "PREVIOUS_BEST",
    "PUBLISHED",
    "ROBUST_ABLATION",
    "ROBUST_METHODS",
    "SOURCE",
    "AugmentationClass",
    "PublishedRow",
]

SOURCE = "Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024 (arXiv 2305.13948)"
AugmentationClass = Literal["basic", "autoaugment", "generated"]


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One row of a table of the paper.

    Args:
        key: name of the row here; measured runs are attached to it.
        label: what the row is called.
        table: number of the paper's table; 0 for a row that the paper does not have.
        dataset: what was learnt, "" where no number is published.
        architecture: the network.
        augmentation: "basic" (crop and flip), "autoaugment" or "generated" (images beside the real
            ones).
        epochs: length of training, where the paper states it.
        generated: how many generated images.
        clean: clean accuracy in percent.
        auto_attack: accuracy under AutoAttack (standard, Linf, 8/255) in percent.
        others: further numbers of the row by name ("pgd_10", "worst_case", "imagenet_top1"), in
            percent; names that begin with "seconds" are seconds per iteration.
        by_epsilon: accuracy under AutoAttack by budget in units of 1/255, in percent.
    """

    key: str
    label: str
    table: int
    dataset: str = "CIFAR-100"
    architecture: str = "WRN-34-10"
    augmentation: AugmentationClass = "basic"
    epochs: int | None = None
    generated: str = ""
    clean: float | None = None
    auto_attack: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    by_epsilon: Mapping[int, float] = field(default_factory=dict)

    @property
    def network(self) -> str:
        """The network, and what else was particular: epochs and generated images."""
        parts = [self.architecture]
        if self.epochs is not None:
            parts.append(f"{self.epochs} epochs")
        if self.generated:
            parts.append(f"{self.generated} generated")
        return ", ".join(parts)


def _ablation(
    key: str, label: str, clean: float, auto_attack: float, imagenet: float
) -> PublishedRow:
    """Make a row of table 1: adversarial training, and distillation on ImageNet (R34 to R18)."""
    return PublishedRow(
        key=key,
        label=label,
        table=1,
        epochs=200,
        clean=clean,
        auto_attack=auto_attack,
        others={"imagenet_top1": imagenet},
    )


ROBUST_ABLATION = (
    _ablation("kl", "KL (TRADES)", 62.87, 30.29, 71.03),
    _ablation("dkl", "DKL", 62.54, 30.20, 71.03),
    _ablation("ba", "DKL + BA", 62.69, 30.42, 71.80),
    _ablation("ikl", "DKL + BA + GI = IKL", 65.76, 31.91, 71.91),
)


def _method(
    key: str,
    label: str,
    cifar100: tuple[float, float] | None = None,
    cifar10: tuple[float, float] | None = None,
    *,
    cifar10_architecture: str = "WRN-34-10",
    augmentation: AugmentationClass = "basic",
    epochs: int | None = None,
) -> tuple[PublishedRow, ...]:
    """Make the rows of a method in tables 2 (CIFAR-100) and 3 (CIFAR-10), as far as they exist."""
    rows = []
    generated = augmentation == "generated"
    for table, dataset, numbers in ((2, "CIFAR-100", cifar100), (3, "CIFAR-10", cifar10)):
        if numbers is not None:
            architecture = "WRN-34-10" if table == 2 else cifar10_architecture
            rows.append(
                PublishedRow(
                    key=key,
                    label=label,
                    table=table,
                    dataset=dataset,
                    architecture="WRN-28-10" if generated else architecture,
                    augmentation=augmentation,
                    epochs=epochs,
                    generated=("50M" if table == 2 else "20M") if generated else "",
                    clean=numbers[0],
                    auto_attack=numbers[1],
                )
            )
    absent = PublishedRow(
        key=key, label=label, table=0, dataset="", architecture="", augmentation=augmentation
    )
    return tuple(rows) or (absent,)


ROBUST_METHODS = (
    *_method("natural", "natural"),
    *_method("pgd_at", "PGD-AT", None, (85.34, 53.42), cifar10_architecture="WRN-34-20"),
    *_method("pgd_at_awp", "AWP", (60.38, 28.86), (85.36, 56.17)),
    *_method("trades", "TRADES"),
    *_method("trades_awp", "TRADES-AWP"),
    *_method("mart", "MART"),
    *_method("lbgat", "LBGAT", (60.64, 29.33), (88.70, 53.57), cifar10_architecture="WRN-34-20"),
    *_method("las_at", "LAS-AT", (64.89, 30.77), (87.74, 55.52)),
    *_method("acat", "ACAT", (65.75, 30.23), (82.41, 55.36)),
    *_method(
        "acat_autoaugment",
        "ACAT + AutoAugment",
        (68.74, 31.30),
        (88.64, 57.05),
        augmentation="autoaugment",
    ),
    *_method("dajat", "DAJAT", augmentation="autoaugment"),
    *_method("ikl_at", "IKL-AT", (65.76, 31.91), (84.80, 57.09), epochs=200),
    *_method("gkl_at", "GKL-AT"),
    *_method(
        "ikl_at_autoaugment",
        "IKL-AT + AutoAugment",
        (66.08, 32.53),
        (85.20, 57.62),
        augmentation="autoaugment",
        epochs=200,
    ),
    *_method("dm_at", "DM-AT", (72.58, 38.83), (92.44, 67.31), augmentation="generated"),
    *_method(
        "ikl_at_generated",
        "IKL-AT + generated",
        (73.85, 39.18),
        (92.16, 67.75),
        augmentation="generated",
    ),
)


def _setting(table: int, key: str, label: str, clean: float, auto_attack: float) -> PublishedRow:
    return PublishedRow(
        key=key, label=label, table=table, epochs=200, clean=clean, auto_attack=auto_attack
    )


HYPERPARAMETERS = (
    _setting(7, "mse_3", "a/4 = 3", 67.52, 31.29),
    _setting(7, "mse_4", "a/4 = 4", 66.26, 31.33),
    _setting(7, "mse_5", "a/4 = 5", 65.76, 31.91),
    _setting(7, "mse_6", "a/4 = 6", 65.14, 31.64),
    _setting(8, "ce_2", "b = 2", 66.13, 30.95),
    _setting(8, "ce_3", "b = 3", 66.31, 31.33),
    _setting(8, "ce_4", "b = 4", 66.00, 31.57),
    _setting(8, "ce_5", "b = 5", 65.76, 31.91),
    _setting(9, "tau_1", "tau = 1", 59.99, 31.35),
    _setting(9, "tau_2", "tau = 2", 63.77, 31.88),
    _setting(9, "tau_3", "tau = 3", 65.28, 31.69),
    _setting(9, "tau_4", "tau = 4", 65.76, 31.91),
)

EPSILON_SWEEP = (
    PublishedRow(
        key="trades",
        label="TRADES",
        table=10,
        epochs=200,
        clean=62.87,
        auto_attack=30.29,
        by_epsilon={2: 53.88, 4: 45.31, 6: 37.28, 8: 30.29, 10: 24.28, 12: 19.17},
        others={"mean": 35.04},
    ),
    PublishedRow(
        key="ikl_at",
        label="IKL-AT",
        table=10,
        epochs=200,
        clean=63.40,
        auto_attack=31.91,
        by_epsilon={2: 55.31, 4: 46.76, 6: 38.98, 8: 31.91, 10: 25.33, 12: 19.98},
        others={"mean": 36.38},
    ),
)


def _attacks(
    clean: float,
    pgd_10: float,
    pgd_20: float,
    cw_10: float,
    cw_20: float,
    auto_attack: float,
    worst_case: float,
    *,
    key: str,
    label: str,
    augmentation: AugmentationClass = "basic",
) -> PublishedRow:
    """Make a row of table 11; its PGD and CW step 2/255 at a time."""
    generated = augmentation == "generated"
    return PublishedRow(
        key=key,
        label=label,
        table=11,
        architecture="WRN-28-10" if generated else "WRN-34-10",
        augmentation=augmentation,
        epochs=None if generated else 200,
        generated="50M" if generated else "",
        clean=clean,
        auto_attack=auto_attack,
        others={
            "pgd_10": pgd_10,
            "pgd_20": pgd_20,
            "cw_10": cw_10,
            "cw_20": cw_20,
            "worst_case": worst_case,
        },
    )


OTHER_ATTACKS = (
    _attacks(62.87, 36.01, 35.84, 40.03, 39.86, 30.29, 30.29, key="trades", label="KL (TRADES)"),
    _attacks(63.40, 36.78, 36.55, 40.72, 40.47, 31.91, 31.92, key="ikl_at", label="IKL-AT"),
    _attacks(
        *(65.93, 38.15, 37.75, 41.10, 40.86, 32.53, 32.52),
        key="ikl_at_autoaugment",
        label="IKL-AT + AutoAugment",
        augmentation="autoaugment",
    ),
    _attacks(
        *(73.85, 44.43, 44.12, 47.59, 47.53, 39.18, 39.18),
        key="ikl_at_generated",
        label="IKL-AT + generated",
        augmentation="generated",
    ),
)

# Table 12: what stood first on RobustBench (CIFAR-100) before the paper, per augmentation class.
PREVIOUS_BEST = (
    PublishedRow(
        key="previous_best_basic",
        label="previous best, basic",
        table=12,
        architecture="",
        clean=62.99,
        auto_attack=31.20,
    ),
    PublishedRow(
        key="previous_best_autoaugment",
        label="previous best, AutoAugment",
        table=12,
        architecture="",
        augmentation="autoaugment",
        clean=68.75,
        auto_attack=31.85,
    ),
    PublishedRow(
        key="previous_best_generated",
        label="previous best, generated",
        table=12,
        architecture="WRN-28-10",
        augmentation="generated",
        generated="50M",
        clean=72.58,
        auto_attack=38.83,
    ),
)

PUBLISHED: Mapping[str, tuple[PublishedRow, ...]] = {
    "robust-ablation": ROBUST_ABLATION,
    "robust-methods": ROBUST_METHODS,
    "hyperparameters": HYPERPARAMETERS,
    "epsilon-sweep": EPSILON_SWEEP,
    "other-attacks": OTHER_ATTACKS,
}

# Where the paper's tables disagree with each other or with RobustBench: tables -> what to know.
CONFLICTS: tuple[tuple[frozenset[int], str], ...] = (
    (
        frozenset({1, 2, 7, 8, 9, 10, 11}),
        "Clean accuracy of IKL-AT beside AutoAttack 31.91 is 65.76 in tables 1, 2 and 7 to 9, and "
        "63.40 in tables 10 and 11.",
    ),
    (
        frozenset({2, 11, 12}),
        "Clean accuracy of IKL-AT with AutoAugment is 66.08 in tables 2 and 12, and 65.93 in table "
        "11; RobustBench lists 65.93 / 32.52.",
    ),
    (
        frozenset({11}),
        'The "worst" column, which cannot exceed any other attack, exceeds AutoAttack by 0.01 for '
        "IKL-AT (31.92 and 31.91).",
    ),
    (
        frozenset({3}),
        "RobustBench lists IKL-AT on CIFAR-10 as 85.31 / 57.09 and, with 20M generated images, as "
        "92.16 / 67.73.",
    ),
)
