"""Where a run starts: afresh, or from the last checkpoint of the same run."""

import json
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dkl.engine.settings import LoopSettings
from dkl.engine.state import (
    Checkpoint,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    load_meta,
    unlinked_checkpoints,
)

_PACKAGES = ("dkl", "torch", "accelerate", "safetensors", "numpy")


class ResumeError(ValueError):
    """A run cannot start or continue in the folder given."""


def describe_run(
    settings: LoopSettings,
    recipe: Mapping[str, Any] | None,
    *,
    world_size: int,
    num_samples: int,
) -> dict[str, Any]:
    """Return what checkpoints say about the run they belong to, as JSON values.

    Raises:
        ValueError: if the recipe holds something that is not a JSON value.
    """
    try:
        plain = None if recipe is None else json.loads(json.dumps(dict(recipe)))
    except TypeError as error:
        raise ValueError(
            f"the recipe must hold JSON values only (numbers, texts, lists, dictionaries): {error}"
        ) from error
    return {
        "recipe": plain,
        "settings": json.loads(json.dumps(settings.trajectory())),
        "world_size": world_size,
        "num_samples": num_samples,
        "versions": _versions(),
    }


def find_start(run_dir: Path, description: Mapping[str, Any], *, resume: bool) -> Checkpoint | None:
    """Return the checkpoint to continue from, or None for a run that starts.

    Args:
        run_dir: folder of the run; made if it is not there.
        description: what ``describe_run`` returned.
        resume: continue the run in the folder.

    Raises:
        ResumeError: if there is nothing to resume, the run in the folder was started differently,
            or there is a run and ``resume`` is False.
        CheckpointError: if the checkpoint cannot be trusted.
    """
    unlinked = unlinked_checkpoints(run_dir)
    # A start that was killed may have left its very first checkpoint without a link.
    if unlinked and load_meta(unlinked[-1])["step"] > 0:
        raise ResumeError(
            f"{run_dir} holds checkpoints but no link 'last' (copied without symbolic links?): "
            f"link {unlinked[-1].parent / 'last'} to {unlinked[-1].name} and resume, or choose "
            "another folder"
        )
    exists = has_checkpoint(run_dir)
    if exists and not resume:
        raise ResumeError(
            f"{run_dir} already holds a run: resume it (--resume, resume=True), or choose another "
            "folder"
        )
    if resume and not exists:
        raise ResumeError(f"{run_dir} holds no checkpoint to resume from: start without --resume")
    if not resume:
        run_dir.mkdir(parents=True, exist_ok=True)
        return None
    checkpoint = load_checkpoint(find_checkpoint(run_dir, "last"))
    shared = ("recipe", "settings", "world_size", "num_samples")
    differences = list(
        _differences(
            {key: checkpoint.meta.get(key) for key in shared},
            {key: description[key] for key in shared},
        )
    )
    if differences:
        raise ResumeError(
            f"{run_dir} was started differently, so resuming would mix two runs: "
            f"{'; '.join(differences)}. Resume with what it was started with, or start in another "
            f"folder"
        )
    return checkpoint


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{name} was {old!r} and is now {new!r}"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            # Run from a source tree that is not installed.
            versions[package] = "not installed"
    return versions
