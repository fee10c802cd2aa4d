"""The README's first command, shrunk: every recipe it runs, its table and its report."""

import subprocess
import sys
from pathlib import Path

import dkl

SCRIPT = Path(dkl.__file__).parents[2] / "examples" / "quickstart.py"


def test_quickstart_trains_attacks_compares_and_reports(tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(SCRIPT), "--out", str(tmp_path), "--seeds", "1"),
        *("--num-images", "4", "training.epochs=5", "data.train_limit=200"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for recipe in ("natural", "trades", "ikl_at", "kd", "ikl_kd"):
        assert f"digits_{recipe} seed 0: clean" in done.stdout
        assert (tmp_path / f"digits_{recipe}" / "seed_0" / "results.jsonl").is_file()
    assert "AutoAttack (%)" in done.stdout
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
