"""Kills ``dkl train`` at random moments, resumes it each time, and lets it finish in the end.

A script, so that torch is imported once: every victim is a fork of this process that runs the
command line.

    python command_killer.py NUM_KILLS SEED RUN RECIPE KEY=VALUE...

Prints one JSON object: kills, steps lost by each, checkpoint interval.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from dkl import build, cli
from dkl.data import load_data
from dkl.engine import find_checkpoint, has_checkpoint, load_checkpoint
from dkl.engine.run import TrainingRun

INTERVAL = 2
MOST_STEPS = 12


def tell_steps(told: Path) -> None:
    """Leave the number of completed steps in a file whenever a step begins."""
    real = TrainingRun._run_step

    def run_step(self, batches):
        with told.open("a") as file:
            file.write(f"{self.step}\n")
        return real(self, batches)

    TrainingRun._run_step = run_step


def steps_told(told: Path) -> list[int]:
    return [int(line) for line in told.read_text().split("\n")[:-1]] if told.exists() else []


def start(run: Path, words: list[str], told: Path) -> int:
    """Fork a process that runs the command, and return its number."""
    resume = ["--resume"] if (run / "recipe.yaml").exists() else []
    victim = os.fork()
    if victim:
        return victim
    code = 1
    try:
        tell_steps(told)
        sys.argv = ["dkl", "train", *words, "--no-evaluate", "--out", str(run), *resume]
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        cli.main()
    except SystemExit as done:
        code = done.code or 0
    finally:
        os._exit(code)


def kill(victim: int, told: Path) -> None:
    """Kill after a random number of steps, or while the command is starting, and a bit later."""
    wanted = random.choice([0, *range(MOST_STEPS)])
    deadline = time.monotonic() + 60
    while len(steps_told(told)) < wanted and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.5 if wanted == 0 else 0.03))
    os.kill(victim, signal.SIGKILL)
    _, status = os.waitpid(victim, 0)
    assert os.WIFSIGNALED(status), f"the command ended by itself with {os.WEXITSTATUS(status)}"


def position(run: Path) -> int:
    """Return the step that a resumed run starts from, after reading all that it would read."""
    if not has_checkpoint(run):
        return 0
    if (run / "checkpoints" / "best").exists():
        load_checkpoint(find_checkpoint(run, "best"))
    return load_checkpoint(find_checkpoint(run, "last")).meta["step"]


def main() -> None:
    num_kills, seed, run = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    words = [*sys.argv[4:], f"training.checkpoint_every_steps={INTERVAL}"]
    torch.set_num_threads(1)
    load_data("digits")
    assert build
    random.seed(seed)
    lost = []
    for number in range(num_kills):
        before, told = position(run), run.parent / f"told_{number}"
        kill(start(run, words, told), told)
        steps = steps_told(told)
        assert steps[:1] in ([], [before]), f"resumed at {steps[0]}, the checkpoint is of {before}"
        lost.append(max([before, *steps]) - position(run))
        assert lost[-1] < INTERVAL, f"{lost[-1]} completed steps were lost"
    told = run.parent / "told_last"
    _, status = os.waitpid(start(run, words, told), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert steps_told(told)[:1] != [0], "nothing was killed in the middle"
    print(json.dumps({"kills": num_kills, "lost": lost, "interval": INTERVAL}))


if __name__ == "__main__":
    main()
