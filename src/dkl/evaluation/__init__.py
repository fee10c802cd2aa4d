"""Evaluation: accuracy, attacks, checks for masked gradients, and what classes look like."""

from dkl.evaluation.accuracy import accuracy, predict_logits
from dkl.evaluation.auto_attack import auto_attack
from dkl.evaluation.auto_attack_result import AttackProgress, AttackRecord, AutoAttackResult
from dkl.evaluation.calibration import (
    Reliability,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)
from dkl.evaluation.features import class_counts, class_margins, per_class_accuracy
from dkl.evaluation.fidelity import Fidelity, fidelity, model_fidelity
from dkl.evaluation.masking import MaskingCheck, masking_checks
from dkl.evaluation.penultimate import Compactness, compactness, penultimate_features
from dkl.evaluation.processes import Processes
from dkl.evaluation.robustness import pgd_images, pgd_robust
from dkl.evaluation.state import StateMismatchError
from dkl.evaluation.sweep import EpsilonSweep, epsilon_sweep
from dkl.evaluation.transfer import transfer_robust

__all__ = [
    "AttackProgress",
    "AttackRecord",
    "AutoAttackResult",
    "Compactness",
    "EpsilonSweep",
    "Fidelity",
    "MaskingCheck",
    "Processes",
    "Reliability",
    "StateMismatchError",
    "accuracy",
    "auto_attack",
    "class_counts",
    "class_margins",
    "compactness",
    "epsilon_sweep",
    "expected_calibration_error",
    "fidelity",
    "masking_checks",
    "model_fidelity",
    "negative_log_likelihood",
    "penultimate_features",
    "per_class_accuracy",
    "pgd_images",
    "pgd_robust",
    "predict_logits",
    "reliability",
    "transfer_robust",
]
