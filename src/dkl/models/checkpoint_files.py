"""Reading files of weights without ever running code that they contain."""

import logging
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Where training codes keep the weights inside their checkpoints. "model_state_dict" holds averaged
# weights where "unaveraged_model_state_dict" is beside it.
_CONTAINERS = ("state_dict", "model_state_dict", "net", "model")

# Beside the weights, training codes keep their settings and scores in objects of these classes.
_KNOWN_OBJECTS = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
# torch keeps what it allows in one place for all threads.
_allowing_stand_ins = threading.Lock()


class CheckpointError(ValueError):
    """A file of weights that cannot be read, or does not fit the model."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the weights of a safetensors file or of a torch file in one of the usual containers.

    Args:
        path: the file; its content decides how it is read, not its name.

    Returns:
        Names as they are in the file, and tensors on the CPU. Settings and scores beside the
        weights (``argparse.Namespace``, NumPy's numbers) are passed over: empty stand-ins are built
        in their place, so that not even their own classes are called.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint, or would need to run code.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "weights.pt")
        ...     torch.save({"state_dict": {"bias": torch.zeros(1)}, "epoch": 3}, path)
        ...     read_state_dict(path)
        {'bias': tensor([0.])}
    """
    if not path.is_file():
        what = "is a folder; give the file in it" if path.is_dir() else "does not exist"
        raise CheckpointError(f"the checkpoint {path} {what}")
    with path.open("rb") as file:
        head = file.read(256)
    _refuse_text(path, head)
    contents = _read_safetensors(path) if _is_safetensors(head) else _read_torch(path)
    return _unwrap(path, contents)


def _refuse_text(path: Path, head: bytes) -> None:
    if not head:
        raise CheckpointError(f"the checkpoint {path} is empty; download or write it again")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint: the download was answered with HTML "
            "(a login, a quota or a confirmation page); open the link in a browser to get the file"
        )
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the checkpoint itself; run `git lfs pull`"
        )


def _is_safetensors(head: bytes) -> bool:
    # Eight bytes with the length of a JSON header, then the header.
    return head[8:9] == b"{"


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading safetensors files needs the package safetensors: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(_damaged(path, error)) from error


class _StandIn:
    """An object without content in the place of one that a file describes.

    torch's restricted reader may only call what it was told to. Instead of the classes in
    ``_KNOWN_OBJECTS`` it gets this one, which takes any arguments and any state and keeps nothing,
    so that a file cannot make it do anything, whatever the file says about the object.
    """

    __slots__ = ()

    def __new__(cls, *_arguments: object) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None:
        """Drop the state."""


def _read_torch(path: Path) -> Any:
    try:
        return _load(path)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise CheckpointError(_damaged(path, error)) from error
        raise CheckpointError(
            f"{path} was refused: besides tensors it holds Python objects, and loading those "
            "could run any code, so nothing was loaded. If you trust its source, save its bare "
            "state dict with torch.save in the code base that wrote it. What torch says: "
            f"{_first_line(error, containing='global')}"
        ) from error
    except Exception as error:
        # Damaged files fail in torch.load in many ways (RuntimeError, EOFError, KeyError, ...).
        raise CheckpointError(_damaged(path, error)) from error


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not any(name in str(error) for name in _KNOWN_OBJECTS):
            raise
    # Only files that need it are read a second time, because the permission holds for all threads.
    stand_ins: Any = [(_StandIn, name) for name in _KNOWN_OBJECTS]
    with _allowing_stand_ins, torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} is damaged or no checkpoint: it is neither a safetensors file nor a file of "
        f"torch.save that can be read ({_first_line(error)}); download or write it again"
    )


def _first_line(error: Exception, containing: str = "") -> str:
    lines = [line.strip() for line in str(error).splitlines() if containing in line.lower()]
    return lines[0][:200] if lines else type(error).__name__


def _unwrap(path: Path, contents: Any) -> dict[str, Tensor]:
    """Find the one mapping of names to tensors, at the top or in one of the known containers."""
    if not isinstance(contents, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(contents).__name__}, not a dictionary of weights"
        )
    found = [key for key in _CONTAINERS if _has_tensors(contents.get(key))]
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds weights under each of {', '.join(found)}; save the wanted ones alone"
        )
    if not found and not _has_tensors(contents):
        names = ", ".join(str(key) for key in list(contents)[:8]) or "nothing"
        raise CheckpointError(
            f"{path} holds no weights: looked for tensors at the top level and under "
            f"{', '.join(_CONTAINERS)}, found {names}"
        )
    weights = contents[found[0]] if found else contents
    if found:
        others = ", ".join(str(key) for key in contents if key != found[0])
        logger.info("%s: read %r, ignored %s", path, found[0], others or "nothing else")
    if strange := [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"{path}: {len(strange)} entries among the weights are no tensors: "
            f"{', '.join(strange[:5])}"
        )
    return dict(weights)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())
