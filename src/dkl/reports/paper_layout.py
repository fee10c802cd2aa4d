"""How each of the paper's tables is laid out: its published and its measured columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dkl.reports.measures import Measure, accuracy, sweep
from dkl.reports.published import PREVIOUS_BEST, PublishedRow
from dkl.reports.records import Run

Cell = float | str | None


@dataclass(frozen=True)
class PublishedColumn:
    """A column of published numbers: ``read`` gets all published rows of one key."""

    head: str
    title: str
    read: Callable[[Sequence[PublishedRow]], Cell]


@dataclass(frozen=True)
class Layout:
    """One of the paper's tables.

    Args:
        title: what the table shows.
        published: its published columns.
        measured: from all runs of the table to what is measured, in words, and the columns.
        baseline: key of the row that others are compared with; None compares nothing.
        compared: titles of the measured columns that are compared.
        settings: start of a row's key -> the setting that the row varies.
        notes: what a reader must know beside the conflicts between tables.
        own: from a row's key and one of its runs to the part of the run that is the row's; None
            takes the whole run.
        remarks: from all runs to further notes.
        decimals: of the published numbers.
    """

    title: str
    published: tuple[PublishedColumn, ...]
    measured: Callable[[Sequence[Run]], tuple[str, list[Measure]]]
    baseline: str | None = None
    compared: tuple[str, ...] = ("clean", "AutoAttack")
    settings: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    own: Callable[[str, Run], Run] | None = None
    remarks: Callable[[Sequence[Run]], list[str]] | None = None
    decimals: int = 2


def _first(rows: Sequence[PublishedRow], dataset: str) -> PublishedRow | None:
    return next((row for row in rows if row.dataset == dataset), None)


def _number(
    head: str, title: str, read: Callable[[PublishedRow], float | None], dataset: str = "CIFAR-100"
) -> PublishedColumn:
    def cell(rows: Sequence[PublishedRow]) -> float | None:
        row = _first(rows, dataset)
        return None if row is None else read(row)

    return PublishedColumn(head, title, cell)


def _both(head: str, dataset: str = "CIFAR-100") -> tuple[PublishedColumn, PublishedColumn]:
    return (
        _number(head, "clean", lambda row: row.clean, dataset),
        _number(head, "AA", lambda row: row.auto_attack, dataset),
    )


def _other(head: str, title: str, name: str) -> PublishedColumn:
    return _number(head, title, lambda row: row.others.get(name))


def _network(head: str, dataset: str) -> PublishedColumn:
    def cell(rows: Sequence[PublishedRow]) -> str | None:
        row = _first(rows, dataset)
        return None if row is None else row.network

    return PublishedColumn(head, "network", cell)


def _budget(head: str, steps: int) -> PublishedColumn:
    return _number(head, f"{steps}/255", lambda row: row.by_epsilon.get(steps))


def _clean_and_auto_attack(runs: Sequence[Run]) -> tuple[str, list[Measure]]:
    del runs
    return "", [_CLEAN, _AUTO_ATTACK]


def _budgets(runs: Sequence[Run]) -> tuple[str, list[Measure]]:
    attack, columns = sweep(runs)
    return attack, [_CLEAN, *columns]


def _all_attacks(runs: Sequence[Run]) -> tuple[str, list[Measure]]:
    del runs
    strengths = [
        accuracy(f"{name}-{steps}", f"{name.lower()}_{steps}_accuracy")
        for name in ("PGD", "CW")
        for steps in (10, 20)
    ]
    return "", [_CLEAN, *strengths, _AUTO_ATTACK, accuracy("worst", "worst_case_accuracy")]


_CLEAN = accuracy("clean", "clean_accuracy")
_AUTO_ATTACK = accuracy("AutoAttack", "auto_attack_accuracy", "auto_attack_fast_accuracy")
_HEAD = "published, CIFAR-100, WRN-34-10, 200 epochs"
_SWEEP_HEAD = f"{_HEAD}, AutoAttack by epsilon"
_ATTACKS_HEAD = "published, CIFAR-100"
_PREVIOUS = ", ".join(
    f"{row.augmentation} {row.clean:.2f} / {row.auto_attack:.2f}" for row in PREVIOUS_BEST
)

LAYOUTS: Mapping[str, Layout] = {
    "robust-ablation": Layout(
        title="Ablation of the loss (table 1)",
        published=(
            *_both(_HEAD),
            _other("published, ImageNet, ResNet-34 to ResNet-18", "top-1", "imagenet_top1"),
        ),
        measured=_clean_and_auto_attack,
        baseline="kl",
        notes=(
            "BA: gradients of the squared error reach both predictions; GI: its weights are class "
            "means.",
        ),
    ),
    "robust-methods": Layout(
        title="Methods of adversarial training (tables 2 and 3)",
        published=(
            *_both("published, CIFAR-100", "CIFAR-100"),
            _network("published, CIFAR-100", "CIFAR-100"),
            *_both("published, CIFAR-10", "CIFAR-10"),
            _network("published, CIFAR-10", "CIFAR-10"),
        ),
        measured=_clean_and_auto_attack,
        baseline="trades",
        notes=(
            "The paper's row AWP is AT with AWP for CIFAR-100; for CIFAR-10 its numbers are those "
            "that RobustBench lists for TRADES with AWP.",
            f"Table 12 names the best of RobustBench before the paper, CIFAR-100: {_PREVIOUS}.",
        ),
    ),
    "hyperparameters": Layout(
        title="Weights and temperature of IKL (tables 7, 8 and 9)",
        published=_both(_HEAD),
        measured=_clean_and_auto_attack,
        settings={
            "mse": "method.mse_weight",
            "ce": "method.ce_weight",
            "tau": "method.weight_temperature",
        },
        notes=(
            "a is method.mse_weight (the 1/4 of the loss is inside: a/4 = 5 is mse_weight 20), b "
            "is method.ce_weight, tau is method.weight_temperature.",
        ),
    ),
    "epsilon-sweep": Layout(
        title="Accuracy by attack budget (table 10)",
        published=(
            _number(_SWEEP_HEAD, "clean", lambda row: row.clean),
            *(_budget(_SWEEP_HEAD, steps) for steps in (2, 4, 6, 8, 10, 12)),
            _other(_SWEEP_HEAD, "mean", "mean"),
        ),
        measured=_budgets,
        baseline="trades",
        compared=("clean", "mean"),
        notes=("The mean is over the budgets above zero.",),
    ),
    "other-attacks": Layout(
        title="Other attacks (table 11)",
        published=(
            _number(_ATTACKS_HEAD, "clean", lambda row: row.clean),
            _other(_ATTACKS_HEAD, "PGD-10", "pgd_10"),
            _other(_ATTACKS_HEAD, "PGD-20", "pgd_20"),
            _other(_ATTACKS_HEAD, "CW-10", "cw_10"),
            _other(_ATTACKS_HEAD, "CW-20", "cw_20"),
            _number(_ATTACKS_HEAD, "AA", lambda row: row.auto_attack),
            _other(_ATTACKS_HEAD, "worst", "worst_case"),
            _network(_ATTACKS_HEAD, "CIFAR-100"),
        ),
        measured=_all_attacks,
        baseline="trades",
        notes=(
            "Worst: an image counts where it withstands every one of these attacks.",
            "Published PGD and CW step 2/255 at a time.",
        ),
    ),
}
