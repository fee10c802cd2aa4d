"""Image classifiers by name, and reading and writing their weights."""

from dkl.models.checkpoints import CheckpointError, load_checkpoint, save_weights
from dkl.models.dual_batch_norm import add_dual_batch_norm
from dkl.models.tap_points import Tap, TapPoints, outputs_of
from dkl.models.taps import FeatureMaps, TapShapes, feature_maps, tap_norms, tap_shapes
from dkl.models.zoo import create_model, list_models

__all__ = [
    "CheckpointError",
    "FeatureMaps",
    "Tap",
    "TapPoints",
    "TapShapes",
    "add_dual_batch_norm",
    "create_model",
    "feature_maps",
    "list_models",
    "load_checkpoint",
    "outputs_of",
    "save_weights",
    "tap_norms",
    "tap_shapes",
]
