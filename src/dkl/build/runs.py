"""Run folders: finding them, their recipe, and the model they hold."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dkl import config
from dkl.build.image_access import LabelledImages
from dkl.build.objects import build_model
from dkl.engine.state import has_checkpoint, load_weights

RECIPE_FILE = "recipe.yaml"


def read_recipe(path: Path) -> tuple[Path, config.Recipe]:
    """Find the run that a path belongs to and read its recipe.

    Args:
        path: a run folder, or anything inside it, such as one of its checkpoints.

    Returns:
        The run folder and its recipe.

    Raises:
        ValueError: no run holds this path.
    """
    for folder in (path, *path.resolve().parents):
        if (folder / RECIPE_FILE).is_file():
            return folder, config.load_recipe(folder / RECIPE_FILE)
    raise ValueError(
        f"{path} is neither a run nor inside one: no {RECIPE_FILE} there or above; "
        "a run is a folder that `dkl train` made"
    )


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_run_model(
    path: Path, recipe: config.Recipe, data: LabelledImages, which: str
) -> tuple[nn.Module, str]:
    """Build a run's model with its trained weights, the averaged ones where there are any.

    Args:
        path: the run, or one of its checkpoints (``which`` is then not used).
        recipe: the run's recipe.
        data: its training data, whose mean and deviation the model normalises with.
        which: "best" or "last"; a run without validation has no best checkpoint, and "best" is an
            error there.

    Returns:
        The model and the SHA-256 of its weights.
    """
    weights = load_run_weights(path, which)
    model = build_model(recipe.model, data, recipe.seed)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {path} do not fit the model {recipe.model.name} that the run's "
            f"{RECIPE_FILE} describes; were checkpoints or recipes of different runs mixed? {error}"
        ) from error
    dtype = torch.float64 if recipe.training.dtype == "float64" else torch.float32
    return model.to(dtype).eval(), hash_weights(weights)


def load_run_weights(path: Path, which: str) -> dict[str, Tensor]:
    """Return a run's trained weights, the averaged ones where there are any.

    Args:
        path: the run, or one of its checkpoints (``which`` is then not used).
        which: "best" or "last".
    """
    if has_checkpoint(path):
        return load_weights(path, "last" if which == "last" else "best")
    return load_weights(path)


def checkpoint_name(run_dir: Path, path: Path, which: str) -> str:
    """Return what a result row calls the checkpoint that was measured.

    Args:
        run_dir: the run.
        path: the run, or one of its checkpoints.
        which: "best" or "last"; for a run.

    Returns:
        "best" or "last" where the checkpoint is that one, else the name of its folder.
    """
    if has_checkpoint(path):
        return which
    for name in ("best", "last"):
        if (run_dir / "checkpoints" / name).resolve() == path.resolve():
            return name
    return path.resolve().name


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, independent of their order and device.

    Example:
        >>> hash_weights({"a": torch.zeros(2)}) == hash_weights({"a": torch.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)} {weights[name].dtype}".encode())
        flat = weights[name].detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def device_for_evaluation() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    usable = accelerator is not None and torch.accelerator.is_available()
    return accelerator if usable and accelerator is not None else torch.device("cpu")
