"""Training methods: each turns a batch into a loss; none knows the loop that calls it."""

from dkl.methods.adversarial import AdversarialTraining, ikl_at, pgd_at, trades
from dkl.methods.logit_distillation import LogitDistillation, ikl_kd, kd
from dkl.methods.natural import NaturalTraining
from dkl.methods.protocol import Batch, Method, StepContext, StepOutput
from dkl.methods.terms import FrozenTeacher

__all__ = [
    "AdversarialTraining",
    "Batch",
    "FrozenTeacher",
    "LogitDistillation",
    "Method",
    "NaturalTraining",
    "StepContext",
    "StepOutput",
    "ikl_at",
    "ikl_kd",
    "kd",
    "pgd_at",
    "trades",
]
