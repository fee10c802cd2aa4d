"""Training methods: each turns a batch into a loss; none knows the loop that calls it."""

from dkl.methods.adversarial import AdversarialTraining, ikl_at, mart, pgd_at, trades
from dkl.methods.cached_teacher import CachedTeacher, CachedTopKTeacher
from dkl.methods.crd import ContrastiveDistillation, crd
from dkl.methods.dajat import DAJAT, dajat
from dkl.methods.feature_distillation import (
    FeatureDistillation,
    attention_transfer,
    fitnet,
    rkd,
)
from dkl.methods.features import FeaturePair
from dkl.methods.las_at import LASAdversarialTraining, las_at
from dkl.methods.lbgat import LBGAT, lbgat
from dkl.methods.logit_distillation import LogitDistillation, dist, dkd, ikl_kd, jsd_kd, kd
from dkl.methods.natural import NaturalTraining
from dkl.methods.ofd import ofd
from dkl.methods.protocol import Batch, Method, StepContext, StepOutput
from dkl.methods.reviewkd import reviewkd
from dkl.methods.terms import FrozenTeacher
from dkl.methods.top_k_distillation import top_k_ikl_kd, top_k_kd

__all__ = [
    "DAJAT",
    "LBGAT",
    "AdversarialTraining",
    "Batch",
    "CachedTeacher",
    "CachedTopKTeacher",
    "ContrastiveDistillation",
    "FeatureDistillation",
    "FeaturePair",
    "FrozenTeacher",
    "LASAdversarialTraining",
    "LogitDistillation",
    "Method",
    "NaturalTraining",
    "StepContext",
    "StepOutput",
    "attention_transfer",
    "crd",
    "dajat",
    "dist",
    "dkd",
    "fitnet",
    "ikl_at",
    "ikl_kd",
    "jsd_kd",
    "kd",
    "las_at",
    "lbgat",
    "mart",
    "ofd",
    "pgd_at",
    "reviewkd",
    "rkd",
    "top_k_ikl_kd",
    "top_k_kd",
    "trades",
]
