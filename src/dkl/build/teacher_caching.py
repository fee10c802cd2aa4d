"""Ask a teacher once about every image that a student will see, and keep the answers."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkl import config
from dkl.build.cached_teachers import AskedImages, asked_images
from dkl.build.checks import check_classes
from dkl.build.distillation import check_top_k
from dkl.build.objects import build_data
from dkl.build.teacher_facts import cache_facts, teacher_facts
from dkl.build.teachers import load_teacher, teacher_settings
from dkl.data import ImageData
from dkl.data.teacher_cache import TeacherCache, estimate_bytes
from dkl.data.teacher_rows import StoredDtype
from dkl.engine.batches import load_batches
from dkl.engine.plan import MicroBatchPlan
from dkl.engine.randomness import numerics
from dkl.engine.setup import make_accelerator
from dkl.engine.watch import stop_on_signals
from dkl.methods.protocol import Batch

Progress = Callable[[int, int], None]
"""(batches that this process has dealt with, all of its batches)."""


@dataclass(frozen=True)
class CachingWork:
    """What is to be asked and where answers go; from ``prepare_caching``.

    Args:
        recipe: of the student.
        cache: where answers go.
        asked: the images.
        num_answers: of all views.
        num_missing: of these, not on the disk yet.
        num_bytes: size of all answers on the disk, estimated.
        missing_bytes: size of the missing ones.
        free_bytes: of the disk.
    """

    recipe: config.Recipe
    cache: TeacherCache
    asked: AskedImages
    num_answers: int
    num_missing: int
    num_bytes: int
    missing_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class CachingOutcome:
    """Where caching ended.

    Args:
        folder: of the cache.
        num_views: epochs that have answers of their own; 1 without augmentation.
        num_answers: of all views.
        num_written: by this process.
        num_missing: still missing, where a signal ended the work; the same call goes on.
        num_bytes: of the files.
        seconds: from the call of ``write_cache``.
    """

    folder: Path
    num_views: int
    num_answers: int
    num_written: int
    num_missing: int
    num_bytes: int
    seconds: float


def prepare_caching(
    recipe: config.Recipe,
    out: Path,
    *,
    top_k: int | None = None,
    dtype: StoredDtype = "float16",
) -> CachingWork:
    """Check that a student of a recipe can use a cache, and make or take up its folder.

    Args:
        recipe: of the student; its teacher is named by run or checkpoint file.
        out: the cache's folder.
        top_k: keep the k most likely classes, at the temperature of the method; None keeps all.
        dtype: "float16", or "float32" for twice the space.

    Raises:
        ValueError: the teacher is not there, the method or data cannot use a cache, the folder
            holds something else, or the disk has not enough room.
    """
    # What a student from this cache would be refused for is refused before the work.
    recipe = config.override(recipe, [f"method.teacher.cache={json.dumps(str(out))}"])
    _refuse_untrained(recipe)
    temperature = 1.0
    if top_k is not None:
        temperature = getattr(recipe.method, "temperature", 1.0)
        check_top_k(recipe.method, temperature)
    data = build_data(recipe.data, recipe.seed).train
    assert isinstance(data, ImageData)  # a recipe with images in files has no cache
    asked = asked_images(recipe, data)
    cache = TeacherCache.create(
        out,
        num_samples=len(data),
        num_classes=data.num_classes,
        fingerprint=cache_facts(recipe, data, teacher_facts(recipe)),
        top_k=top_k,
        dtype=dtype,
        temperature=temperature,
    )
    per_view = min(len(data), asked.steps_per_view * asked.settings.batch_size)
    missing = sum(int(asked.absent(cache, view).sum()) for view in range(asked.num_views))

    def size(num_rows: int) -> int:
        if num_rows == 0:
            return 0
        return estimate_bytes(
            num_samples=num_rows, num_classes=data.num_classes, top_k=top_k, dtype=dtype
        )

    work = CachingWork(
        recipe=recipe,
        cache=cache,
        asked=asked,
        num_answers=per_view * asked.num_views,
        num_missing=missing,
        num_bytes=size(per_view * asked.num_views),
        missing_bytes=size(missing),
        free_bytes=shutil.disk_usage(cache.folder).free,
    )
    if work.missing_bytes > work.free_bytes:
        raise ValueError(
            f"the disk of {cache.folder} has {work.free_bytes / 1e9:.2f} GB free, and "
            f"{missing} answers need {work.missing_bytes / 1e9:.2f} GB: free some space, name "
            "another --out, keep fewer classes by --top-k, or cache fewer epochs "
            "(training.epochs)"
        )
    return work


def _refuse_untrained(recipe: config.Recipe) -> None:
    settings = teacher_settings(recipe)
    if settings is not None and settings.run is None and settings.checkpoint is None:
        raise ValueError(
            f"the teacher {settings.recipe} is named by its recipe alone, and caching trains none: "
            f"train it with `dkl train {settings.recipe} --seed {recipe.seed}`, then add "
            "method.teacher.run=DIR"
        )


def write_cache(work: CachingWork, *, progress: Progress | None = None) -> CachingOutcome:
    """Ask the teacher what is missing.

    Steps of a view are dealt out to the processes that torchrun started, each batch whole, so that
    answers do not depend on the number of processes or on interruptions. SIGTERM and SIGINT end the
    work after the batch at hand.

    Args:
        work: from ``prepare_caching``.
        progress: called after every batch.

    Returns:
        Where it ended; the same call goes on with what is missing.

    Raises:
        TeacherCacheError: the disk is full; what is written stays valid.
        ValueError: the teacher does not fit the data or gives numbers that are not finite.
    """
    started = time.perf_counter()
    cache, asked = work.cache, work.asked
    if work.recipe.training.threads is not None:
        torch.set_num_threads(work.recipe.training.threads)
    accelerator = make_accelerator(asked.settings)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    num_written = 0
    with numerics(asked.settings.deterministic), stop_on_signals() as stop, cache:
        if work.num_missing:
            teacher = load_teacher(work.recipe, cache.folder, asked.data).model
            check_classes(teacher, asked.data)
            teacher = teacher.to(accelerator.device, asked.settings.torch_dtype)
            mine = range(rank, asked.steps_per_view, world_size)
            total = len(mine) * asked.num_views
            answers = _answers(teacher, work, mine, accelerator.device, accelerator.autocast)
            for done, answer in enumerate(answers, start=1):
                if answer is not None:
                    indices, logits, view = answer
                    cache.write(indices, logits, view=view)
                    num_written += len(indices)
                if progress is not None:
                    progress(done, total)
                if stop.requested:
                    break
    accelerator.wait_for_everyone()
    missing = sum(int(asked.absent(cache, view).sum()) for view in range(asked.num_views))
    return CachingOutcome(
        folder=cache.folder,
        num_views=asked.num_views,
        num_answers=work.num_answers,
        num_written=num_written,
        num_missing=missing,
        num_bytes=sum(file.stat().st_size for file in cache.folder.glob("*.rows")),
        seconds=time.perf_counter() - started,
    )


def _answers(
    teacher: nn.Module,
    work: CachingWork,
    mine: range,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[Tensor, Tensor, int] | None]:
    """Yield indices, logits and view of what a batch lacks, None where it lacks nothing.

    Args:
        teacher: on the device.
        work: what is missing.
        mine: which steps of each view.
        device: of the batches.
        autocast: context of the run's precision.
    """
    asked = work.asked
    for view in range(asked.num_views):
        absent, order = asked.absent(work.cache, view), asked.order(view)
        steps = asked.steps(view)
        for step in mine:
            missing = absent[steps[step][0].indices]
            if bool(missing.any()):
                # The whole batch is asked, as without an interruption, for the same numbers.
                batch = _batch(asked, steps[step], order, view * len(steps) + step, device)
                with torch.no_grad(), autocast():
                    logits = teacher(batch.images)
                yield steps[step][0].indices[missing], logits[missing.to(device)], view
            else:
                yield None


def _batch(
    asked: AskedImages,
    step: list[MicroBatchPlan],
    order: Tensor,
    number: int,
    device: torch.device,
) -> Batch:
    """Return the batch of one step, as the training loop makes it."""
    batches = load_batches(
        asked.data,
        [step],
        order,
        first_step=number,
        settings=asked.settings,
        augmentations=asked.augmentations,
        device=device,
    )
    return next(batches)
