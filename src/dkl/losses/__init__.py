"""Losses: mathematics in PyTorch, nothing else."""

from dkl.losses.class_statistics import ClassStatistics
from dkl.losses.decoupled import DecoupledOptions, DecoupledParts, decoupled_kl_loss
from dkl.losses.dense import sequence_loss
from dkl.losses.divergences import (
    JSDLoss,
    KLLoss,
    ReverseKLLoss,
    jsd_loss,
    kl_loss,
    reverse_kl_loss,
)
from dkl.losses.linear import linear_ikl_loss
from dkl.losses.linear_top_k import linear_top_k_ikl_loss
from dkl.losses.top_k import top_k_ikl_loss
from dkl.losses.variants import (
    DKLLoss,
    GKLLoss,
    IKLLoss,
    dkl_loss,
    from_authors,
    gkl_loss,
    ikl_loss,
)

__all__ = [
    "ClassStatistics",
    "DKLLoss",
    "DecoupledOptions",
    "DecoupledParts",
    "GKLLoss",
    "IKLLoss",
    "JSDLoss",
    "KLLoss",
    "ReverseKLLoss",
    "decoupled_kl_loss",
    "dkl_loss",
    "from_authors",
    "gkl_loss",
    "ikl_loss",
    "jsd_loss",
    "kl_loss",
    "linear_ikl_loss",
    "linear_top_k_ikl_loss",
    "reverse_kl_loss",
    "sequence_loss",
    "top_k_ikl_loss",
]
