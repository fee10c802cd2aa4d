"""Training methods: each turns a batch into a loss; none knows the loop that calls it."""

from dkl.methods.adversarial import AdversarialTraining, ikl_at, mart, pgd_at, trades
from dkl.methods.dajat import DAJAT, dajat
from dkl.methods.las_at import LASAdversarialTraining, las_at
from dkl.methods.lbgat import LBGAT, lbgat
from dkl.methods.logit_distillation import LogitDistillation, ikl_kd, kd
from dkl.methods.natural import NaturalTraining
from dkl.methods.protocol import Batch, Method, StepContext, StepOutput
from dkl.methods.terms import FrozenTeacher

__all__ = [
    "DAJAT",
    "LBGAT",
    "AdversarialTraining",
    "Batch",
    "FrozenTeacher",
    "LASAdversarialTraining",
    "LogitDistillation",
    "Method",
    "NaturalTraining",
    "StepContext",
    "StepOutput",
    "dajat",
    "ikl_at",
    "ikl_kd",
    "kd",
    "las_at",
    "lbgat",
    "mart",
    "pgd_at",
    "trades",
]
