"""The pseudo-labelled images of Carmon et al. 2019, a pickle, as a part of generated data.

The pickle is read by the rules of ``cifar_pickle``: a name that it asks for is looked up in a short
table of stand-ins, so that it can build plain data and arrays of integers, and run nothing.

Legend: N images, H height, W width, C channels.
"""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dkl.data.cifar_pickle import _KNOWN_NAMES, _PlainDataUnpickler
from dkl.data.lookup import DatasetNotFoundError
from dkl.data.npz import Array
from dkl.data.npz_files import write_arrays

_IMAGES, _LABELS = "data", "extrapolated_targets"
_INTEGERS = ("u1", "i1", "i2", "i4", "i8")


def convert_carmon(pickle_path: Path | str, out_path: Path | str) -> Path:
    """Write the pickle of Carmon et al. 2019 as a part of generated data.

    Source: "Unlabeled data improves adversarial robustness"; 500000 tiny images with the labels
    that a trained model gave them. The pickle, 1.5 GB, is held in memory once.

    Args:
        pickle_path: dictionary with ``data`` [N, H, W, C] uint8 (RGB) and ``extrapolated_targets``
            [N] integers; other entries are left out.
        out_path: npz file to write, for ``GeneratedImages``; replaced if it is there.

    Returns:
        ``out_path``.

    Raises:
        DatasetNotFoundError: there is no such pickle.
        ValueError: it is damaged, asks for anything but plain data and integer arrays, or does not
            hold these two arrays.

    Example:
        >>> import tempfile
        >>> content = {"data": np.zeros((2, 4, 4, 3), np.uint8), "extrapolated_targets": np.ones(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "images.pickle"
        ...     _ = file.write_bytes(pickle.dumps(content))
        ...     convert_carmon(file, Path(folder) / "images.npz")
        Traceback (most recent call last):
        ...
        ValueError: ...images.pickle cannot be read safely (UnpicklingError: arrays must hold
        integers; got dtype 'f8')...
    """
    path, target = Path(pickle_path).expanduser(), Path(out_path).expanduser()
    content = _read(path)
    images_NHWC, labels_N = content.get(_IMAGES), content.get(_LABELS)
    if not (
        isinstance(images_NHWC, np.ndarray)
        and isinstance(labels_N, np.ndarray)
        and images_NHWC.dtype == np.uint8
        and images_NHWC.ndim == 4
        and labels_N.shape == images_NHWC.shape[:1]
        and len(labels_N)
        and int(labels_N.min()) >= 0
    ):
        raise ValueError(
            f"{path} must hold {_IMAGES!r}, uint8 images [N, H, W, C], and {_LABELS!r}, one class "
            f"number from 0 for each; got {_describe(content)}."
        )
    return write_arrays(images_NHWC, labels_N.astype(np.int64), target)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DatasetNotFoundError(f"the pickle {path} does not exist; give the path of the file.")
    try:
        with path.open("rb") as file:
            content = _IntegerArraysUnpickler(file, encoding="latin1").load()
    except Exception as error:  # damaged bytes can make an unpickler raise anything
        raise ValueError(
            f"{path} cannot be read safely ({type(error).__name__}: {error}). It must be the "
            f"pickle of a dictionary of integer arrays; get it again from its publisher."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary; got {type(content).__name__}.")
    return {
        str(key): value.array if isinstance(value, _IntegerArray) else value
        for key, value in content.items()
    }


def _describe(content: Mapping[str, Any]) -> str:
    entries = (
        f"{key}: {value.dtype} of shape {value.shape}"
        if isinstance(value, np.ndarray)
        else f"{key}: {type(value).__name__}"
        for key, value in content.items()
    )
    return "; ".join(entries) or "an empty dictionary"


class _IntegerDtype:
    """Stands for numpy.dtype; integers only, little-endian or single bytes."""

    def __init__(self, name: str, *_flags: object) -> None:
        if name not in _INTEGERS:
            raise pickle.UnpicklingError(f"arrays must hold integers; got dtype {name!r}")
        self.dtype = np.dtype(f"<{name}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"arrays must be little-endian; got {state[1]!r}")


class _IntegerArray:
    """Stands for numpy.ndarray; keeps the pickle's bytes without copying them."""

    def __init__(self) -> None:
        self.array: Array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[int, Any, _IntegerDtype, bool, str | bytes]) -> None:
        _version, shape, dtype, column_major, data = state
        self._fill(shape, dtype, data, in_row_order=not column_major)

    def _fill(self, shape: Any, dtype: object, data: Any, in_row_order: bool) -> None:
        # Python 2 wrote the bytes as text, which is latin1 here.
        raw = data.encode("latin1") if isinstance(data, str) else memoryview(data)
        sizes = tuple(int(n) for n in shape)
        if not isinstance(dtype, _IntegerDtype) or not in_row_order or min(sizes) < 0:
            raise pickle.UnpicklingError("arrays must hold integers in row order")
        if math.prod(sizes) * dtype.dtype.itemsize != len(raw):
            raise pickle.UnpicklingError(
                f"a {dtype.dtype} array of shape {sizes} cannot have {len(raw)} bytes"
            )
        self.array = np.frombuffer(raw, dtype.dtype).reshape(sizes)


def _reconstruct(*_empty_array: object) -> _IntegerArray:
    return _IntegerArray()


def _from_buffer(data: object, dtype: object, shape: object, order: str) -> _IntegerArray:
    array = _IntegerArray()
    array._fill(shape, dtype, data, in_row_order=order == "C")
    return array


# numpy 2 renamed its `core`.
_ARRAY_NAMES: dict[tuple[str, str], object] = {
    ("numpy", "dtype"): _IntegerDtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _IntegerArraysUnpickler(_PlainDataUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        names = {**_KNOWN_NAMES, **_ARRAY_NAMES}
        if (module, name) not in names:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: images and labels need only integer arrays, "
                f"lists, text and numbers"
            )
        return names[module, name]
