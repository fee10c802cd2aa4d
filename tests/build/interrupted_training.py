"""Trains a small IKL-AT run that gets a signal in the middle of an epoch.

    python interrupted_training.py RUN TERM|KILL

TERM comes in the first epoch of a new run, KILL in the second epoch of a resumed one.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from small_runs import small, use_few_digits

from dkl.build import train_recipe
from dkl.engine.run import TrainingRun

STEPS = {"TERM": 2, "KILL": 6}


def main() -> None:
    run, name = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    use_few_digits(pytest.MonkeyPatch())
    real = TrainingRun._run_step

    def run_step(self, batches):
        if self.step == STEPS[name]:
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return real(self, batches)

    TrainingRun._run_step = run_step
    overrides = ("training.epochs=2", "training.checkpoint_every_steps=2")
    perturbation = "weight_perturbation={gamma: 0.01, start_epoch: 1}"
    recipe = small("digits_ikl_at", *overrides, perturbation)
    outcome = train_recipe(recipe, run, resume=name == "KILL")
    assert outcome.stopped_early == (name == "TERM")


if __name__ == "__main__":
    main()
