"""A teacher's cached answers in place of the teacher, and the images that they are about."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dkl import config, methods
from dkl.build.distillation import check_top_k
from dkl.build.objects import build_augment, build_loop_settings, build_mix
from dkl.build.teacher_facts import cache_facts, teacher_facts
from dkl.data import ImageData
from dkl.data.teacher_cache import TeacherCache
from dkl.data.teacher_manifest import read_manifest
from dkl.data.teacher_rows import TopKRows
from dkl.engine import LoopSettings
from dkl.engine.batches import Augmentations, augmentations_of
from dkl.engine.plan import MicroBatchPlan, count_steps, epoch_plan, source_order

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AskedImages:
    """The images that a run shows its teacher: its views, and the steps of each.

    With augmentation every epoch is a view; without, there is one view for all epochs.

    Args:
        data: the training images.
        settings: of the loop.
        augmentations: of the images.
        num_views: V.
    """

    data: ImageData
    settings: LoopSettings
    augmentations: Augmentations
    num_views: int

    @property
    def steps_per_view(self) -> int:
        """Return the number of steps of each view."""
        return count_steps(len(self.data), self.settings.batch_size, self.settings.drop_last)

    def order(self, view: int) -> Tensor:
        """Return the order of the images, [N] int64."""
        settings = self.settings
        return source_order(self.data, seed=settings.seed, epoch=view, shuffle=settings.shuffle)

    def steps(self, view: int) -> list[list[MicroBatchPlan]]:
        """Return the steps, each of one batch without padding."""
        return epoch_plan(
            len(self.data),
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            epoch=view,
            order=self.order(view),
            drop_last=self.settings.drop_last,
        )

    def absent(self, cache: TeacherCache, view: int) -> Tensor:
        """Return [N] bool, which of the images in the steps have no answer yet."""
        wanted = torch.zeros(len(self.data), dtype=torch.bool)
        wanted[self.order(view)[: self.steps_per_view * self.settings.batch_size]] = True
        absent = torch.zeros_like(wanted)
        absent[cache.missing(view=view)] = True
        return absent & wanted


def asked_images(recipe: config.Recipe, data: ImageData) -> AskedImages:
    """Return the images that a run of a recipe shows its teacher.

    Args:
        recipe: of the student.
        data: its training images.
    """
    settings, augment = build_loop_settings(recipe), recipe.data.augment
    augmentations = augmentations_of(data, build_augment(augment), (), build_mix(augment))
    if augment is None:
        # Every image looks the same in every epoch, also one that its first epoch leaves out.
        return AskedImages(data, replace(settings, drop_last=False), augmentations, 1)
    return AskedImages(data, settings, augmentations, settings.epochs)


def open_cached_teacher(
    recipe: config.Recipe, folder: Path, data: ImageData
) -> methods.CachedTeacher | methods.CachedTopKTeacher:
    """Return what reads a teacher's answers for a run.

    A teacher that the recipe names by run or checkpoint file must be the one that was cached, by
    its weights, which are read and not built into a network. One that is named by recipe alone must
    have the recipe and seed that a run would train it with.

    Args:
        recipe: of the student.
        folder: of the cache.
        data: the student's training images.

    Raises:
        ValueError: there is no such cache, it is of something else (every difference is named), it
            lacks answers, or the method needs more of them.
    """
    folder = folder.expanduser()
    named = teacher_facts(recipe)
    if set(named) == {"recipe", "seed"}:
        named = read_manifest(folder)["fingerprint"].get("teacher", {}) | named
    cache = TeacherCache.open(folder, fingerprint=cache_facts(recipe, data, named))
    rows = cache.rows
    if rows.top_k is not None:
        check_top_k(recipe.method, rows.temperature)
    asked = asked_images(recipe, data)
    _refuse_incomplete(cache, asked)
    logger.info("reading the teacher's answers from %s; no teacher is loaded", folder)

    def read(indices: Tensor, epoch: int) -> Tensor | TopKRows:
        view = 0 if asked.num_views == 1 else epoch
        return cache.read(indices, view=view, device=indices.device)

    def read_all(indices: Tensor, epoch: int) -> Tensor:
        answer = read(indices, epoch)
        assert isinstance(answer, Tensor)
        return answer

    def read_top_k(indices: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        answer = read(indices, epoch)
        assert isinstance(answer, TopKRows)
        return answer.log_probs, answer.indices, answer.tail_log_prob

    if rows.top_k is None:
        return methods.CachedTeacher(read_all)
    return methods.CachedTopKTeacher(read_top_k, rows.temperature)


def _refuse_incomplete(cache: TeacherCache, asked: AskedImages) -> None:
    """Look before training for every answer that it will read."""
    counts = [int(asked.absent(cache, view).sum()) for view in range(asked.num_views)]
    if any(counts):
        short = [view for view, count in enumerate(counts) if count]
        where = "" if asked.num_views == 1 else f" in {len(short)} of {asked.num_views} epochs"
        raise ValueError(
            f"the teacher cache in {cache.folder} lacks {sum(counts)} answers{where}"
            f"{'' if asked.num_views == 1 else f', the first of them epoch {short[0]}'}: run "
            "`dkl cache-teacher` with the same settings and --out again; it goes on with what is "
            "missing"
        )
