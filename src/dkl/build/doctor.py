"""Whether a recipe will run on this machine, and for how long, found out before it is started."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dkl import config
from dkl.build.doctor_checks import (
    GIB,
    Finding,
    check_data,
    check_device,
    check_folder,
    check_packages,
    check_teacher,
    peak_memory,
)
from dkl.build.objects import Splits, build_data
from dkl.build.reproduce.estimate import disk_bytes, evaluation_seconds, training_seconds
from dkl.build.reproduce.measure import StepCost, measure_step
from dkl.build.reproduce.preflight import check_disk, facts_of, missing_parts
from dkl.build.teachers import TEACHER_FOLDER, teacher_settings, teaching_recipe
from dkl.engine.state import has_checkpoint

_FULL = 0.9  # share of the memory from which on a run is likely to fail
Progress = Callable[[str], None]


@dataclass(frozen=True)
class RunEstimate:
    """What a run is expected to take in one process.

    Args:
        step_seconds: one optimiser step.
        training_seconds: of the run, validation included.
        teacher_seconds: training of a teacher that comes first, or 0.0.
        evaluation_seconds: of the measurements after it.
        disk_bytes: checkpoints and records.
        is_extrapolated: steps of fewer images were timed.
        device: "cpu" or "cuda".
    """

    step_seconds: float
    training_seconds: float
    teacher_seconds: float
    evaluation_seconds: float
    disk_bytes: int
    is_extrapolated: bool
    device: str

    @property
    def total_seconds(self) -> float:
        """Seconds of everything."""
        return self.training_seconds + self.teacher_seconds + self.evaluation_seconds


@dataclass
class Diagnosis:
    """What ``examine`` found.

    Args:
        findings: in the order in which things were looked at.
        estimate: None where no step was timed.
    """

    findings: list[Finding] = field(default_factory=list)
    estimate: RunEstimate | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there is no problem."""
        return all(finding.state != "problem" for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        estimate = None if self.estimate is None else asdict(self.estimate)
        return {
            "ready": self.is_ready,
            "findings": [asdict(finding) for finding in self.findings],
            "estimate": estimate,
        }


def examine(
    recipe: config.Recipe,
    out: Path,
    *,
    take_steps: bool = True,
    all_images: bool = False,
    progress: Progress = lambda _: None,
) -> Diagnosis:
    """Look at everything that a run needs, then time a few real steps.

    Nothing is written into ``out``. What fails becomes a finding; later checks that need it are
    left out.

    Args:
        recipe: the checked recipe.
        out: the run folder, which need not exist.
        take_steps: False leaves the timing out, which builds and trains the network for some steps.
        all_images: decode every image file, instead of a sample.
        progress: told what is looked at.

    Returns:
        Findings and an estimate.

    Example:
        >>> recipe = config.load_recipe("digits_natural")
        >>> diagnosis = examine(recipe, Path("runs/none"), take_steps=False)
        >>> diagnosis.is_ready, {finding.subject for finding in diagnosis.findings} >= {"data"}
        (True, True)
    """
    diagnosis = Diagnosis()

    def look_at(subject: str, check: Callable[[], Iterator[Finding]]) -> bool:
        progress(f"Looking at {subject}")
        found = list(_told(subject, check))
        diagnosis.findings.extend(found)
        return all(finding.state != "problem" for finding in found)

    packages_there = look_at("packages", lambda: check_packages(recipe))
    look_at("device", lambda: check_device(recipe))
    look_at("folder", lambda: check_folder(out))
    splits: list[Splits] = []
    data_there = look_at("data", lambda: _check_data(recipe, splits, all_images))
    if not (data_there and packages_there):
        return diagnosis
    teacher_there = look_at("teacher", lambda: check_teacher(recipe, out, splits[0]))
    if take_steps and teacher_there:
        look_at("steps", lambda: _time_steps(recipe, out, splits[0], diagnosis, progress))
    return diagnosis


def _told(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        text = f"{first}. Smaller micro-batches need less: training.accumulation=2 (or 4, 8)"
        yield Finding("memory", "problem", text)
    # Whatever goes wrong here would go wrong in the run, which this is to find out.
    except Exception as error:
        known = isinstance(error, ValueError | OSError | ImportError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        yield Finding(subject, "problem", text)


def _check_data(recipe: config.Recipe, splits: list[Splits], all_images: bool) -> Iterator[Finding]:
    missing = missing_parts(recipe)
    for message in missing:
        yield Finding("data", "problem", message)
    loaded = build_data(recipe.data, recipe.seed)
    yield from check_data(loaded, all_images=all_images)
    if not missing:
        splits.append(loaded)


def _time_steps(
    recipe: config.Recipe, out: Path, splits: Splits, diagnosis: Diagnosis, progress: Progress
) -> Iterator[Finding]:
    with _without_progress():
        cost = measure_step(recipe)
    facts = facts_of(recipe, splits)
    training = training_seconds(recipe, facts, cost)
    measuring = evaluation_seconds(recipe.evaluation, facts.num_test, recipe.data.name, cost)
    needed, teaching = disk_bytes([recipe.evaluation], cost), 0.0
    first = _taught_by(recipe, out)
    if first is not None:
        progress(f"Looking at steps of the teacher, {first.name}")
        with _without_progress():
            teacher_cost = measure_step(first)
        teaching = training_seconds(first, facts_of(first, splits), teacher_cost)
        needed += disk_bytes([first.evaluation], teacher_cost)
    diagnosis.estimate = RunEstimate(
        step_seconds=cost.step_seconds,
        training_seconds=training,
        teacher_seconds=teaching,
        evaluation_seconds=measuring,
        disk_bytes=needed,
        is_extrapolated=cost.is_extrapolated,
        device=cost.device,
    )
    yield from _steps_and_memory(recipe, cost)
    problems = check_disk(out, needed)
    for message in problems:
        yield Finding("disk", "problem", message)
    if not problems:
        yield Finding("disk", "ok", f"about {needed / GIB:.2f} GiB are needed, and there")


@contextmanager
def _without_progress() -> Iterator[None]:
    """Keep the epochs of timed steps from the log, which would look like training."""
    logger = logging.getLogger("dkl")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _taught_by(recipe: config.Recipe, out: Path) -> config.Recipe | None:
    """Return the recipe of a teacher that has to be trained first."""
    settings = teacher_settings(recipe)
    if settings is None or settings.recipe is None or settings.run or settings.cache:
        return None
    if has_checkpoint(out / TEACHER_FOLDER):
        return None
    return teaching_recipe(recipe)


def _steps_and_memory(recipe: config.Recipe, cost: StepCost) -> Iterator[Finding]:
    batch = recipe.training.batch_size
    ms = 1000 * cost.step_seconds
    told = f"{ms:,.0f} ms" if ms < 2000 else f"{cost.step_seconds:,.1f} s"
    text = f"{told} for {batch} images on one {cost.device}"
    if cost.is_extrapolated:
        text += ", worked out from fewer images"
    if cost.decode_seconds > 0:
        text += f"; workers decode {1 / cost.decode_seconds:,.0f} images a second"
    if cost.waits_for_images:
        text += ", and steps wait for them: more data.decoding.workers on more CPU cores help"
    yield Finding("steps", "note" if cost.waits_for_images else "ok", text)
    peak, total = peak_memory()
    yield _memory("main memory", peak, total)
    if cost.peak_bytes is not None:
        device_total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        yield _memory("GPU memory", cost.peak_bytes, device_total)


def _memory(name: str, peak: int, total: int) -> Finding:
    text = f"{peak / GIB:.1f} of {total / GIB:.1f} GiB of {name} were taken"
    if peak < _FULL * total:
        return Finding("memory", "ok", text)
    return Finding("memory", "note", f"{text}, almost all: training.accumulation=2 needs less")
