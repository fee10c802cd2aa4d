"""The paper's experiments: their rows, a resumable queue that runs them, estimates, tables."""

from dkl.build.reproduce.costs import measure_costs
from dkl.build.reproduce.estimate import JobEstimate, estimate_jobs
from dkl.build.reproduce.experiments import COSTS, EXPERIMENTS, SCALES, Row, baseline_of, rows_of
from dkl.build.reproduce.folders import is_done, is_trained, refuse_others
from dkl.build.reproduce.jobs import Job, plan_jobs
from dkl.build.reproduce.outcome import collect_runs, make_table, save_outcome, table_document
from dkl.build.reproduce.preflight import check_data, check_device, check_disk, recipes_of
from dkl.build.reproduce.queue import JobReport, QueueResult, remaining_seconds, run_queue

__all__ = [
    "COSTS",
    "EXPERIMENTS",
    "SCALES",
    "Job",
    "JobEstimate",
    "JobReport",
    "QueueResult",
    "Row",
    "baseline_of",
    "check_data",
    "check_device",
    "check_disk",
    "collect_runs",
    "estimate_jobs",
    "is_done",
    "is_trained",
    "make_table",
    "measure_costs",
    "plan_jobs",
    "recipes_of",
    "refuse_others",
    "remaining_seconds",
    "rows_of",
    "run_queue",
    "save_outcome",
    "table_document",
]
