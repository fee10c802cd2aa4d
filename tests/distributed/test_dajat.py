"""DAJAT under weight perturbation, views and mixed images: two processes and one, whole or cut."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dkl.engine import find_checkpoint, load_checkpoint
from dkl.engine.recorder import read_rows

SCRIPT = Path(__file__).with_name("dajat_processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all in one launch of two processes, and in this process."""
    path = tmp_path_factory.mktemp("dajat")
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
    assert "FutureWarning" not in done.stderr
    spec = importlib.util.spec_from_file_location("dajat_processes", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, accumulation in (("one", 1), ("cut", 4)):
        script.train(path / name / "dajat", script.tiny_network(1), accumulation)
        script.views_and_mixing(path / name / "mixing", accumulation=accumulation)
    return path


@pytest.mark.parametrize("split", ["two", "cut"])
@pytest.mark.parametrize("name", ["dajat", "mixing"])
def test_without_batch_norm_a_split_step_is_the_whole(folder: Path, split: str, name: str) -> None:
    one, other = (
        load_checkpoint(find_checkpoint(folder / place / name)) for place in ("one", split)
    )
    assert (one.meta["world_size"], other.meta["world_size"]) == (1, 2 if split == "two" else 1)
    for key, value in one.model.items():
        torch.testing.assert_close(other.model[key], value, rtol=1e-6, atol=1e-12)
    rows = [read_rows(folder / place / name / "records.jsonl") for place in ("one", split)]
    assert len(rows[0]) > 6
    for first, second in zip(*rows, strict=True):
        for key in set(first) - {"seconds", "images_per_second", "kind"}:
            assert second[key] == pytest.approx(first[key], rel=1e-6), key


def test_processes_agree_with_batch_norm_and_resume_bit_for_bit(folder: Path) -> None:
    # The assertions are in the script, where both processes make them.
    assert (folder / "two" / "done").exists()
    names = load_checkpoint(find_checkpoint(folder / "two" / "batch_norm" / "stopped")).model
    assert {"bn.running_mean", "bn_auto.running_mean"} <= names.keys()
