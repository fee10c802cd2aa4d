"""The figures of the report, in its order: what draws each, and what it needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dkl.reports.class_accuracy import class_accuracies
from dkl.reports.feature_figures import feature_map, has_features
from dkl.reports.figures import (
    class_margin_differences,
    clean_versus_robust,
    robustness_curve,
    training_curves,
)
from dkl.reports.prediction_figures import (
    SHOT_METRICS,
    class_gain,
    reliability_diagram,
    shot_accuracies,
)
from dkl.reports.recipe_facts import setting
from dkl.reports.records import ResultRow, Run
from dkl.reports.tables import describe_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plan:
    """A figure of the report: what draws it, what it needs, and the command that makes that.

    ``everywhere``: the caption names the recipes that lack the data. ``optional``: the section is
    left out where no run has them. ``attacked``: likewise where runs are of distillation, which
    nobody attacks.
    """

    name: str
    title: str
    caption: str
    draw: "Callable[[Sequence[Run]], Figure | None]"
    has_data: Callable[[Run], bool]
    needs: str
    command: str
    everywhere: bool = True
    optional: bool = False
    attacked: bool = False

    def is_left_out(self, runs: Sequence[Run]) -> bool:
        """Tell whether a report on these runs says nothing of a figure that cannot be drawn."""
        has_teacher = any(setting(run.recipe, "method.teacher") is not None for run in runs)
        return self.optional or (self.attacked and has_teacher)


def _has_rows(*metrics: str) -> Callable[[Run], bool]:
    return lambda run: {*metrics} <= {row.metric for row in run.results if row.split == "test"}


def _is_attacked(row: ResultRow) -> bool:
    return row.norm is not None and row.split == "test" and describe_metric(row.metric) is not None


def _has_clean_and_robust(run: Run) -> bool:
    return _has_rows("clean_accuracy")(run) and any(map(_is_attacked, run.results))


PLANS = (
    Plan(
        name="training-curves",
        title="Training curves",
        caption="Lines are means over seeds; bands are one sample standard deviation around them. "
        "Validation images are held out of the training data. Accuracy under attack is that of "
        "the short attack that chooses the checkpoint, usually higher than those of the table.",
        draw=training_curves,
        has_data=lambda run: bool(run.epochs),
        needs="epoch records",
        command="dkl train {recipe}",
    ),
    Plan(
        name="clean-versus-robust",
        title="Clean versus robust accuracy",
        caption="Measured on test images; up and to the right is better. Published rows in grey "
        "are the paper's (tables 1 to 3 and 12): where they have a panel of their own, data, "
        "network and attack are others than ours, and only the pattern can be compared.",
        draw=clean_versus_robust,
        has_data=_has_clean_and_robust,
        needs="clean_accuracy rows and rows of an attack",
        command="dkl evaluate {run}",
        attacked=True,
    ),
    Plan(
        name="robustness-curve",
        title="Robustness over epsilon",
        caption="Test accuracy while the attack's budget grows. A curve that does not fall to "
        "zero for large budgets would point at a broken attack.",
        draw=robustness_curve,
        has_data=_has_rows("epsilon_sweep_accuracy"),
        needs="epsilon_sweep_accuracy rows",
        command="dkl evaluate {run}",
        attacked=True,
    ),
    Plan(
        name="shot-accuracies",
        title="Classes with many, medium and few training images",
        caption="Many: more than 100 training images of the class; few: fewer than 20. A group's "
        "accuracy is the mean over its classes.",
        draw=shot_accuracies,
        has_data=lambda run: any(
            _has_rows(metric)(run) for name, metric in SHOT_METRICS.items() if name != "all"
        ),
        needs="many_accuracy, medium_accuracy and few_accuracy rows",
        command="dkl evaluate {run}",
        everywhere=False,
        optional=True,
    ),
    Plan(
        name="class-gain",
        title="Gain by class",
        caption="Test accuracy of each class, IKL-KD minus KD. With several seeds, differences "
        "are taken seed by seed; a bar smaller than its deviation may be chance.",
        draw=class_gain,
        has_data=_has_rows("class_accuracy"),
        needs="class_accuracy rows of ikl_kd and of kd",
        command="dkl evaluate {run}",
        everywhere=False,
        optional=True,
    ),
    Plan(
        name="reliability",
        title="Reliability",
        caption="Blue: accuracy of the predictions of each confidence (15 bins), as far as their "
        "confidence promises it; green: accuracy beyond that; orange: what is missing of it. ECE, "
        "the expected calibration error, is the mean length of these pieces, weighted by the "
        "images below.",
        draw=reliability_diagram,
        has_data=_has_rows("reliability"),
        needs="reliability rows",
        command="dkl evaluate {run} evaluation.calibration=true",
        optional=True,
    ),
    Plan(
        name="class-accuracies",
        title="Accuracy by class",
        caption="Every class of the test data by itself: a mean hides classes that an attack "
        "breaks far more often than others.",
        draw=class_accuracies,
        has_data=_has_rows("class_accuracy"),
        needs="class_accuracy and class_robust_accuracy rows",
        command="dkl evaluate {run}",
        everywhere=False,
        optional=True,
    ),
    Plan(
        name="class-margins",
        title="Class margins",
        caption="Margin of a class: mean probability of the class over its images minus the "
        "largest mean probability of another class. Blue: the first recipe has the larger margin. "
        "Error bars, where there are several seeds, are standard errors of the difference.",
        draw=class_margin_differences,
        has_data=_has_rows("class_margin"),
        needs='class_margin rows of two recipes, one of them with "trades" in its name',
        command="dkl evaluate {run}",
        everywhere=False,
        attacked=True,
    ),
    Plan(
        name="features",
        title="Features of clean and adversarial images",
        caption="t-SNE places the features of each run by itself: compare how classes hang "
        "together, not positions or sizes across panels. The ratio of distances within and "
        "between classes is lower, and the silhouette higher, the more compact classes are; both "
        "are measured on the features, not on the picture.",
        draw=feature_map,
        has_data=has_features,
        needs="features.npz of a run",
        command="dkl evaluate {run}",
        everywhere=False,
        optional=True,
    ),
)
