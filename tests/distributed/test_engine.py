"""Two processes under torchrun: the trajectory of one, and one decision for both."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dkl.engine import ResumeError, find_checkpoint, load_checkpoint
from dkl.engine.recorder import read_rows

SCRIPT = Path(__file__).with_name("engine_processes.py")
NUMBERS = ("loss", "accuracy", "train_loss", "train_accuracy", "val_loss", "learning_rate")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, script: ModuleType) -> Path:
    """Run all scenarios in one launch, and the trajectory in this process."""
    path = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(SCRIPT), str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    script.trajectory(path / "one")
    return path


@pytest.mark.parametrize("split", ["two", "two_accumulated"])
def test_same_trajectory_as_one_process(folder: Path, split: str) -> None:
    one, other = (load_checkpoint(find_checkpoint(folder / name)) for name in ("one", split))
    assert other.meta["world_size"] == 2
    assert one.meta["world_size"] == 1
    for first, second in ((one.model, other.model), (one.average, other.average)):
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=1e-12)
    method, other_method = one.training["method"], other.training["method"]
    torch.testing.assert_close(other_method["scale"], method["scale"], rtol=1e-6, atol=0)
    assert torch.equal(other_method["histogram"], method["histogram"])
    rows = [read_rows(folder / name / "records.jsonl") for name in ("one", split)]
    for first, second in zip(*rows, strict=True):
        for key in set(NUMBERS) & first.keys():
            assert second[key] == pytest.approx(first[key], rel=1e-6)


@pytest.mark.parametrize(
    "scenario",
    [
        "stopped_and_resumed",
        "batch_norm_agrees",
        "one_bad_loss_ends_all",
        "full_disk_ends_all",
        "synchronised_batch_norm_is_refused",
        "left_unfinished",
    ],
)
def test_scenario_was_run(folder: Path, script: ModuleType, scenario: str) -> None:
    # Its assertions are in the script, where both processes make them.
    assert scenario in {function.__name__ for function in script.SCENARIOS}
    assert (folder / f"{scenario}.done").exists()


def test_bad_batch_of_all_processes_is_saved(folder: Path) -> None:
    from safetensors.torch import load_file

    batch = load_file(folder / "bad" / "nonfinite" / "step_00000001.safetensors")
    assert len(batch["indices"].unique()) == 8


def test_other_number_of_processes_is_refused(folder: Path, script: ModuleType) -> None:
    with pytest.raises(ResumeError, match="world_size was 2 and is now 1"):
        script.stochastic(folder / "unfinished", resume=True)
