"""Scenarios of the training loop for two processes; run by torchrun, and by the test in one.

torchrun --nproc_per_node 2 engine_processes.py FOLDER
"""

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny_training import (
    InterruptingData,
    TinyData,
    TinyMethod,
    TinyPerturbation,
    assert_same_run,
    tiny_fit,
    tiny_model,
    tiny_settings,
)

from dkl.cli.processes import leave
from dkl.engine import AverageSettings, CheckpointError, NonFiniteLossError, find_checkpoint

NUM_SAMPLES = 21  # steps of 8, 8 and 5: the last one is uneven


def trajectory(out_dir: Path, **settings: Any) -> None:
    """Train what must not depend on how steps are split."""
    tiny_fit(
        out_dir,
        data=TinyData(NUM_SAMPLES),
        settings=tiny_settings(epochs=3, clip_norm=0.5, **settings),
        weight_perturbation=TinyPerturbation(start_epoch=1),
        weight_average=AverageSettings(decay=0.9),
    )


def rank() -> int:
    return torch.distributed.get_rank()


def stochastic(out_dir: Path, data: TinyData | None = None, resume: bool = False) -> Any:
    """Train with everything that has state per process: dropout, batch-norm, label sums."""
    return tiny_fit(
        out_dir,
        model=tiny_model(dropout=0.3, batch_norm=True),
        data=data or TinyData(NUM_SAMPLES),
        weight_average=AverageSettings(decay=0.9),
        resume=resume,
    )


def stopped_and_resumed(folder: Path) -> None:
    """Stop both processes by a signal to the second one alone; in the middle of an epoch."""
    stochastic(folder / "straight")
    data = InterruptingData(2, num_samples=NUM_SAMPLES) if rank() == 1 else None
    result, _ = stochastic(folder / "stopped", data)
    assert result.stopped_early
    assert result.steps_done == 2
    saved = torch.load(result.last_checkpoint / "training_state.pt")["processes"]
    assert saved[1]["model"].keys() == {"3.running_mean", "3.running_var"}
    stochastic(folder / "stopped", resume=True)
    if rank() == 0:
        assert_same_run(folder / "straight", folder / "stopped")


def batch_norm_agrees(folder: Path) -> None:
    """Running statistics are the same everywhere after an epoch, and so is what is validated."""
    _, model = stochastic(folder / "batch_norm")
    mean = model[3].running_mean
    gathered = [torch.empty_like(mean) for _ in range(2)]
    torch.distributed.all_gather(gathered, mean)
    assert torch.equal(*gathered)
    assert mean.abs().sum() > 0


def one_bad_loss_ends_all(folder: Path) -> None:
    class Exploding(TinyMethod):
        def loss(self, model, batch, context):
            output = super().loss(model, batch, context)
            bad = context.step == 1 and rank() == 1
            return replace(output, loss=output.loss * torch.nan) if bad else output

    data = TinyData(NUM_SAMPLES)
    with pytest.raises(NonFiniteLossError, match="step 1 "):
        tiny_fit(folder / "bad", method=Exploding(), data=data)


def full_disk_ends_all(folder: Path) -> None:
    real = Path.write_bytes

    def write_bytes(path: Path, content: bytes) -> int:
        assert rank() == 0, "only the first process writes"
        if "step_00000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    Path.write_bytes = write_bytes
    with pytest.raises(CheckpointError, match="No space left"):
        tiny_fit(folder / "full", data=TinyData(NUM_SAMPLES))
    Path.write_bytes = real
    assert find_checkpoint(folder / "full").name.startswith("step_00000003")


def synchronised_batch_norm_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs GPUs"):
        tiny_fit(folder / "synchronised", settings=tiny_settings(batch_norm="sync"))


def left_unfinished(folder: Path) -> None:
    stochastic(folder / "unfinished", InterruptingData(2, num_samples=NUM_SAMPLES))


SCENARIOS: list[Callable[[Path], None]] = [
    stopped_and_resumed,
    batch_norm_agrees,
    one_bad_loss_ends_all,
    full_disk_ends_all,
    synchronised_batch_norm_is_refused,
    left_unfinished,
]


def main() -> None:
    folder = Path(sys.argv[1])
    trajectory(folder / "two")
    assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"]) == 2
    trajectory(folder / "two_accumulated", accumulation=2)
    for scenario in SCENARIOS:
        scenario(folder)
        if rank() == 0:
            (folder / f"{scenario.__name__}.done").touch()
    leave()


if __name__ == "__main__":
    main()
