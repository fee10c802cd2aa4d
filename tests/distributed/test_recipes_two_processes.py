"""Methods train one trajectory, in two processes or in one, whole or in four parts."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dkl.engine import Checkpoint, find_checkpoint, load_checkpoint
from dkl.engine.recorder import read_rows

SCRIPT = Path(__file__).with_name("method_runs.py")
WITHOUT_TABLE = ("trades_awp", "mart_awp", "lbgat_awp", "trades_cutmix")
NAMES = ("ikl_at", "gkl_at", "ikl_at_two_views", "ikl_kd", *WITHOUT_TABLE)
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all methods in two processes with one launch, and in this process."""
    path = tmp_path_factory.mktemp("methods")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(SCRIPT), str(path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    spec = importlib.util.spec_from_file_location("method_runs", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert set(script.METHODS) == set(NAMES)
    script.train_all(path / "one")
    script.train_all(path / "accumulated", accumulation=4)
    return path


def last(run: Path) -> Checkpoint:
    return load_checkpoint(find_checkpoint(run))


@pytest.mark.parametrize("split", ["two", "accumulated"])
@pytest.mark.parametrize("name", NAMES)
def test_split_steps_give_the_same_trajectory(folder: Path, split: str, name: str) -> None:
    one, other = last(folder / "one" / name), last(folder / split / name)
    assert (one.meta["world_size"], other.meta["world_size"]) == (1, 2 if split == "two" else 1)
    assert one.meta["step"] == other.meta["step"] == 9
    for first, second in ((one.model, other.model), (one.average, other.average)):
        for key, value in first.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(second[key], value, rtol=TOLERANCE, atol=1e-12)
    table = "term.statistics.table"
    methods = one.training["method"], other.training["method"]
    assert (table in methods[0]) == (name not in WITHOUT_TABLE)
    assert set(methods[0]) == set(methods[1])
    for key, value in methods[0].items():
        if key.startswith("guide."):
            torch.testing.assert_close(methods[1][key], value, rtol=TOLERANCE, atol=1e-12)
    assert any(key.startswith("guide.") for key in methods[0]) == (name == "lbgat_awp")
    if table in methods[0]:
        torch.testing.assert_close(methods[1][table], methods[0][table], rtol=TOLERANCE, atol=0)
        assert methods[0][table].std() > 1e-4, "no class mean was learnt"
    rows = [read_rows(folder / place / name / "records.jsonl") for place in ("one", split)]
    assert len(rows[0]) == 9 + 3
    for first, second in zip(*rows, strict=True):
        numbers = {key for key in first if key not in ("seconds", "images_per_second", "kind")}
        assert numbers >= {"step", "train_loss" if first["kind"] == "epoch" else "loss"}
        for key in numbers:
            assert second[key] == pytest.approx(first[key], rel=TOLERANCE)


def test_weights_moved(folder: Path) -> None:
    # Equal trajectories of runs that stand still would prove nothing.
    ends = {name: last(folder / "one" / name).model["4.weight"] for name in NAMES}
    for name in NAMES[1:]:
        assert (ends[name] - ends["ikl_at"]).abs().max() > 1e-3
