"""Two processes share the work of caching a teacher, and train from the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from dkl import config
from dkl.build import train_recipe
from dkl.data.teacher_cache import TeacherCache
from dkl.engine import find_checkpoint, load_checkpoint
from tests.distributed.teacher_caching_runs import fill

SCRIPT = Path(__file__).with_name("teacher_caching_runs.py")


def test_two_processes_write_what_one_writes_and_train_as_with_the_teacher(tmp_path: Path) -> None:
    settings = ["training.epochs=2", "trackers=[]", "model.kwargs={width: 4}"]
    train_recipe(config.load_recipe("digits_natural", settings), tmp_path / "teacher")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert fill(tmp_path, "one").num_written == 602
    for view in (0, 1):
        one, two = (
            TeacherCache.open(tmp_path / name, fingerprint=None).read(torch.arange(301), view=view)
            for name in ("one", "two")
        )
        assert isinstance(one, torch.Tensor)
        assert isinstance(two, torch.Tensor)
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)
    live, from_cache = (
        load_checkpoint(find_checkpoint(tmp_path / run)) for run in ("live", "from_cache")
    )
    assert live.meta["world_size"] == 2
    for key, value in live.model.items():
        torch.testing.assert_close(from_cache.model[key], value, rtol=0, atol=1e-5)
    tables = [
        torch.tensor(json.loads((tmp_path / run / "class_table.json").read_text())["table"])
        for run in ("live", "from_cache")
    ]
    torch.testing.assert_close(tables[1], tables[0], rtol=0, atol=1e-6)
