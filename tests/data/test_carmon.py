"""Carmon's pickle: written by numpy and pickle in every protocol, and hostile ones."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dkl.data import DatasetNotFoundError, GeneratedImages, convert_carmon


def content(num: int = 20) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "data": rng.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8),
        "extrapolated_targets": rng.integers(0, 10, num),
    }


def old_numpy(raw: bytes) -> bytes:
    """Return the pickle with the module names of numpy 1, of the time of the published file."""
    return raw.replace(b"numpy._core.", b"numpy.core.")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_arrays_are_converted(tmp_path: Path, protocol: int, dtype: str) -> None:
    expected = content()
    expected["extrapolated_targets"] = expected["extrapolated_targets"].astype(dtype)
    expected["model"] = "some_name"
    raw = pickle.dumps(expected, protocol=protocol)
    (tmp_path / "a.pickle").write_bytes(old_numpy(raw) if protocol < 4 else raw)
    path = convert_carmon(tmp_path / "a.pickle", str(tmp_path / "out" / "a.npz"))
    generated = GeneratedImages([path], num_classes=10, image_shape=(3, 32, 32))
    images, labels = generated.rows(torch.arange(20))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected["data"])
    assert labels.tolist() == expected["extrapolated_targets"].tolist()


class Hostile:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 5])
def test_code_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    for call in (
        Hostile(os.mkdir, str(witness)),
        Hostile(os.system, f"touch {witness}"),
        Hostile(eval, f"open({str(witness)!r}, 'w')"),
        Hostile(np.fromfile, str(tmp_path / "a.pickle")),
    ):
        raw = pickle.dumps({**content(2), "extra": call}, protocol=protocol)
        (tmp_path / "a.pickle").write_bytes(raw)
        with pytest.raises(ValueError, match=r"cannot be read safely .*refused to load"):
            convert_carmon(tmp_path / "a.pickle", tmp_path / "a.npz")
        assert not witness.exists()
        assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"must hold a dictionary; got list"),
        ({}, r"got an empty dictionary"),
        ({"data": content()["data"]}, r"got data: uint8 of shape \(20, 32, 32, 3\)\."),
        ({**content(), "extrapolated_targets": [1] * 20}, r"extrapolated_targets: list"),
        ({**content(), "extrapolated_targets": np.zeros(19, int)}, r"of shape \(19,\)"),
        ({**content(), "extrapolated_targets": np.full(20, -1)}, r"class number from 0"),
        ({**content(), "extrapolated_targets": np.zeros(20)}, r"integers; got dtype 'f8'"),
        ({**content(), "data": np.zeros((20, 3072), np.uint8)}, r"\(20, 3072\)"),
        ({**content(), "data": np.zeros((20, 2, 2, 3), np.int64)}, r"data: int64"),
        ({**content(), "data": np.array([{}] * 20)}, r"cannot be read safely"),
        ({**content(), "data": np.asfortranarray(content()["data"])}, r"in row order"),
        ({**content(), "extrapolated_targets": np.zeros(20, ">i8")}, r"little-endian"),
        ({**content(), "data": np.empty((0, 2, 2, 3), np.uint8)}, r"cannot be read|must hold"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_content_is_explained(
    tmp_path: Path, value: Any, message: str, protocol: int
) -> None:
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(ValueError, match=message) as caught:
        convert_carmon(tmp_path / "a.pickle", tmp_path / "a.npz")
    assert "a.pickle" in str(caught.value)
    assert not (tmp_path / "a.npz").exists()


def test_damaged_and_missing_files_are_explained(tmp_path: Path) -> None:
    raw = pickle.dumps(content())
    for damaged in (
        b"",
        b"hello",
        raw[: len(raw) // 2],
        raw.replace(b"\x20\x4b\x20", b"\x20\x4b\x21"),
    ):
        (tmp_path / "a.pickle").write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read safely"):
            convert_carmon(tmp_path / "a.pickle", tmp_path / "a.npz")
    with pytest.raises(DatasetNotFoundError, match="does not exist"):
        convert_carmon(tmp_path / "gone.pickle", tmp_path / "a.npz")
