"""Kills a training run at random moments, resumes it each time, and compares with a straight run.

A script, so that torch is imported once: every victim is a fork of this process.

    python kill_harness.py FOLDER NUM_KILLS EPOCHS SEED
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_training import TinyMethod, assert_same_run, tiny_fit, tiny_model, tiny_settings

from dkl.engine import AverageSettings, find_checkpoint, has_checkpoint, load_checkpoint

INTERVAL = 2
LONGEST_WAIT_SECONDS = 0.4


class Telling(TinyMethod):
    """Leaves the number of completed steps in a file, outside of what is tested."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def prepare(self, model, batch, context):
        self.path.write_text(str(context.step))
        return super().prepare(model, batch, context)


def train(run_dir: Path, told: Path, epochs: int) -> None:
    tiny_fit(
        run_dir,
        model=tiny_model(dropout=0.3),
        method=Telling(told),
        settings=tiny_settings(epochs=epochs, checkpoint_every_steps=INTERVAL),
        weight_average=AverageSettings(decay=0.9),
        resume=has_checkpoint(run_dir),
    )


def kill_once(run_dir: Path, told: Path, epochs: int) -> bool:
    """Return whether the run was still going when it was killed."""
    victim = os.fork()
    if victim == 0:
        status = 1
        try:
            train(run_dir, told, epochs)
            status = 0
        finally:
            os._exit(status)
    time.sleep(random.uniform(0, LONGEST_WAIT_SECONDS))
    os.kill(victim, signal.SIGKILL)
    _, status = os.waitpid(victim, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a resumed run failed"
    return os.WIFSIGNALED(status)


def check(run_dir: Path, told: Path) -> None:
    if not has_checkpoint(run_dir):
        assert not told.exists(), "a step was taken before there was a checkpoint"
        return
    last = load_checkpoint(find_checkpoint(run_dir, "last"))
    if (run_dir / "checkpoints" / "best").exists():
        load_checkpoint(find_checkpoint(run_dir, "best"))
    if told.exists() and told.read_text():
        lost = int(told.read_text()) - last.meta["step"]
        assert lost < INTERVAL, f"{lost} completed steps were lost"


def main() -> None:
    folder, num_kills, epochs, seed = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    random.seed(seed)
    killed, told = folder / "killed", folder / "told"
    num_killed = 0
    for _ in range(num_kills):
        num_killed += kill_once(killed, told, epochs)
        check(killed, told)
    os.fsync = lambda descriptor: None
    train(killed, told, epochs)
    train(folder / "straight", folder / "told_straight", epochs)
    assert_same_run(folder / "straight", killed)
    print(f"killed {num_killed} of {num_kills}")


if __name__ == "__main__":
    main()
