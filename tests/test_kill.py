"""``dkl train`` killed at random moments: every resume works and the result is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dkl.engine import find_checkpoint, load_checkpoint
from dkl.engine.recorder import read_rows

KILLER = Path(__file__).with_name("command_killer.py")
RECIPE = [
    "digits_ikl_at",
    "training.batch_size=128",
    "model.kwargs={width: 4}",
    "method.attack.num_steps=2",
    "method.attack.step_size=0.1",
    "evaluation.validation_attack_steps=1",
    "weight_perturbation={gamma: 0.01, start_epoch: 1}",
    "trackers=[]",
]


def python(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows(run: Path) -> list[dict]:
    times = ("seconds", "images_per_second")
    return [
        {name: value for name, value in row.items() if name not in times}
        for row in read_rows(run / "records.jsonl")
    ]


# Every kill costs at most 12 steps and an epoch has 9 or more: some training is left at the end.
@pytest.mark.parametrize(
    ("num_kills", "epochs"), [(3, 5), pytest.param(20, 29, marks=pytest.mark.slow)]
)
def test_killed_commands_go_on(tmp_path: Path, num_kills: int, epochs: int) -> None:
    words = [*RECIPE, f"training.epochs={epochs}"]
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    said = json.loads(python(str(KILLER), str(num_kills), "1", str(killed), *words))
    assert said["kills"] == len(said["lost"]) == num_kills
    assert max(said["lost"]) < said["interval"]
    print(f"{num_kills} kills lost {said['lost']} steps of {said['interval']} between checkpoints")
    every = f"training.checkpoint_every_steps={said['interval']}"
    python("-m", "dkl", "train", *words, every, "--no-evaluate", "--out", str(straight))
    one, other = (load_checkpoint(find_checkpoint(run)) for run in (straight, killed))
    assert one.meta["epoch"] == other.meta["epoch"] == epochs
    for first, second in (
        (one.model, other.model),
        (one.average, other.average),
        (one.training["method"], other.training["method"]),
    ):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
    assert one.meta["best"] == other.meta["best"]
    assert rows(straight) == rows(killed)
    table = (straight / "class_table.json").read_text()
    assert table == (killed / "class_table.json").read_text()
