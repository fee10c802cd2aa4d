"""Time of training a student from cached answers against running its teacher, and of caching.

    python benchmarks/teacher_cache.py [--teacher RUN] [--json] [--rounds 5] [--epochs 2]

The student is that of fashion_mnist_kd_small, the teacher that of fashion_mnist_teacher_small (RUN,
or one trained here on few images: speed does not depend on how good it is), with augmentation, so
that every epoch has answers of its own. Each round trains with the live teacher, writes the cache
afresh, and trains from it, so that a busy machine disturbs all three; ratios are taken within
rounds. Times are those of the steps of all epochs, as the runs record them, without validation and
loading; of caching, that of loading and asking the teacher, and writing.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dkl import config
from dkl.build import train_recipe
from dkl.build.teacher_caching import prepare_caching, write_cache
from dkl.engine.recorder import read_rows

AUGMENT = "data.augment={padding: 2, flip: true}"


def student(teacher: Path, options: argparse.Namespace) -> config.Recipe:
    return config.load_recipe(
        "fashion_mnist_kd_small",
        [
            f"method.teacher.run={json.dumps(str(teacher))}",
            AUGMENT,
            f"data.train_limit={options.num_images}",
            f"training.epochs={options.epochs}",
            f"training.threads={options.threads}",
            "trackers=[]",
            "evaluation.fidelity=false",
        ],
    )


def quick_teacher(folder: Path) -> Path:
    settings = ["training.epochs=1", "data.train_limit=1000", "trackers=[]"]
    train_recipe(config.load_recipe("fashion_mnist_teacher_small", settings), folder)
    return folder


def train(recipe: config.Recipe, run: Path) -> float:
    train_recipe(recipe, run)
    rows = read_rows(run / "records.jsonl")
    return sum(float(row["seconds"]) for row in rows if row["kind"] == "epoch")


def one_round(recipe: config.Recipe, folder: Path) -> dict[str, float]:
    live = train(recipe, folder / "live")
    outcome = write_cache(prepare_caching(recipe, folder / "cache"))
    cached = config.override(recipe, [f"method.teacher.cache={json.dumps(str(folder / 'cache'))}"])
    return {
        "live_seconds": live,
        "cached_seconds": train(cached, folder / "cached"),
        "caching_seconds": outcome.seconds,
        "cache_megabytes": outcome.num_bytes / 1e6,
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return median, smallest and largest of every figure and of the ratios within rounds."""
    figures = {name: [one[name] for one in rounds] for name in rounds[0]}
    for name in ("cached", "caching"):
        figures[f"{name}_over_live"] = [
            one[f"{name}_seconds"] / one["live_seconds"] for one in rounds
        ]
    return {
        name: [statistics.median(values), min(values), max(values)]
        for name, values in figures.items()
    }


def machine(threads: int) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_table(report: dict[str, Any]) -> None:
    for part in ("machine", "settings"):
        print(", ".join(f"{key} {value}" for key, value in report[part].items()))
    print("medians over the rounds (smallest to largest)\n")
    for name, (median, low, high) in report["figures"].items():
        print(f"{name:20}{median:10.3f} ({low:.3f} to {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", type=Path, help="run of a teacher of Fashion-MNIST")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--num-images", type=int, default=10000, help="images in an epoch")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    options = parser.parse_args()
    if min(options.rounds, options.epochs, options.num_images, options.threads) < 1:
        sys.exit("rounds, epochs, num-images and threads must be 1 or more")
    logging.disable(logging.WARNING)
    about = machine(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = student(options.teacher or quick_teacher(folder / "teacher"), options)
        # The first round warms up.
        rounds = [one_round(recipe, folder / str(n)) for n in range(options.rounds + 1)][1:]
    settings = {
        "rounds": options.rounds,
        "epochs": options.epochs,
        "num_images": options.num_images,
        "batch_size": recipe.training.batch_size,
    }
    report = {"machine": about, "settings": settings, "figures": summary(rounds)}
    print(json.dumps(report)) if options.json else print_table(report)


if __name__ == "__main__":
    main()
