"""Checkpoints: whole or absent, verified, and never executed."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dkl.engine import state
from dkl.engine.state import (
    CheckpointError,
    clean_checkpoints,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)

FILES = ["model.safetensors", "average.safetensors", "training_state.pt", "meta.json"]


def save(run_dir: Path, number: int, size: int = 3, **options) -> Path:
    weights = {"layer.weight": torch.full((size,), float(number))}
    return save_checkpoint(
        run_dir,
        f"step_{number:08d}",
        model=weights,
        average={name: tensor + 0.5 for name, tensor in weights.items()},
        training={"optimizer": {"state": {0: torch.ones(2)}, "betas": (0.9, 0.99)}, "none": None},
        meta={"step": number, "best": options.pop("best", None)},
        **options,
    )


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    checkpoint = load_checkpoint(path)
    assert checkpoint.meta["step"] == 7
    assert torch.equal(checkpoint.model["layer.weight"], torch.full((3,), 7.0))
    assert torch.equal(checkpoint.average["layer.weight"], torch.full((3,), 7.5))
    assert checkpoint.training["optimizer"]["betas"] == (0.9, 0.99)
    assert find_checkpoint(tmp_path, "last") == path.resolve()


def test_tied_and_strided_weights(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    images = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    path = save_checkpoint(
        tmp_path,
        "step_1",
        model={"first": weight, "second": weight, "transposed": weight.T, "convolution": images},
        average=None,
        training={},
        meta={},
    )
    loaded = load_checkpoint(path)
    assert loaded.average is None
    assert torch.equal(loaded.model["second"], weight)
    assert torch.equal(loaded.model["transposed"], weight.T)
    assert torch.equal(loaded.model["convolution"], images)


def test_old_ones_go_and_best_stays(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path, number, is_best=number == 2)
    assert names(tmp_path) == {"step_00000002", "step_00000005", "last", "best"}
    assert find_checkpoint(tmp_path, "best").name == "step_00000002"


def test_keep_last(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path, number, keep_last=3)
    assert names(tmp_path) == {"step_00000003", "step_00000004", "step_00000005", "last"}


def test_saving_a_linked_checkpoint_again_leaves_it(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    before = (path / "model.safetensors").stat()
    assert save(tmp_path, 1, is_best=True) == path
    assert (path / "model.safetensors").stat().st_ino == before.st_ino
    assert find_checkpoint(tmp_path, "best") == path.resolve()


def test_which_weights(tmp_path: Path) -> None:
    save(tmp_path, 1, is_best=True)
    path = save(tmp_path, 2)
    assert load_weights(tmp_path)["layer.weight"][0] == 1.5
    assert load_weights(tmp_path, "last")["layer.weight"][0] == 2.5
    assert load_weights(tmp_path, "last", prefer_average=False)["layer.weight"][0] == 2
    assert load_weights(path)["layer.weight"][0] == 2.5
    with pytest.raises(ValueError, match="one checkpoint"):
        load_weights(path, "last")


def test_nothing_there(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="folder of a run"):
        find_checkpoint(tmp_path)
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="use 'last'"):
        load_weights(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no meta\.json"):
        load_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1, is_best=True)
    path = save(tmp_path, 2)
    data = bytearray((path / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    (path / name).write_bytes({"truncate": data[:-9], "empty": b""}.get(damage, data))
    if damage == "remove":
        (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*step_00000001"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "not written by this package"),
        ('{"format": "other"}', "not written by this package"),
        ('{"format": "dkl-checkpoint", "format_version": 1}', "lists no files"),
        ('{"format": "dkl-checkpoint", "format_version": 9, "files": {}}', "format 9"),
    ],
)
def test_foreign_meta(tmp_path: Path, content: str, message: str) -> None:
    path = save(tmp_path, 1)
    (path / "meta.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Replace a file the way an attacker would: with a matching checksum."""
    (folder / name).write_bytes(data)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][name] = hashlib.sha256(data).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("in_torch_file", [True, False])
def test_pickle_bomb_is_refused(tmp_path: Path, in_torch_file: bool) -> None:
    path, crater = save(tmp_path, 1), tmp_path / "crater"
    bomb = {"optimizer": Bomb(crater)}
    if in_torch_file:
        torch.save(bomb, path / "training_state.pt")
        data = (path / "training_state.pt").read_bytes()
    else:
        data = pickle.dumps(bomb, protocol=2)
    replace_file(path, "training_state.pt", data)
    with pytest.raises(CheckpointError, match=r"training_state\.pt.*was refused"):
        load_checkpoint(path)
    assert not crater.exists()
    torch.load(path / "training_state.pt", weights_only=False) if in_torch_file else (
        pickle.loads(data)
    )
    assert crater.exists(), "the bomb was a real one"


def test_foreign_files_with_right_checksums(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    replace_file(path, "training_state.pt", b"not a torch file")
    with pytest.raises(CheckpointError, match=r"training_state\.pt"):
        load_checkpoint(path)
    path = save(tmp_path, 2)
    replace_file(path, "model.safetensors", b"not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("call", range(1, 7))
def test_disk_full_at_any_sync(tmp_path: Path, monkeypatch, call: int) -> None:
    save(tmp_path, 1, is_best=True)
    count, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"last good checkpoint.*") as caught:
        save(tmp_path, 2, is_best=True)
    assert "No space left" in str(caught.value)
    monkeypatch.undo()
    assert not [name for name in names(tmp_path) if name.startswith(".writing-step")]
    for which in ("last", "best"):
        assert load_checkpoint(find_checkpoint(tmp_path, which)).meta["step"] in (1, 2)
    assert load_checkpoint(save(tmp_path, 3)).meta["step"] == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_really_full(small_disk: Path) -> None:
    save(small_disk, 1, size=1000, is_best=True)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(small_disk, 2, size=200_000, is_best=True)
    assert names(small_disk) == {"step_00000001", "last", "best"}
    assert load_checkpoint(find_checkpoint(small_disk, "last")).meta["step"] == 1
    save(small_disk, 3, size=1000)
    assert load_checkpoint(find_checkpoint(small_disk, "last")).meta["step"] == 3


def test_what_a_crash_leaves_is_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1, is_best=True)
    good = save(tmp_path, 2, best={"checkpoint": "step_00000001"})
    root = good.parent
    # A crash while writing 4, after writing 3 and pointing best (but not last) to it.
    (root / ".writing-step_00000004").mkdir()
    (root / ".writing-step_00000004" / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 3, is_best=True, keep_last=3)
    state._point(root, "last", "step_00000002")
    clean_checkpoints(tmp_path, load_checkpoint(find_checkpoint(tmp_path, "last")))
    assert names(tmp_path) == {"step_00000001", "step_00000002", "last", "best"}
    assert find_checkpoint(tmp_path, "best").name == "step_00000001"


def test_best_that_never_was_is_unlinked(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    save(tmp_path, 2, is_best=True, keep_last=2)
    state._point(first.parent, "last", "step_00000001")
    clean_checkpoints(tmp_path, load_checkpoint(find_checkpoint(tmp_path, "last")))
    assert names(tmp_path) == {"step_00000001", "last"}
