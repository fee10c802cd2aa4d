"""Reading the pickles of CIFAR-10/100 without running what a pickle may ask for.

A pickle names functions and has them called. Here every name outside a short table is refused, and
the names in the table stand for the small classes of this file, not for numpy's: a file can build
nothing but builtin containers, text, numbers and uint8 arrays.
"""

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_cifar_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary stored in one CIFAR file.

    Args:
        path: a batch or meta file, as published (written by Python 2) or pickled again since.

    Returns:
        Text keys; uint8 arrays come as tensors, everything else as builtin types.

    Raises:
        ValueError: the file is damaged, asks for anything but plain data, or is no dictionary.
    """
    try:
        with path.open("rb") as file:
            content = _PlainDataUnpickler(file, encoding="latin1").load()
    except Exception as error:  # damaged bytes can make an unpickler raise anything
        raise ValueError(
            f"{path} is not a CIFAR file that can be read safely ({type(error).__name__}: "
            f"{error}). Delete it and get the data again from its publisher."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary; got {type(content).__name__}.")
    return {
        str(key): value.tensor() if isinstance(value, _StoredArray) else value
        for key, value in content.items()
    }


class _StoredDtype:
    """Stands for numpy.dtype; only uint8 is known."""

    def __init__(self, name: str, *_flags: object) -> None:
        if name not in ("u1", "uint8", "|u1"):
            raise pickle.UnpicklingError(f"arrays must be uint8; got dtype {name!r}")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment mean nothing for single bytes."""


class _StoredArray:
    """Stands for numpy.ndarray: the bytes and the shape."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.data = b""

    def __setstate__(self, state: tuple[int, Any, _StoredDtype, bool, str | bytes]) -> None:
        _version, shape, dtype, column_major, data = state
        self._fill(shape, dtype, data, in_row_order=not column_major)

    def _fill(self, shape: Any, dtype: object, data: Any, in_row_order: bool) -> None:
        # Python 2 wrote the bytes as text, which is latin1 here.
        self.data = data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))
        self.shape = tuple(int(n) for n in shape)
        if not isinstance(dtype, _StoredDtype) or not in_row_order or min(self.shape) < 0:
            raise pickle.UnpicklingError("arrays must be uint8 in row order")
        if math.prod(self.shape) != len(self.data):
            raise pickle.UnpicklingError(
                f"an array of shape {self.shape} cannot have {len(self.data)} bytes"
            )

    def tensor(self) -> Tensor:
        return torch.tensor(bytearray(self.data), dtype=torch.uint8).reshape(self.shape)


def _reconstruct(*_empty_array: object) -> _StoredArray:
    return _StoredArray()


def _from_buffer(data: object, dtype: object, shape: object, order: str) -> _StoredArray:
    array = _StoredArray()
    array._fill(shape, dtype, data, in_row_order=order == "C")
    return array


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes must be stored as latin1; got {encoding!r}")
    return text.encode("latin1")


# numpy 2 renamed its `core`; Python 3 writes bytes by way of `_codecs` in old protocols.
_KNOWN_NAMES: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): "ndarray",  # only ever an argument of `_reconstruct`
    ("numpy", "dtype"): _StoredDtype,
    ("_codecs", "encode"): _latin1_bytes,
}


class _PlainDataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN_NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: a CIFAR file needs only uint8 arrays, lists, "
                f"text and numbers"
            ) from None
