"""How the paper's tables on distillation are laid out: 4, 5, 13, 14, 15 and 18."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from dkl.reports.groups import find_row
from dkl.reports.measures import Measure, Reading, accuracy
from dkl.reports.paper_layout import Cell, Layout, PublishedColumn
from dkl.reports.published import PublishedRow
from dkl.reports.published_distillation import (
    CIFAR_OTHER_PAIRS,
    CIFAR_PAIRS,
    IMAGENET_PAIRS,
    LONG_TAILED_PAIRS,
    SHOTS,
    STRONG_PAIR,
)
from dkl.reports.records import ResultRow, Run
from dkl.reports.tables import PREDICTIONS

SECONDS, PARAMETERS = "seconds_per_iteration", "extra_parameters"
_REFERENCE = "kd"  # whose time others are compared with


def _published(head: str, title: str, name: str) -> PublishedColumn:
    """Return a column of the number that a row of the key has under a name."""

    def cell(rows: Sequence[PublishedRow]) -> Cell:
        return next((row.others[name] for row in rows if name in row.others), None)

    return PublishedColumn(head, title, cell)


def _columns(head: str, names: Mapping[str, str]) -> tuple[PublishedColumn, ...]:
    return tuple(_published(head, title, name) for name, title in names.items())


def _prediction(metric: str) -> Measure:
    """Return a column of calibration or fidelity."""
    title, unit = PREDICTIONS[metric]
    factor = 100.0 if unit == "%" else 1.0

    def read(run: Run) -> Reading | None:
        row = find_row(run, metric)
        return None if row is None else Reading(factor * row.value, (row,))

    return Measure(title, read, unit, None if unit == "%" else 3)


def _with_predictions(
    *accuracies: Measure,
) -> Callable[[Sequence[Run]], tuple[str, list[Measure]]]:
    """Return what measures these accuracies, and what else of the predictions some run has."""

    def measured(runs: Sequence[Run]) -> tuple[str, list[Measure]]:
        found = {row.metric for run in runs for row in run.results}
        return "", [
            *accuracies,
            *(_prediction(metric) for metric in PREDICTIONS if metric in found),
        ]

    return measured


def _costs(run: Run) -> list[ResultRow]:
    return [row for row in run.results if row.metric in (SECONDS, PARAMETERS)]


def _own_costs(key: str, run: Run) -> Run:
    """Return a run with the costs of one method alone: one folder may hold those of all."""
    rows = [row for row in _costs(run) if row.details.get("method", key) == key]
    return replace(run, results=tuple(rows))


def _cost_measures(runs: Sequence[Run]) -> tuple[str, list[Measure]]:
    """Return time, time relative to KD on the same machine with the same seed, and parameters."""
    reference = {
        (run.seed, row.device): row
        for run in runs
        for row in _costs(run)
        if row.metric == SECONDS and row.details.get("method") == _REFERENCE
    }

    def read(metric: str) -> Callable[[Run], Reading | None]:
        def reading(run: Run) -> Reading | None:
            row = next((row for row in _costs(run) if row.metric == metric), None)
            return None if row is None else Reading(row.value, (row,))

        return reading

    def relative(run: Run) -> Reading | None:
        row = next((row for row in _costs(run) if row.metric == SECONDS), None)
        base = None if row is None else reference.get((run.seed, row.device))
        if row is None or base is None or base.value == 0:
            return None
        return Reading(row.value / base.value, (row, base))

    return "", [
        Measure("s/iteration", read(SECONDS), "", 4),
        Measure("relative to KD", relative, "", 2),
        Measure("extra parameters", read(PARAMETERS), "", 0),
    ]


def _cost_remarks(runs: Sequence[Run]) -> list[str]:
    rows = [row for run in runs for row in _costs(run)]
    devices = list(dict.fromkeys(row.device or "a machine that was not recorded" for row in rows))
    if not devices:
        return []
    text = f"Times were measured on {'; '.join(devices)}."
    if len(devices) > 1:
        text += " Only those of one machine are compared."
    return [text]


_TOP1 = accuracy("top-1", "clean_accuracy")
_SHOT_MEASURES = tuple(
    accuracy(shot, "clean_accuracy" if shot == "all" else f"{shot}_accuracy") for shot in SHOTS
)
_ALONE = "Teacher and student: the published accuracies of the networks by themselves."

DISTILLATION_LAYOUTS: Mapping[str, Layout] = {
    "distillation": Layout(
        title="Methods of distillation (tables 13 and 14)",
        published=(
            *_columns("published, CIFAR-100, networks of one family", CIFAR_PAIRS),
            *_columns("published, CIFAR-100, networks of two families", CIFAR_OTHER_PAIRS),
        ),
        measured=_with_predictions(_TOP1),
        baseline="kd",
        compared=("top-1",),
        notes=(
            _ALONE,
            "The code that the paper builds on reports the best epoch on test images; measured "
            "rows are of one checkpoint that no test image has chosen.",
            "OFD with ShuffleNet and MobileNet students: taken from earlier papers; that code "
            "cannot train them.",
        ),
    ),
    "distillation-imagenet": Layout(
        title="Distillation on ImageNet (tables 4, 15 and 1)",
        published=(
            *_columns("published, ImageNet, 100 epochs", IMAGENET_PAIRS),
            _published("published, ImageNet, strong recipe", "BEiT-L-R50", STRONG_PAIR),
        ),
        measured=_with_predictions(_TOP1),
        baseline="kd",
        compared=("top-1",),
        notes=(_ALONE, "Table 1 has DKL-KD, and with BA, for R34-R18."),
    ),
    "distillation-speed": Layout(
        title="Cost of distillation (speed of table 4)",
        published=_columns(
            "published, s/iteration, ImageNet, batch 512, 4 RTX 3090",
            {f"seconds_{pair}": title for pair, title in IMAGENET_PAIRS.items()},
        ),
        measured=_cost_measures,
        compared=(),
        notes=(
            "An iteration is a step of training: batch, teacher, student, loss, gradient and "
            "update. Extra parameters are trained with the student and thrown away afterwards.",
            "Other networks, data and machines: compare ratios, not seconds.",
        ),
        own=_own_costs,
        remarks=_cost_remarks,
        decimals=3,
    ),
    "long-tailed": Layout(
        title="Long-tailed data (tables 5 and 18)",
        published=(
            *(
                _published(f"published, ImageNet-LT, {words}", shot, f"{pair} {shot}")
                for pair, words in LONG_TAILED_PAIRS.items()
                for shot in SHOTS
            ),
            _published("published, table 18, all classes", "X101-R50", "resnext101-resnet50"),
            _published("published, table 18, all classes", "R50-R50", "self resnet50"),
        ),
        measured=_with_predictions(*_SHOT_MEASURES),
        baseline="kl",
        compared=SHOTS,
        notes=(
            "Classes with more than 100 training images are many, with fewer than 20 few, the "
            "others medium; each group is the mean of its classes.",
            "The teacher's row is one network and stands under both pairs.",
            "The authors' script reports the best epoch on test images.",
        ),
    ),
}
