"""Synthetic run folders with plausible, varied numbers."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from dkl.reports import ResultRow, Run, append_results, read_run, settings_hash

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# name -> final clean accuracy, robustness (AutoAttack), training seconds per epoch, margin level
RECIPES = {
    "digits_natural": (0.989, 0.0, 0.08, 0.97),
    "digits_trades": (0.981, 0.46, 0.41, 0.62),
    "digits_ikl_at": (0.983, 0.535, 0.45, 0.66),
}

# Rows of the paper's tables -> clean accuracy, AutoAttack, changes to the recipe.
GENERATED = {"held_out": True, "fraction": 0.7}
AUTO = {"auto_augment": True, "padding": 2}
SUITE: dict[str, tuple[float, float, dict[str, object]]] = {
    "natural": (0.915, 0.0, {"method": {"kind": "natural"}}),
    "pgd_at": (0.781, 0.521, {}),
    "pgd_at_awp": (0.776, 0.528, {}),
    "trades": (0.775, 0.561, {}),
    "trades_awp": (0.772, 0.566, {}),
    "mart": (0.768, 0.549, {}),
    "lbgat": (0.783, 0.543, {}),
    "las_at": (0.786, 0.538, {}),
    "acat": (0.79, 0.552, {}),
    "dajat": (0.782, 0.558, {"data__views": [AUTO, AUTO], "model__dual_batch_norm": True}),
    "ikl_at": (0.801, 0.563, {}),
    "gkl_at": (0.803, 0.56, {}),
    "ikl_at_autoaugment": (0.793, 0.565, {"data__views": [AUTO]}),
    "dm_at": (0.812, 0.578, {"data__generated": GENERATED}),
    "ikl_at_generated": (0.818, 0.583, {"data__generated": GENERATED}),
}

SMALL = {
    "data": {"name": "fashion_mnist", "folder": None, "train_limit": 20000, "augment": None},
    "model": {"name": "convnet_small", "kwargs": {"width": 16}},
    "training": {"epochs": 6, "batch_size": 64},
    "evaluation": {"norm": "Linf", "eps": 0.1, "step_size": 0.025, "num_images": 500},
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
    row = row_maker(noise, recipe)
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


def suite_rows(
    noise: random.Random, row: Callable[..., ResultRow], clean: float, robust: float
) -> list[ResultRow]:
    """Return what an evaluation of the robustness suite writes."""
    attack = {"norm": "Linf", "epsilon": 0.1, "num_samples": 500}
    rows = [row("clean_accuracy", clean + noise.gauss(0, 0.004), num_samples=10000)]
    auto = robust + (noise.gauss(0, 0.008) if robust else 0.0)
    extras = {"pgd_10": 0.03, "pgd_20": 0.028, "cw_10": 0.012, "cw_20": 0.01, "square": 0.06}
    for name, extra in extras.items():
        rows.append(row(f"{name}_accuracy", auto + extra * (robust > 0), **attack))
    for name in ("auto_attack", "worst_case"):
        rows.append(row(f"{name}_accuracy", auto, **attack))
    for name, extra in (("pgd_20", 0.02), ("auto_attack", 0.0)):
        for epsilon in (0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15):
            reach = 0.115 if robust else 0.01
            value = clean / (1 + math.exp((epsilon - reach) * 26)) * 1.05 + extra
            more = {**attack, "epsilon": epsilon, "details": {"attack": name}}
            rows.append(row("epsilon_sweep_accuracy", value + noise.gauss(0, 0.006), **more))
    for check, value, message in (
        ("zero_gradients", 0.004, "few images have a zero gradient"),
        ("large_epsilon", 0.0, "no image withstands a large budget"),
        ("random_noise", clean - 0.002, "random noise is weaker than the attack"),
    ):
        details = {"check": check, "measured": value, "expected": "< 0.1", "message": message}
        rows.append(row("masking_check", 1.0, details=details, **attack))
    for source, value in (("trades", robust + 0.15), ("natural", clean - 0.04)):
        rows.append(row("transfer_accuracy", value, details={"source": source}, **attack))
    for index, name in enumerate(DIGITS):
        shift = 0.16 * math.sin(2.1 * index) - 0.02
        more = {"class_index": index, "details": {"class_name": name}}
        rows.append(row("class_accuracy", clean + shift + noise.gauss(0, 0.01), **more))
        hard = robust + 1.4 * shift if robust else 0.0
        value = hard + noise.gauss(0, 0.02) * (robust > 0)
        attacked = {**more, "details": {**more["details"], "attack": "auto_attack"}}
        rows.append(row("class_robust_accuracy", value, norm="Linf", epsilon=0.1, **attacked))
        rows.append(row("class_margin", clean - 0.3 + shift + noise.gauss(0, 0.02), **more))
    for images, worse in (("clean", 0.0), ("adversarial", 0.2), ("both", 0.12)):
        for measure, value in (("intra_inter_ratio", 0.6 + worse), ("silhouette", 0.3 - worse)):
            details = {"images": images, "measure": measure}
            rows.append(row("feature_compactness", value + noise.gauss(0, 0.02), details=details))
    return rows


def save_features(path: Path, spread: float, num_classes: int = 10, per_class: int = 8) -> None:
    """Write features.npz: blobs by class, the adversarial ones wider and nearer to each other."""
    noise = np.random.default_rng(0)
    centres_CD = noise.normal(size=(num_classes, 16)) * 2.2
    labels_N = np.repeat(np.arange(num_classes), per_class)
    around_ND = noise.normal(size=(len(labels_N), 16))
    clean_ND = centres_CD[labels_N] + spread * around_ND
    adversarial_ND = 0.6 * centres_CD[labels_N] + 1.3 * spread * noise.normal(size=around_ND.shape)
    np.savez(
        path / "features.npz",
        clean=clean_ND.astype(np.float32),
        adversarial=adversarial_ND.astype(np.float32),
        labels=labels_N,
        class_indices=np.arange(num_classes),
    )


def row_maker(noise: random.Random, recipe: dict[str, object]) -> Callable[..., ResultRow]:
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
        num_samples = more.setdefault("num_samples", 200)
        if metric.endswith(("_accuracy", "_margin")):
            value = round(min(1.0, max(0.0, value)) * num_samples) / num_samples
        return ResultRow(metric=metric, value=value, **{**common, **more})

    return row


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


WriteSuite = Callable[..., dict[str, list[Run]]]


@pytest.fixture
def write_suite(tmp_path: Path) -> WriteSuite:
    """Return a function that writes runs of the robustness suite: key -> runs, one per seed."""

    def write(
        *keys: str, seeds: tuple[int, ...] = (0, 1, 2), features: bool = False, **changes: object
    ) -> dict[str, list[Run]]:
        runs: dict[str, list[Run]] = {}
        for key in keys or SUITE:
            clean, robust, own = SUITE[key]
            for seed in seeds:
                noise = random.Random(f"{key} {seed}")
                recipe = recipe_of(
                    f"fashion_mnist_{key}_small", seed, **{**SMALL, **own, **changes}
                )
                path = tmp_path / f"suite-{key}-{seed}"
                path.mkdir()
                (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
                rows = suite_rows(noise, row_maker(noise, recipe), clean, robust)
                append_results(path / "results.jsonl", rows)
                if features:
                    save_features(path, 1.0 if "ikl" in key else 1.5)
                runs.setdefault(key, []).append(read_run(path))
        return runs

    return write


def distillation_rows(
    noise: random.Random, row: Callable[..., ResultRow], clean: float, *, has_teacher: bool
) -> list[ResultRow]:
    """Return what an evaluation of a run on long-tailed data writes, calibration included."""
    rows = [row("clean_accuracy", clean + noise.gauss(0, 0.003), num_samples=10000)]
    for index, name in enumerate(DIGITS):
        value = clean + 0.1 * math.sin(2.1 * index) + noise.gauss(0, 0.012)
        rows.append(row("class_accuracy", value, class_index=index, details={"class_name": name}))
    for name, shift, count in (("many", 0.06, 4), ("medium", 0.0, 3), ("few", -0.2, 3)):
        details = {"classes": count}
        rows.append(row(f"{name}_accuracy", clean + shift + noise.gauss(0, 0.01), details=details))
    count = [0, 0, *(10 + 5 * place for place in range(13))]
    confidence = [(place + 0.5) / 15 if count[place] else 0.0 for place in range(15)]
    accuracy = [max(0.0, one - 0.05 + noise.gauss(0, 0.01)) for one in confidence]
    bins = {"confidence": confidence, "accuracy": accuracy, "count": count}
    rows.append(row("reliability", 0.05, details=bins))
    rows.append(row("expected_calibration_error", 0.05 + noise.uniform(0, 0.01)))
    rows.append(row("negative_log_likelihood", 1.2 + noise.uniform(0, 0.1)))
    if has_teacher:
        rows.append(row("teacher_agreement", 0.9 + noise.gauss(0, 0.01)))
        rows.append(row("teacher_kl", 0.2 + noise.uniform(0, 0.02)))
    return rows


# Rows of the tables on distillation -> clean accuracy, kind of the method.
DISTILLATION = {
    "teacher": (0.93, "natural"),
    "student": (0.86, "natural"),
    "kd": (0.87, "kd"),
    "ikl_kd": (0.882, "ikl_kd"),
}


@pytest.fixture
def write_distillation(tmp_path: Path) -> WriteSuite:
    """Return a function that writes runs of distillation: key -> runs, one per seed."""

    def write(
        *keys: str, seeds: tuple[int, ...] = (0, 1, 2), **changes: object
    ) -> dict[str, list[Run]]:
        runs: dict[str, list[Run]] = {}
        for key in keys or DISTILLATION:
            clean, kind = DISTILLATION[key]
            method = {"kind": kind}
            if kind != "natural":
                method["teacher"] = {"recipe": "a_teacher", "run": "elsewhere"}
            for seed in seeds:
                noise = random.Random(f"{key} {seed}")
                recipe = recipe_of(f"fashion_mnist_{key}_small", seed)
                recipe |= {"data": SMALL["data"], "training": SMALL["training"], "method": method}
                recipe |= changes
                path = tmp_path / f"distillation-{key}-{seed}"
                path.mkdir()
                (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
                row = row_maker(noise, recipe)
                rows = distillation_rows(noise, row, clean, has_teacher=kind != "natural")
                append_results(path / "results.jsonl", rows)
                runs.setdefault(key, []).append(read_run(path))
        return runs

    return write
