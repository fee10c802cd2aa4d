"""Checkpoints: folders that are complete or absent.

``RUN/checkpoints/`` holds one folder per checkpoint and the symbolic links ``last`` and ``best``. A
folder holds ``model.safetensors``, ``average.safetensors`` if weights are averaged,
``training_state.pt`` (plain tensors and numbers) and ``meta.json``, which names the SHA-256 of the
other files. It is written under a temporary name, synced, renamed, and only then linked, so that a
crash at any moment leaves the previous checkpoint in place. Nothing is ever unpickled but tensors
and plain containers.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

FORMAT = "dkl-checkpoint"
FORMAT_VERSION = 1

_CHECKPOINTS = "checkpoints"
_MODEL = "model.safetensors"
_AVERAGE = "average.safetensors"
_TRAINING = "training_state.pt"
_META = "meta.json"
_TEMPORARY = ".writing-"

Which = Literal["last", "best"]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found or trusted."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Args:
        path: its folder.
        meta: position, versions, recipe and the like; JSON values only.
        model: weights and buffers under their plain names.
        average: averaged weights and buffers, or None.
        training: optimiser, method, generators, sums; tensors and plain containers only.
    """

    path: Path
    meta: dict[str, Any]
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    training: dict[str, Any]


def save_checkpoint(
    run_dir: Path,
    name: str,
    *,
    model: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    training: Mapping[str, Any],
    meta: Mapping[str, Any],
    is_best: bool = False,
    keep_last: int = 1,
) -> Path:
    """Write a checkpoint, make it the last one, and remove those no longer needed.

    Args:
        run_dir: folder of the run.
        name: name of the checkpoint; names sort in the order of training.
        model: weights and buffers.
        average: averaged weights and buffers, or None.
        training: what else is needed to resume; tensors and plain containers only.
        meta: JSON values.
        is_best: make it the best one too.
        keep_last: number of latest checkpoints to keep beside the best.

    Returns:
        Its folder.

    Raises:
        CheckpointError: if it could not be written (a full disk, say); the last good checkpoint is
            untouched then and nothing half-written is left.
    """
    root = run_dir / _CHECKPOINTS
    temporary = root / f"{_TEMPORARY}{name}"
    final = root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        if final.resolve() not in _pointed(root):
            for leftover in (temporary, final):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir()
            _write_files(temporary, model, average, training, meta)
            temporary.replace(final)
        _point(root, "last", name)
        if is_best:
            _point(root, "best", name)
        _sync(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. The last good checkpoint is "
            f"untouched; free some space (or fix the folder's permissions), then resume the run"
        ) from error
    _remove_old(root, keep_last)
    return final


def clean_checkpoints(run_dir: Path, last: Checkpoint) -> None:
    """Undo what a crash left behind, before training resumes from ``last``.

    Half-written folders and checkpoints later than ``last`` are removed, and ``best`` points again
    to what ``last`` knows as the best.
    """
    root = run_dir / _CHECKPOINTS
    best = last.meta.get("best") or {}
    best_name = best.get("checkpoint")
    if best_name and (root / best_name).is_dir():
        _point(root, "best", best_name)
    elif (root / "best").is_symlink():
        (root / "best").unlink()
    for path in root.iterdir():
        is_leftover = path.name.startswith(_TEMPORARY) or path.name > last.path.name
        if path.is_dir() and not path.is_symlink() and is_leftover:
            shutil.rmtree(path)


def find_checkpoint(run_dir: Path | str, which: Which = "last") -> Path:
    """Return the folder of a run's last or best checkpoint.

    Raises:
        CheckpointError: if there is none.
    """
    link = Path(run_dir) / _CHECKPOINTS / which
    if not link.is_dir():
        advice = (
            "a run without validation has no best checkpoint: use 'last'"
            if which == "best" and has_checkpoint(run_dir)
            else "is this the folder of a run, and was it started?"
        )
        raise CheckpointError(f"no {which} checkpoint at {link}; {advice}")
    return link.resolve()


def has_checkpoint(run_dir: Path | str) -> bool:
    """Return whether a run has written a checkpoint."""
    return (Path(run_dir) / _CHECKPOINTS / "last").is_dir()


def unlinked_checkpoints(run_dir: Path | str) -> list[Path]:
    """Return checkpoints of a run that has lost its links, in the order of training."""
    if has_checkpoint(run_dir):
        return []
    return sorted(path.parent for path in (Path(run_dir) / _CHECKPOINTS).glob(f"step_*/{_META}"))


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint and verify every byte of it.

    Args:
        path: its folder.

    Raises:
        CheckpointError: if a file is missing, damaged, foreign, or holds anything but tensors and
            plain containers; such a file is never executed.
    """
    folder = Path(path)
    meta = load_meta(folder)
    average = _AVERAGE in meta["files"]
    return Checkpoint(
        path=folder,
        meta=meta,
        model=_load_tensors(folder, _MODEL, meta),
        average=_load_tensors(folder, _AVERAGE, meta) if average else None,
        training=_load_training(folder, meta),
    )


def load_weights(
    path: Path | str, which: Which | None = None, *, prefer_average: bool = True
) -> dict[str, Tensor]:
    """Return the weights of a run or of one checkpoint.

    Args:
        path: folder of a run or of a checkpoint.
        which: "best" (the default for a run) or "last"; None for the folder of a checkpoint.
        prefer_average: return the averaged weights where there are any.

    Raises:
        CheckpointError: if nothing is found or the file is damaged.
        ValueError: if ``which`` is given for a single checkpoint.
    """
    folder = Path(path)
    if (folder / _META).is_file():
        if which is not None:
            raise ValueError(f"{folder} is one checkpoint; leave out which={which!r}")
    else:
        folder = find_checkpoint(folder, which or "best")
    meta = load_meta(folder)
    name = _AVERAGE if prefer_average and _AVERAGE in meta["files"] else _MODEL
    return _load_tensors(folder, name, meta)


def load_meta(folder: Path) -> dict[str, Any]:
    """Read the ``meta.json`` of a checkpoint.

    Raises:
        CheckpointError: if it is missing, damaged or foreign.
    """
    path = folder / _META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {_META}") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this package; it cannot be resumed from")
    if not isinstance(meta.get("files"), dict):
        raise _damaged(path, "it lists no files")
    if meta.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {meta.get('format_version')}, this version of the "
            f"package reads {FORMAT_VERSION}; use the version named under 'versions' in that file"
        )
    return meta


def _write_files(
    folder: Path,
    model: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    training: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> None:
    contents = {_MODEL: _tensor_bytes(model)}
    if average is not None:
        contents[_AVERAGE] = _tensor_bytes(average)
    buffer = io.BytesIO()
    torch.save(dict(training), buffer)
    contents[_TRAINING] = buffer.getvalue()
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **meta, "files": files}
    contents[_META] = (json.dumps(document, indent=2) + "\n").encode()
    # All is written before anything is synced, so that the disk can take it in one go.
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    for path in (*(folder / name for name in contents), folder):
        _sync(path)


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # Copies, because the format refuses tensors that share memory (tied weights).
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(plain)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(root: Path, which: Which, name: str) -> None:
    temporary = root / f"{_TEMPORARY}{which}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(root / which)


def _pointed(root: Path) -> set[Path]:
    return {(root / which).resolve() for which in ("last", "best")}


def _remove_old(root: Path, keep_last: int) -> None:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    pointed = _pointed(root)
    for folder in folders[:-keep_last]:
        if folder.resolve() not in pointed:
            shutil.rmtree(folder, ignore_errors=True)


def _read_verified(folder: Path, name: str, meta: Mapping[str, Any]) -> bytes:
    path = folder / name
    expected = meta["files"].get(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, str(error)) from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise _damaged(path, f"its SHA-256 differs from the one in {_META}")
    return data


def _load_tensors(folder: Path, name: str, meta: Mapping[str, Any]) -> dict[str, Tensor]:
    data = _read_verified(folder, name, meta)
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise _damaged(folder / name, str(error)) from error


def _load_training(folder: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    data = _read_verified(folder, _TRAINING, meta)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{folder / _TRAINING} holds more than tensors and plain numbers and was refused: it "
            f"may run code when loaded, and was not written by this package"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise _damaged(folder / _TRAINING, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(folder / _TRAINING, "it holds no dictionary")
    return content


def _damaged(path: Path, reason: str) -> CheckpointError:
    others = sorted(
        other.name
        for other in path.parent.parent.glob("*")
        if (other / _META).is_file() and other.name not in (path.parent.name, "last", "best")
    )
    advice = f"other checkpoints beside it: {', '.join(others)}" if others else "there is no other"
    return CheckpointError(
        f"{path} is damaged or incomplete: {reason}. Restore it from a copy or use another "
        f"checkpoint ({advice})"
    )
