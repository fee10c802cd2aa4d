"""LAS-AT's strategy network survives a resume bit for bit and is one network in two processes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dkl.engine import Checkpoint, find_checkpoint, load_checkpoint
from dkl.engine.recorder import read_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny_training import assert_same_run

SCRIPT = Path(__file__).with_name("las_at_runs.py")
VARIANTS = ("pgd", "trades", "awp")
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("las_at_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.VARIANTS) == set(VARIANTS)
    return module


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in two processes, with one launch."""
    path = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return path


@pytest.fixture(scope="module")
def one(runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one")
    for variant in VARIANTS:
        runs.train(path / variant, variant)
    return path


def last(run: Path) -> Checkpoint:
    return load_checkpoint(find_checkpoint(run))


def own_method_states(checkpoint: Checkpoint) -> list[set[str]]:
    """Return which entries of the method's state each process has of its own."""
    return [set(process["method"]) for process in checkpoint.training["processes"]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("at_batch", [1, 4])
def test_stopped_run_goes_on_bit_for_bit(
    runs: ModuleType, tmp_path: Path, variant: str, at_batch: int
) -> None:
    runs.train(tmp_path / "straight", variant, batch_norm=True)
    stopped = runs.train(tmp_path / "stopped", variant, batch_norm=True, at_batch=at_batch)
    assert stopped.stopped_early
    assert stopped.steps_done == at_batch
    state = last(tmp_path / "stopped").training["method"]
    assert state["policy.momentum"].abs().sum() > 0, "the policy had not learnt yet"
    runs.train(tmp_path / "stopped", variant, batch_norm=True, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_the_trajectory_of_one(two: Path, one: Path, variant: str) -> None:
    """Without batch-norm: every sum that the policy learns from is taken over the processes."""
    first, second = last(one / variant), last(two / variant)
    assert (first.meta["world_size"], second.meta["world_size"]) == (1, 2)
    assert first.meta["step"] == second.meta["step"] == 9
    for name, value in (first.model | first.training["method"]).items():
        other = (second.model | second.training["method"])[name]
        torch.testing.assert_close(other, value, rtol=TOLERANCE, atol=1e-12)
    rows = [read_rows(folder / variant / "records.jsonl") for folder in (one, two)]
    for a, b in zip(*rows, strict=True):
        for key in ("reward", "strategy_eps", "strategy_steps", "loss"):
            name = f"train_{key}" if a["kind"] == "epoch" else key
            assert b[name] == pytest.approx(a[name], rel=TOLERANCE)


@pytest.mark.parametrize("name", [*VARIANTS, "accumulated", "batch_norm"])
def test_all_processes_end_with_the_same_strategy_network(two: Path, name: str) -> None:
    checkpoint = last(two / name)
    assert checkpoint.meta["step"] == 9
    assert own_method_states(checkpoint) == [set(), set()]


def test_two_processes_resume_bit_for_bit(two: Path) -> None:
    assert_same_run(two / "batch_norm", two / "stopped")


def test_strategy_network_moved(runs: ModuleType, one: Path) -> None:
    # Equal trajectories of a network that stands still would prove nothing.
    for variant in VARIANTS:
        state = last(one / variant).training["method"]
        start = runs.tiny_network(8 + 2 * (variant == "trades"), 2, False).state_dict()
        moved = state["policy.network.5.weight"] - start["5.weight"].double()
        assert moved.norm() > 0.05
