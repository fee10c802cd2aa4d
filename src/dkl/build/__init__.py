"""The one place that sees both recipes and classes: builds, trains, evaluates, tunes."""

from dkl.build.class_sizes import long_tailed_classes
from dkl.build.distillation import feature_pair
from dkl.build.evaluating import evaluate_run, evaluate_weights
from dkl.build.training import TrainOutcome, train, train_recipe
from dkl.build.tuning import TuneOutcome, tune_recipe
from dkl.data import convert_carmon, convert_npz

__all__ = [
    "TrainOutcome",
    "TuneOutcome",
    "convert_carmon",
    "convert_npz",
    "evaluate_run",
    "evaluate_weights",
    "feature_pair",
    "long_tailed_classes",
    "train",
    "train_recipe",
    "tune_recipe",
]
