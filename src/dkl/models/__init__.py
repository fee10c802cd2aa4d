"""Image classifiers by name, and reading and writing their weights."""

from dkl.models.checkpoints import CheckpointError, load_checkpoint, save_weights
from dkl.models.dual_batch_norm import add_dual_batch_norm
from dkl.models.zoo import create_model, list_models

__all__ = [
    "CheckpointError",
    "add_dual_batch_norm",
    "create_model",
    "list_models",
    "load_checkpoint",
    "save_weights",
]
