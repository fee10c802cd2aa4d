"""What does IKL do for me? Train, attack and compare on scikit-learn's real digits, on two cores.

Natural, TRADES and IKL-AT training and two distilled students, three seeds each, AutoAttack on each
adversarial comparison, one table and one report. Run again after a stop, it goes on where it was.
"""

import argparse
import logging
import os
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

STUDENTS = ("digits_kd", "digits_ikl_kd")
RECIPES = ("digits_natural", "digits_trades", "digits_ikl_at", *STUDENTS)


def run_job(job: tuple[str, int], options: argparse.Namespace, states: Any) -> str:
    """Train and evaluate one recipe with one seed, in a worker process; return what came out."""
    import torch

    from dkl.build import evaluate_run, train_recipe
    from dkl.config import load_recipe

    torch.set_num_threads(1)
    recipe, seed = job
    name, run = f"{recipe} seed {seed}", options.out / recipe / f"seed_{seed}"
    overrides = [f"seed={seed}", *options.settings]
    if recipe in STUDENTS:
        overrides.append(f"method.teacher.run={options.out}/digits_natural/seed_{seed}")
    else:
        overrides.append(f"evaluation.num_images={options.num_images}")
    log = logging.getLogger("dkl.engine")
    log.handlers, log.propagate = [_States(states, name)], False
    log.setLevel(logging.INFO)
    states[name] = "starting"
    started = time.perf_counter()
    train_recipe(load_recipe(recipe, overrides), run, resume=(run / "checkpoints").is_dir())
    trained = time.perf_counter()

    def progress(what: str, state: Any) -> None:
        where = "" if state is None else f" {state.attack}, {state.num_robust} robust"
        states[name] = f"measuring {what}{where}"

    rows = evaluate_run(run, progress=progress)
    states.pop(name, None)
    shown = ", ".join(
        f"{row.metric.removesuffix('_accuracy').replace('_', ' ')} {100 * row.value:.1f} %"
        for row in rows
        if row.metric in ("clean_accuracy", "auto_attack_accuracy")
    )
    measuring = time.perf_counter() - trained
    return f"{name}: {shown} (trained in {trained - started:.0f} s, measured in {measuring:.0f} s)"


class _States(logging.Handler):
    """Turns the loop's line per epoch into the state that the parent shows."""

    def __init__(self, states: Any, name: str) -> None:
        super().__init__()
        self.states, self.job = states, name

    def emit(self, record: logging.LogRecord) -> None:
        self.states[self.job] = "training, " + record.getMessage().split(":")[0]


def run_all(jobs: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Run all jobs in worker processes, students after their teachers, and show progress."""
    console = Console()
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(options.workers, mp_context=context) as pool,
        Progress(*columns, console=console) as progress,
    ):
        states = manager.dict()
        bar = progress.add_task("runs", total=len(jobs))
        waiting, running, done = list(jobs), {}, set[tuple[str, int]]()
        while waiting or running:
            for job in [job for job in waiting if _is_ready(job, done)]:
                waiting.remove(job)
                running[pool.submit(run_job, job, options, states)] = job
            finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in finished:
                done.add(running.pop(future))
                progress.console.print(future.result(), soft_wrap=True)
                progress.advance(bar)
            live = "; ".join(f"{name}: {state}" for name, state in sorted(states.items()))
            progress.update(bar, description=live or "runs")


def _is_ready(job: tuple[str, int], done: set[tuple[str, int]]) -> bool:
    return job[0] not in STUDENTS or ("digits_natural", job[1]) in done


def main() -> None:
    """Run the quickstart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changes of all recipes")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--num-images", type=int, default=200, help="test images under attack")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    started = time.perf_counter()
    jobs = [(recipe, seed) for recipe in RECIPES for seed in range(options.seeds)]
    run_all(jobs, options)

    from dkl.cli.output import print_table
    from dkl.reports import compare, read_run, write_report

    runs = [read_run(options.out / recipe / f"seed_{seed}") for recipe, seed in jobs]
    print_table(compare(runs).to_rich())
    report = write_report(runs, options.out / "report.html")
    console = Console(width=max(Console().width, 110))
    console.print(f"AutoAttack: standard, {options.num_images} test images, Linf eps 0.2.")
    console.print(f"Report: {report.resolve()}  ({time.perf_counter() - started:.0f} s in all)")


if __name__ == "__main__":
    main()
