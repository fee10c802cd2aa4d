"""Loading the weights of others into our models, and writing ours."""

import contextlib
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dkl.models.checkpoint_files import CheckpointError, read_state_dict
from dkl.models.checkpoint_names import SortedEntries, is_unused_layer, sort_entries

__all__ = ["CheckpointError", "load_checkpoint", "save_weights"]

logger = logging.getLogger(__name__)

_NUM_SHOWN = 5
# Mean and deviation are published with three or four digits.
_NORMALIZATION_TOLERANCE = 1e-3


def load_checkpoint(model: nn.Module, path: str | Path) -> list[str]:
    """Load weights from a safetensors file or a torch file, and say what was left out.

    Accepted are bare state dicts and those under ``state_dict``, ``model_state_dict``, ``net`` or
    ``model``, with any of the prefixes that DataParallel, torch.compile and wrappers leave. Left
    out are

    - layers that published checkpoints carry but no forward pass uses: ``sub_block1`` (TRADES and
      successors) and, unless the model has them, ``*_auto`` batch-norms (DAJAT);
    - the ``attacker`` of MadryLab's robustness, a copy of the network;
    - mean and deviation of the input (``mu`` and ``sigma``, ``normalizer.new_mean``, ...), once
      they have been compared with those that are built into the model.

    Everything else must fit, except that old files may lack batch-norm's counters
    ``num_batches_tracked``. Files never run code; the model is changed only if everything fits.
    Optimisers, scores and settings (``argparse.Namespace``) beside the weights are ignored, so that
    the teachers of mdistiller and RepDistiller load as they are published.

    Args:
        model: the model to load into, on any device and of any float type.
        path: the file.

    Returns:
        Names in the file that were left out; the log says why.

    Raises:
        CheckpointError: a ValueError that says why the file cannot be read or does not fit, or that
            the network in it normalises its input otherwise than the model does.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "linear.safetensors")
        ...     save_weights(model.state_dict(), path)
        ...     load_checkpoint(nn.Linear(2, 1), path)
        []
    """
    path = Path(path)
    # A compiled model keeps the one that has the plain names.
    model = getattr(model, "_orig_mod", model)
    expected = model.state_dict()
    if any(value.is_meta for value in expected.values()):
        raise ValueError("the model has no memory (device meta); call model.to_empty(...) first")
    weights = read_state_dict(path)
    entries = sort_entries(weights, expected)
    if problems := _find_problems(expected, entries.state):
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    _check_normalization(path, model, entries)
    model.load_state_dict(entries.state)
    if entries.prefix:
        logger.info("%s: removed the prefix %r", path, entries.prefix)
    if entries.normalization:
        shown = ", ".join(entries.normalization)
        logger.info("%s: left out %s; the model normalises alike", path, shown)
    if entries.unused:
        shown = _first(entries.unused)
        logger.warning("%s: left out %d unused entries: %s", path, len(entries.unused), shown)
    return entries.left_out


def _check_normalization(path: Path, model: nn.Module, entries: SortedEntries) -> None:
    """Refuse a file whose network sees its input otherwise than the model does."""
    for name, (statistic, value) in entries.normalization.items():
        built_in: Tensor | None = getattr(model, f"input_{statistic}", None)
        neutral = torch.tensor({"mean": 0.0, "std": 1.0}[statistic])
        ours = (neutral if built_in is None else built_in.detach()).double().cpu().flatten()
        theirs = value.detach().double().flatten()
        # One number stands for all channels.
        fits = len(theirs) == len(ours) or 1 in (len(theirs), len(ours))
        if not fits or not ((theirs - ours).abs() <= _NORMALIZATION_TOLERANCE).all():
            own = "does not normalise" if built_in is None else f"uses {_numbers(ours)}"
            raise CheckpointError(
                f"{path} is of a network that normalises its input with the {statistic} "
                f"{_numbers(theirs)} ({name}), and the model {own}; build the model with the mean "
                "and std of the file: create_model(..., mean=[...], std=[...])"
            )


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"


def _find_problems(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    missing = [
        name for name in expected if name not in state and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in expected]
    mismatched = [
        name for name in state if name in expected and state[name].shape != expected[name].shape
    ]
    problems = []
    if missing and all(is_unused_layer(name) for name in missing):
        problems.append(
            "the model has auxiliary batch-norm layers and the file has none: load it into the "
            "plain model and double its layers afterwards (add_dual_batch_norm)"
        )
    if missing and len(unexpected) == len(state):
        problems.append("no name in the file is one of the model's; is it another architecture?")
    if missing:
        problems.append(f"{len(missing)} names missing in the file ({_first(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} names unknown to the model ({_first(unexpected)})")
    if mismatched:
        shapes = [
            f"{name} is {list(state[name].shape)} in the file, {list(expected[name].shape)} here"
            for name in mismatched
        ]
        problems.append(f"{len(mismatched)} shapes differ ({_first(shapes)})")
        problems.extend(_hint(expected[name], state[name]) for name in mismatched)
    return [problem for problem in problems if problem]


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")


def _hint(here: Tensor, there: Tensor) -> str:
    if here.dim() == 2 and there.dim() == 2 and here.shape[1] == there.shape[1]:
        return (
            f"the file has {len(there)} classes, the model {len(here)}: "
            f"build it with num_classes={len(there)}"
        )
    if here.dim() == 4 and there.dim() == 4 and here.shape[0] == there.shape[0]:
        channels = there.shape[1]
        if here.shape[2:] == there.shape[2:] and max(channels, here.shape[1]) <= 4:
            return (
                f"the file is for images of {channels} channels, the model for {here.shape[1]}: "
                f"build it with in_channels={channels}"
            )
    return ""


def save_weights(
    state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights to a safetensors file that is at all times either the old or the new one.

    Args:
        state: names and dense tensors of any device and layout; tensors that share memory are
            written once for each name.
        path: the file; its folder is created if needed.
        metadata: what the file's header says besides, readable without the weights.

    Raises:
        ValueError: an entry is not a dense tensor.
        OSError: the disk is full or not writable; an older file of that name is still there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "weights.safetensors")
        ...     save_weights({"scale": torch.ones(1)}, path)
        ...     read_state_dict(path)
        {'scale': tensor([1.])}
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing safetensors files needs the package safetensors: pip install safetensors"
        ) from error
    path = Path(path)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"weights must be dense tensors; {name} is {type(value).__name__}")
    payload = save(_without_sharing(state), metadata=None if metadata is None else dict(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only inside one file system.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(payload)
            file.flush()
            # Otherwise a power failure could leave the new name with old or no content.
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _without_sharing(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two use the same memory."""
    seen: set[int] = set()
    result = {}
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result
