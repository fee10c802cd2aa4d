"""Synthetic run folders with plausible, varied numbers."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dkl.reports import ResultRow, append_results, settings_hash

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# name -> final clean accuracy, robustness (AutoAttack), training seconds per epoch, margin level
RECIPES = {
    "digits_natural": (0.989, 0.0, 0.08, 0.97),
    "digits_trades": (0.981, 0.46, 0.41, 0.62),
    "digits_ikl_at": (0.983, 0.535, 0.45, 0.66),
}

WriteRun = Callable[..., Path]


def recipe_of(name: str, seed: int, **changes: object) -> dict[str, object]:
    recipe: dict[str, object] = {
        "name": name,
        "seed": seed,
        "data": {"name": "digits", "folder": None, "validation": 0.1},
        "model": {"name": "convnet_small", "num_classes": 10},
        "method": {"name": name.split("_", 1)[-1], "mse_weight": 5.0, "ce_weight": 8.0},
        "train": {"epochs": 40, "batch_size": 128},
    }
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        if inner:
            recipe[section] = {**recipe[section], inner: value}  # type: ignore[dict-item]
        else:
            recipe[section] = value
    return recipe


def epoch_records(
    noise: random.Random, clean: float, robust: float, seconds: float
) -> list[dict[str, object]]:
    records = []
    for epoch in range(40):
        done = 1 - math.exp(-(epoch + 1) / 6)
        record = {
            "kind": "epoch",
            "epoch": epoch,
            "step": 13 * (epoch + 1),
            "seconds": seconds * noise.uniform(0.9, 1.1),
            "train_loss": 2.3 * (1 - done) + 0.35 + 0.9 * (robust > 0) + noise.gauss(0, 0.03),
            "train_accuracy": min(1.0, 0.1 + (clean - 0.095) * done + noise.gauss(0, 0.006)),
            "val_accuracy": min(1.0, 0.1 + (clean - 0.1) * done + noise.gauss(0, 0.012)),
        }
        if robust:
            record["val_robust_accuracy"] = robust * done + 0.06 + noise.gauss(0, 0.02)
        records.append(record)
    return records


def result_rows(
    noise: random.Random, recipe: dict[str, object], numbers: tuple[float, float, float, float]
) -> list[ResultRow]:
    clean, robust, _, margin = numbers
    common = {
        "run_name": recipe["name"],
        "seed": recipe["seed"],
        "settings_hash": settings_hash(recipe),
        "weights_hash": f"{noise.getrandbits(64):016x}",
        "versions": {"dkl": "0.1.0", "torch": "2.14.1", "python": "3.11.2"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "device": "CPU, 2 threads, Some Processor 3000",
        "time": "2026-05-01T12:00:00+00:00",
        "seconds": 20.0,
    }

    def row(metric: str, value: float, **more: object) -> ResultRow:
        value = round(min(1.0, max(0.0, value)) * 200) / 200
        return ResultRow(metric=metric, value=value, **{"num_samples": 200, **common, **more})

    attack = {"norm": "Linf", "epsilon": 0.2}
    rows = [row("clean_accuracy", clean + noise.gauss(0, 0.004), num_samples=360)]
    strengths = {"pgd_20": 0.05, "cw_20": 0.02, "auto_attack": 0.0}
    for metric, extra in strengths.items():
        value = robust + (extra + noise.gauss(0, 0.012) if robust else 0.0)
        rows.append(row(f"{metric}_accuracy", value, **attack))
    for step in range(7):
        epsilon = 0.05 * step
        reach = 0.24 if robust else 0.05
        value = clean / (1 + math.exp((epsilon - reach - robust * 0.05) * 24)) * 1.03
        value += noise.gauss(0, 0.01)
        rows.append(row("epsilon_sweep_accuracy", value, norm="Linf", epsilon=round(epsilon, 3)))
    for index, name in enumerate(DIGITS):
        value = margin - 0.03 * ((index * 7) % 10 - 4) / 3 + noise.gauss(0, 0.015)
        details = {"class_name": name}
        rows.append(row("class_margin", value, class_index=index, details=details))
    return rows


def class_table(noise: random.Random) -> dict[str, object]:
    table = []
    for index in range(10):
        line = [noise.expovariate(60) + 0.004 for _ in range(10)]
        line[(index * 3 + 5) % 10] += 0.05
        line[index] = 0.0
        line[index] = 1 - sum(line)
        table.append(line)
    return {"table": table, "class_names": DIGITS}


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Return a function that writes a run folder: write_run("digits_ikl_at", seed=1)."""

    def write(
        name: str,
        seed: int = 0,
        *,
        folder: str | None = None,
        rows: bool = True,
        epochs: bool = True,
        table: bool | None = None,
        **changes: object,
    ) -> Path:
        noise = random.Random(f"{name} {seed} {changes}")
        path = tmp_path / (folder or f"{name}-{seed}")
        path.mkdir()
        numbers = RECIPES.get(name, RECIPES["digits_ikl_at"])
        recipe = recipe_of(name, seed, **changes)
        (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        if epochs:
            records = epoch_records(noise, *numbers[:3])
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (path / "records.jsonl").write_text(lines)
        if rows:
            append_results(path / "results.jsonl", result_rows(noise, recipe, numbers))
        if table if table is not None else "ikl" in name:
            (path / "class_table.json").write_text(json.dumps(class_table(noise)))
        return path

    return write
