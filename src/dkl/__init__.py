"""Decoupled, improved and generalised Kullback-Leibler losses for PyTorch.

``import dkl`` needs torch alone. The sub-packages ``attacks``, ``data``, ``evaluation``,
``methods``, ``models``, ``reports`` and the function ``train`` are imported on first use; they
belong to the extras ``train`` and ``robust``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dkl.losses import (
    ClassStatistics,
    DecoupledParts,
    DKLLoss,
    GKLLoss,
    IKLLoss,
    JSDLoss,
    KLLoss,
    ReverseKLLoss,
    decoupled_kl_loss,
    dkl_loss,
    from_authors,
    gkl_loss,
    ikl_loss,
    jsd_loss,
    kl_loss,
    linear_ikl_loss,
    linear_top_k_ikl_loss,
    reverse_kl_loss,
    top_k_ikl_loss,
)

__version__ = "0.1.0"

__all__ = [
    "ClassStatistics",
    "DKLLoss",
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
    "top_k_ikl_loss",
    "train",
]

_LAZY_MODULES = ("attacks", "data", "evaluation", "losses", "methods", "models", "reports")

if TYPE_CHECKING:
    from dkl.build import train


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("dkl.build").train
    if name in _LAZY_MODULES:
        return import_module(f"dkl.{name}")
    raise AttributeError(f"module 'dkl' has no attribute {name!r}")
