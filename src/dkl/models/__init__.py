"""Image classifiers by name, and reading and writing their weights."""

from dkl.models.checkpoints import CheckpointError, load_checkpoint, save_weights
from dkl.models.zoo import create_model, list_models

__all__ = ["CheckpointError", "create_model", "list_models", "load_checkpoint", "save_weights"]
