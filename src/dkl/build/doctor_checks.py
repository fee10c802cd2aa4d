"""What can be found out about a recipe without training: packages, data, teacher, device, disk."""

import os
import random
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from dkl import config
from dkl.build.cached_teachers import open_cached_teacher
from dkl.build.checks import count_logits
from dkl.build.objects import Splits
from dkl.build.reproduce.decoding_cost import usable_cores
from dkl.build.runs import device_for_evaluation
from dkl.build.teachers import TEACHER_FOLDER, load_teacher, teacher_settings
from dkl.data import Decoding, ImageData, ImageFiles
from dkl.engine.state import has_checkpoint

GIB = 2**30
_SAMPLED_FILES = 64
_MOST_NAMED = 5

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        subject: such as "data" or "teacher".
        state: "ok", "note" (a run works, but see the message) or "problem" (it will not).
        message: what was found, and what to do.
    """

    subject: str
    state: State
    message: str


def check_packages(recipe: config.Recipe) -> Iterator[Finding]:
    """Look for the packages that the settings need beyond those of training."""
    found = {"torch": str(torch.__version__)}
    missing = False
    for package, (extra, reason) in _needed_packages(recipe).items():
        if find_spec(package) is None:
            missing = True
            yield Finding(
                "packages",
                "problem",
                f"{package} is missing, which {reason} needs: pip install 'dkl[{extra}]'",
            )
        else:
            found[package] = version(package)
    if not missing:
        names = ", ".join(" ".join(pair) for pair in found.items())
        yield Finding("packages", "ok", f"all there: {names}")


def _needed_packages(recipe: config.Recipe) -> dict[str, tuple[str, str]]:
    """Return package -> extra that brings it, and the setting that needs it."""
    needed: dict[str, tuple[str, str]] = {}
    teacher = teacher_settings(recipe)
    models = {"model": recipe.model, "method.teacher.model": teacher.model if teacher else None}
    for key, model in models.items():
        if model is not None and model.name.startswith("timm/"):
            needed["timm"] = ("timm", f"{key}.name {model.name}")
    if recipe.optimizer.kind == "lamb":
        needed["timm"] = ("timm", "optimizer.kind lamb")
    decoding = recipe.data.decoding
    if decoding is not None and decoding.rand_augment is not None:
        needed["timm"] = ("timm", "data.decoding.rand_augment")
    evaluation = recipe.evaluation
    by_auto_attack = evaluation.sweep and evaluation.sweep_attack.startswith("auto_attack")
    if evaluation.auto_attack is not None or by_auto_attack:
        needed["pyautoattack"] = ("robust", "AutoAttack, in evaluation,")
    for tracker in recipe.trackers:
        extra = "train" if tracker == "tensorboard" else tracker
        needed[tracker] = (extra, f"trackers {tracker}")
    return needed


def check_data(splits: Splits, *, all_images: bool = False) -> Iterator[Finding]:
    """Tell how much there is, and decode files: some of each part, or all of them."""
    counts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    numbers = ", ".join(
        f"{0 if part is None else len(part):,} {name}" for name, part in counts.items()
    )
    shape = "x".join(map(str, splits.train.image_shape))
    yield Finding(
        "data", "ok", f"{numbers} images of {shape} in {splits.train.num_classes:,} classes"
    )
    for name, part in counts.items():
        if isinstance(part, ImageFiles):
            yield _check_files(name, part, None if all_images else _SAMPLED_FILES)


def _check_files(name: str, data: ImageFiles, count: int | None) -> Finding:
    rows = list(range(len(data)))
    if count is not None and count < len(rows):
        rows = sorted(random.Random(0).sample(rows, count))
    broken = list(data.find_broken(torch.tensor(rows)))
    looked_at = f"{len(rows):,} of {len(data):,} {name} files"
    if not broken:
        more = "" if len(rows) == len(data) else "; --all-images decodes every one"
        return Finding("data", "ok", f"{looked_at} were decoded{more}")
    named = "; ".join(broken[:_MOST_NAMED]) + ("; ..." if len(broken) > _MOST_NAMED else "")
    return Finding("data", "problem", f"{len(broken):,} of {looked_at} are broken: {named}")


def check_teacher(recipe: config.Recipe, out: Path, splits: Splits) -> Iterator[Finding]:
    """Load the teacher, or tell that it is trained first."""
    settings = teacher_settings(recipe)
    if settings is None:
        return
    if settings.cache is not None:
        assert isinstance(splits.train, ImageData)  # a recipe with images in files has no cache
        open_cached_teacher(recipe, Path(settings.cache), splits.train)
        yield Finding("teacher", "ok", f"its answers are in {settings.cache}")
        return
    folder = out / TEACHER_FOLDER
    named_by_recipe = settings.checkpoint is None and settings.run is None
    if named_by_recipe and not has_checkpoint(folder):
        yield Finding("teacher", "note", f"{settings.recipe} is trained first, in {folder}")
        return
    teacher = load_teacher(recipe, out, splits.train)
    answers, wanted = count_logits(teacher.model, splits.train), splits.train.num_classes
    if answers != wanted:
        text = f"{teacher.source} tells {answers} classes apart, and the data have {wanted}"
        yield Finding("teacher", "problem", f"{text}: choose a teacher of the same classes")
        return
    size = sum(parameter.numel() for parameter in teacher.model.parameters()) / 1e6
    yield Finding("teacher", "ok", f"{teacher.source}, {size:.1f} million parameters")


def check_device(recipe: config.Recipe) -> Iterator[Finding]:
    """Tell what trains, and whether it can take the precision and the workers."""
    device, precision = device_for_evaluation(), recipe.training.mixed_precision
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / GIB
        count = torch.cuda.device_count()
        text = f"{torch.cuda.get_device_name(device)} with {memory:.0f} GiB"
        more = f"; torchrun --nproc_per_node {count} -m dkl train ... uses all {count}"
        yield Finding("device", "ok", text + (more if count > 1 else ""))
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            text = (
                f"{torch.cuda.get_device_name(device)} has no bf16: training.mixed_precision=fp16"
            )
            yield Finding("precision", "problem", text)
    elif device.type == "cpu":
        yield Finding("device", "note", f"no GPU was found; {usable_cores()} CPU cores train")
        if precision == "fp16":
            text = "training.mixed_precision fp16 needs a GPU; on a CPU choose bf16 or no"
            yield Finding("precision", "problem", text)
    else:
        yield Finding("device", "ok", f"{device.type}")
    if recipe.data.in_files:
        workers, cores = (recipe.data.decoding or Decoding()).workers, usable_cores()
        if workers > cores:
            text = f"{workers} workers decode for each process, and {cores} CPU cores are there: "
            yield Finding("workers", "note", text + f"data.decoding.workers={cores} will do")


def check_folder(out: Path) -> Iterator[Finding]:
    """Tell whether the run folder is free and can be written."""
    if has_checkpoint(out):
        text = f"{out} already holds a run; --resume goes on with it, or choose another --out"
        yield Finding("folder", "note", text)
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        yield Finding("folder", "problem", f"{place} cannot be written; choose another --out")


def peak_memory() -> tuple[int, int]:
    """Return the most main memory that this process took, and how much there is, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text("ascii").strip()).isdecimal():
        total = min(total, int(text))
    return peak, total
