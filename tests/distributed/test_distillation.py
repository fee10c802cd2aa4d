"""Every method of distillation: two processes, accumulation, resume and mixed precision."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dkl.engine import Checkpoint, find_checkpoint, load_checkpoint
from dkl.engine.recorder import read_rows
from tests.distributed.distillation_runs import train
from tests.methods.distillation_cases import COUPLED, NAMES

SCRIPT = Path(__file__).with_name("distillation_runs.py")
TOLERANCE = 1e-6


def last(run: Path) -> Checkpoint:
    return load_checkpoint(find_checkpoint(run))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all methods in two processes with one launch, and in this process."""
    path = tmp_path_factory.mktemp("distillation")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for name in NAMES:
        train(name, path / "one")
        train(name, path / "accumulated", accumulation=4)
    return path


@pytest.mark.parametrize("split", ["two", "accumulated"])
@pytest.mark.parametrize("name", NAMES)
def test_split_steps_give_the_same_trajectory(folder: Path, split: str, name: str) -> None:
    one, other = last(folder / "one" / name), last(folder / split / name)
    assert (one.meta["world_size"], other.meta["world_size"]) == (1, 2 if split == "two" else 1)
    assert one.meta["step"] == other.meta["step"] == 9
    states = (one.model, other.model), (one.training["method"], other.training["method"])
    differences = []
    for first, second in states:
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert second[key].double().isfinite().all(), key
            differences.append((second[key].double() - value.double()).abs().max().item())
            if name not in COUPLED:
                torch.testing.assert_close(second[key], value, rtol=TOLERANCE, atol=1e-10)
    if name in COUPLED:
        # What it declares is so: samples of a micro-batch are seen together.
        assert max(differences) > 1e-6
    if name == "crd":
        banks = [key for key in states[1][0] if key.startswith("banks.")]
        assert len(banks) == 2
        lengths = states[1][0]["banks.student"].norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_is_the_straight_one(folder: Path, tmp_path: Path, name: str) -> None:
    straight = folder / "one" / name
    train(name, tmp_path, epochs=3, checkpoint_every_steps=1, keep_last=20)
    # What a kill after the fifth step leaves: an earlier checkpoint in the middle of an epoch.
    checkpoints = tmp_path / name / "checkpoints"
    (middle,) = checkpoints.glob("step_00000005_*")
    (checkpoints / "last").unlink()
    (checkpoints / "last").symlink_to(middle.name)
    train(name, tmp_path, resume=True, checkpoint_every_steps=1, keep_last=20)
    one, other = last(straight), last(tmp_path / name)
    assert other.meta["step"] == 9
    for first, second in (
        (one.model, other.model),
        (one.training["method"], other.training["method"]),
    ):
        for key, value in first.items():
            assert torch.equal(second[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_learns_the_same_direction(tmp_path: Path, name: str) -> None:
    train(name, tmp_path / "full", dtype="float32", epochs=1)
    train(name, tmp_path / "half", dtype="float32", mixed_precision="bf16", epochs=1)
    full, half = (
        [row["loss"] for row in read_rows(tmp_path / kind / name / "records.jsonl")[:3]]
        for kind in ("full", "half")
    )
    assert all(map(math.isfinite, half))
    assert half == pytest.approx(full, rel=0.05)
