"""Records, tables, figures and the HTML report; they read run folders and know nothing else."""

from dkl.reports.figures import (
    class_margin_differences,
    class_table_heat_map,
    clean_versus_robust,
    robustness_curve,
    training_curves,
)
from dkl.reports.html import render_report, save_figures, write_report
from dkl.reports.origin import provenance, settings_hash
from dkl.reports.records import ResultRow, Run, RunError, append_results, read_run
from dkl.reports.tables import Table, compare

__all__ = [
    "ResultRow",
    "Run",
    "RunError",
    "Table",
    "append_results",
    "class_margin_differences",
    "class_table_heat_map",
    "clean_versus_robust",
    "compare",
    "provenance",
    "read_run",
    "render_report",
    "robustness_curve",
    "save_figures",
    "settings_hash",
    "training_curves",
    "write_report",
]
