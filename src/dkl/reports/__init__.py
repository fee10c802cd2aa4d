"""Records, tables, figures and the HTML report; they read run folders and know nothing else."""

from dkl.reports.class_accuracy import class_accuracies
from dkl.reports.feature_figures import feature_map
from dkl.reports.figures import (
    class_margin_differences,
    class_table_heat_map,
    clean_versus_robust,
    robustness_curve,
    training_curves,
)
from dkl.reports.html import render_report, save_figures, write_report
from dkl.reports.masking import MaskingChecks, masking_checks
from dkl.reports.origin import provenance, settings_hash
from dkl.reports.paper_tables import PaperTable, paper_table
from dkl.reports.prediction_figures import class_gain, reliability_diagram, shot_accuracies
from dkl.reports.published import PUBLISHED, PublishedRow
from dkl.reports.published_distillation import PUBLISHED_DISTILLATION
from dkl.reports.records import ResultRow, Run, RunError, append_results, read_run
from dkl.reports.tables import Table, compare

__all__ = [
    "PUBLISHED",
    "PUBLISHED_DISTILLATION",
    "MaskingChecks",
    "PaperTable",
    "PublishedRow",
    "ResultRow",
    "Run",
    "RunError",
    "Table",
    "append_results",
    "class_accuracies",
    "class_gain",
    "class_margin_differences",
    "class_table_heat_map",
    "clean_versus_robust",
    "compare",
    "feature_map",
    "masking_checks",
    "paper_table",
    "provenance",
    "read_run",
    "reliability_diagram",
    "render_report",
    "robustness_curve",
    "save_figures",
    "settings_hash",
    "shot_accuracies",
    "training_curves",
    "write_report",
]
