"""The examples run by themselves on tiny data, and their students learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dkl

EXAMPLES = Path(dkl.__file__).parents[2] / "examples"
SEEN = r"student (0\.\d+) before, (0\.\d+) after"


@pytest.mark.parametrize(
    ("name", "package", "epochs"),
    [
        ("replace_kl_div", "torch", 3),
        ("timm_task", "timm", 4),
        ("lightning_module", "lightning", 3),
        ("transformers_trainer", "transformers", 8),
    ],
)
def test_example_runs_and_its_student_learns(
    name: str, package: str, epochs: int, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) < 80
    done = subprocess.run(
        [sys.executable, str(script), "--epochs", str(epochs)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = re.search(SEEN, done.stdout)
    assert found, done.stdout
    before, after = map(float, found.groups())
    assert before < 0.3
    assert after > 0.5
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
