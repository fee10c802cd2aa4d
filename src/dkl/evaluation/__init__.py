"""Evaluation: clean accuracy, PGD and CW, AutoAttack, and predictions class by class."""

from dkl.evaluation.accuracy import accuracy, predict_logits
from dkl.evaluation.auto_attack import auto_attack
from dkl.evaluation.auto_attack_result import AttackProgress, AttackRecord, AutoAttackResult
from dkl.evaluation.auto_attack_state import StateMismatchError
from dkl.evaluation.features import class_counts, class_margins, per_class_accuracy
from dkl.evaluation.robustness import EpsilonSweep, epsilon_sweep, pgd_robust

__all__ = [
    "AttackProgress",
    "AttackRecord",
    "AutoAttackResult",
    "EpsilonSweep",
    "StateMismatchError",
    "accuracy",
    "auto_attack",
    "class_counts",
    "class_margins",
    "epsilon_sweep",
    "per_class_accuracy",
    "pgd_robust",
    "predict_logits",
]
