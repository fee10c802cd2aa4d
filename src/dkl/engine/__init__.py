"""The training loop and what it needs: plans, noise, schedules, averages, checkpoints, records."""

from dkl.engine.averaging import AverageSettings, WeightAverage
from dkl.engine.loop import fit
from dkl.engine.noise import SampleNoise
from dkl.engine.nonfinite import NonFiniteLossError
from dkl.engine.plan import epoch_plan
from dkl.engine.resume import ResumeError
from dkl.engine.schedules import (
    AttackSteps,
    Schedule,
    attack_steps,
    constant,
    cosine,
    linear_ramp,
    one_cycle,
    one_cycle_momentum,
    per_epoch,
    step_decay,
    with_first_epoch,
    with_warmup,
)
from dkl.engine.settings import DataSource, FitResult, LoopSettings
from dkl.engine.state import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from dkl.engine.step import WeightPerturbation

__all__ = [
    "AttackSteps",
    "AverageSettings",
    "Checkpoint",
    "CheckpointError",
    "DataSource",
    "FitResult",
    "LoopSettings",
    "NonFiniteLossError",
    "ResumeError",
    "SampleNoise",
    "Schedule",
    "WeightAverage",
    "WeightPerturbation",
    "attack_steps",
    "constant",
    "cosine",
    "epoch_plan",
    "find_checkpoint",
    "fit",
    "has_checkpoint",
    "linear_ramp",
    "load_checkpoint",
    "load_weights",
    "one_cycle",
    "one_cycle_momentum",
    "per_epoch",
    "save_checkpoint",
    "step_decay",
    "with_first_epoch",
    "with_warmup",
]
