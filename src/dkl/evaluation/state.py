"""A folder that keeps a long evaluation's finished batches, so that it can be taken up again.

The folder holds ``manifest.json`` (what is evaluated) and one ``.npz`` file per finished batch.
Every file is written beside its place, flushed, and moved there: a file is whole or absent.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from dkl.evaluation.processes import Processes

MANIFEST = "manifest.json"
FORMAT = 1


class StateMismatchError(ValueError):
    """The folder belongs to another evaluation, or is not a state folder."""


def hash_tensors(*tensors: Tensor) -> str:
    """Return a SHA-256 over the shapes, types and bytes of tensors.

    Example:
        >>> hash_tensors(torch.zeros(2)) == hash_tensors(torch.zeros(2))
        True
        >>> hash_tensors(torch.zeros(2)) == hash_tensors(torch.zeros(2, 1))
        False
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_model(model: nn.Module) -> str:
    """Return a SHA-256 over a model's modules by type, and its parameters and buffers by name.

    Buffers that are left out of checkpoints, such as a built-in mean and standard deviation, count.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name}:{type(module).__qualname__};".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}:{hash_tensors(tensor)};".encode())
    return digest.hexdigest()


class EvaluationState:
    """Finished batches of one evaluation in a folder.

    Args:
        folder: made if it is not there.
        key: JSON-ready facts that decide the result; a folder with other facts is refused.

    Raises:
        StateMismatchError: when the folder holds something else.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        self.key = {"format": FORMAT, **key}
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / MANIFEST
        if manifest.exists():
            self._check_manifest(manifest)
            return
        others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".tmp-")]
        if others:
            raise StateMismatchError(
                f"state_dir {self.folder} has no {MANIFEST} but holds {sorted(others)[:3]}: it is "
                "not the state of an evaluation. Name a new or empty folder."
            )
        text = json.dumps(self.key, indent=2, sort_keys=True)
        self._write(MANIFEST, lambda file: file.write(text.encode()))

    def _check_manifest(self, manifest: Path) -> None:
        """Compare the folder's facts with ours."""
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StateMismatchError(
                f"{manifest} cannot be read ({error}). Delete the folder to start afresh."
            ) from error
        wanted = json.loads(json.dumps(self.key))
        if not isinstance(found, dict):
            found = {}
        differing = sorted(
            name
            for name in found.keys() | wanted.keys()
            if name not in found or name not in wanted or found[name] != wanted[name]
        )
        if differing:
            facts = "; ".join(
                f"{name}: {_shown(found.get(name))} there, {_shown(wanted.get(name))} here"
                for name in differing
            )
            raise StateMismatchError(
                f"state_dir {self.folder} belongs to another evaluation ({facts}). Name another "
                "folder, or delete this one to start afresh."
            )

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors saved under a name, or None when there are none.

        Raises:
            StateMismatchError: when the file is damaged.
        """
        import numpy as np

        path = self.folder / f"{name}.npz"
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise StateMismatchError(
                f"{path} is damaged ({error}). Delete this file; its batch will be run again."
            ) from error

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors under a name, all or nothing."""
        import numpy as np

        arrays = {key: tensor.cpu().numpy() for key, tensor in tensors.items()}
        self._write(f"{name}.npz", lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def _write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file beside its place, flush it to the disk, and move it there."""
        descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=self.folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def open_state(
    folder: str | Path | None, processes: Processes, make_key: Callable[[], Mapping[str, object]]
) -> EvaluationState | None:
    """Open the state folder, if there is one; processes must agree on what is evaluated.

    Raises:
        ValueError: processes evaluate different things.
        StateMismatchError: the folder holds something else.
    """
    if folder is None and processes.count == 1:
        return None
    key = make_key()
    processes.check_same(key)
    if folder is None:
        return None
    return processes.first(lambda: EvaluationState(folder, key))


def load_or_compute(
    state: EvaluationState | None, name: str, compute: Callable[[], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Return what was saved under a name, or compute and save it; without a state, compute."""
    if state is None:
        return compute()
    saved = state.load(name)
    if saved is None:
        saved = dict(compute())
        state.save(name, saved)
    return saved


def _shown(value: object) -> str:
    """Shorten hashes for people."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:12] + '..."'
