"""A process that is killed in the middle of an evaluation."""

import signal
import subprocess
import sys

import torch

from dkl.evaluation import auto_attack

SETTINGS = {"eps": 0.1, "version": "fast", "batch_size": 12, "return_adversarial": True}

KILLED = """
import os, signal, sys
import torch
from dkl.evaluation import auto_attack

model, images, labels, settings, folder = torch.load(sys.argv[1], weights_only=False)
left = [int(sys.argv[2])]

def kill(progress):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

auto_attack(model, images, labels, state_dir=folder, progress=kill, **settings)
"""


def test_a_process_that_is_killed_again_and_again_gets_there(digits, tmp_path, monkeypatch):
    problem = digits.take(40)
    folder = tmp_path / "state"
    torch.save(
        (problem.model, problem.images, problem.labels, SETTINGS, folder), tmp_path / "in.pt"
    )
    for num_batches in (2, 4):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "in.pt"), str(num_batches)]
        done = subprocess.run(command, check=False, timeout=120)
        assert done.returncode == -signal.SIGKILL
    finished = {path.name for path in folder.glob("*.npz")}
    assert len(finished) == 1 + 4

    attacked = []
    module = sys.modules["dkl.evaluation.auto_attack"]
    original = module._Evaluation._attack_batch

    def counted(self, attack, indices, warnings):
        attacked.append(len(indices))
        return original(self, attack, indices, warnings)

    monkeypatch.setattr(module._Evaluation, "_attack_batch", counted)
    batches = []
    data = (problem.model, problem.images, problem.labels)
    resumed = auto_attack(*data, state_dir=folder, progress=batches.append, **SETTINGS)
    assert len(attacked) == len(batches) - 4
    straight = auto_attack(*data, **SETTINGS)
    assert torch.equal(resumed.robust, straight.robust)
    assert torch.equal(resumed.predictions, straight.predictions)
    assert torch.equal(resumed.adversarial, straight.adversarial)
