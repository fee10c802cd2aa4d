"""SIGKILL at random moments: every resume works, little is lost, and the result is the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("kill_harness.py")


@pytest.mark.parametrize(
    ("num_kills", "epochs"), [(4, 15), pytest.param(20, 120, marks=pytest.mark.slow)]
)
def test_killed_runs_go_on(tmp_path: Path, num_kills: int, epochs: int) -> None:
    command = [sys.executable, str(HARNESS), str(tmp_path), str(num_kills), str(epochs), "0"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"killed {num_kills} of {num_kills}"
