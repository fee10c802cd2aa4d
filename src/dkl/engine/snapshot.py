"""A run's state as tensors and plain containers, and back.

What is the same in every process is held once, as the first process has it. What is not
(generators, running sums, batch-norm statistics in the middle of an epoch, what methods collect) is
held per process, so that a resumed run continues bit for bit with the same number of processes.
"""

from typing import Any

from dkl.engine.processes import entries_unlike_first, gather_objects
from dkl.engine.randomness import capture_rng, restore_rng
from dkl.engine.setup import Training
from dkl.engine.state import Checkpoint
from dkl.engine.step import Sums


def capture(training: Training, sums: Sums, seconds: float) -> dict[str, Any]:
    """Return everything beside the weights that a resumed run needs; collective.

    Args:
        training: the objects of the run.
        sums: running sums of the epoch in this process.
        seconds: training time of the epoch so far.
    """
    accelerator, average = training.accelerator, training.average
    own = {
        "rng": capture_rng(training.device),
        "sums": {name: value.cpu() for name, value in sums.items()},
        "seconds": seconds,
        "model": entries_unlike_first(accelerator, training.model.state_dict()),
        "method": entries_unlike_first(accelerator, training.method_module.state_dict()),
        "average": (
            {} if average is None else entries_unlike_first(accelerator, average.model.state_dict())
        ),
    }
    return {
        "optimizer": training.optimizer.state_dict(),
        "method": training.method_module.state_dict(),
        "average": None if average is None else average.state_dict(),
        "scaler": None if training.scaler is None else training.scaler.state_dict(),
        "processes": gather_objects(accelerator, own),
    }


def restore(training: Training, checkpoint: Checkpoint) -> tuple[Sums, float]:
    """Put a run back to where a checkpoint was taken.

    Returns:
        The running sums of the epoch in this process, and its training time so far.
    """
    state = checkpoint.training
    own = state["processes"][training.accelerator.process_index]
    training.model.load_state_dict({**checkpoint.model, **own["model"]})
    training.method_module.load_state_dict({**state["method"], **own["method"]})
    training.optimizer.load_state_dict(state["optimizer"])
    if training.average is not None:
        training.average.model.load_state_dict({**(checkpoint.average or {}), **own["average"]})
        training.average.load_state_dict(state["average"])
    if training.scaler is not None:
        training.scaler.load_state_dict(state["scaler"])
    restore_rng(own["rng"], training.device)
    sums = {name: value.to(training.device) for name, value in own["sums"].items()}
    return sums, own["seconds"]
