"""Losses: mathematics in PyTorch, nothing else."""

from dkl.losses.class_statistics import ClassStatistics
from dkl.losses.contrastive import crd_log_normalizer, crd_loss
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
from dkl.losses.feature_distillation import (
    attention_transfer_loss,
    hcl_loss,
    hint_loss,
    vid_loss,
)
from dkl.losses.linear import linear_ikl_loss
from dkl.losses.linear_top_k import linear_top_k_ikl_loss
from dkl.losses.logit_distillation import dist_loss, dkd_loss
from dkl.losses.overhaul import ofd_loss, ofd_margins
from dkl.losses.relational import (
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)
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
    "attention_transfer_loss",
    "crd_log_normalizer",
    "crd_loss",
    "decoupled_kl_loss",
    "dist_loss",
    "dkd_loss",
    "dkl_loss",
    "from_authors",
    "gkl_loss",
    "hcl_loss",
    "hint_loss",
    "ikl_loss",
    "jsd_loss",
    "kl_loss",
    "linear_ikl_loss",
    "linear_top_k_ikl_loss",
    "ofd_loss",
    "ofd_margins",
    "pkt_loss",
    "reverse_kl_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "sequence_loss",
    "similarity_preserving_loss",
    "top_k_ikl_loss",
    "vid_loss",
]
