"""Attacks on images within a threat model, and on weights."""

from dkl.attacks.noise import Draw
from dkl.attacks.per_sample import per_sample_pgd
from dkl.attacks.pgd import (
    BatchNormMode,
    Objective,
    PGDSettings,
    attack_mode,
    cross_entropy_objective,
    margin_objective,
    pgd_attack,
)
from dkl.attacks.threat_model import Norm, RandomStart, ThreatModel, parse_number
from dkl.attacks.weight_perturbation import AdversarialWeightPerturbation

__all__ = [
    "AdversarialWeightPerturbation",
    "BatchNormMode",
    "Draw",
    "Norm",
    "Objective",
    "PGDSettings",
    "RandomStart",
    "ThreatModel",
    "attack_mode",
    "cross_entropy_objective",
    "margin_objective",
    "parse_number",
    "per_sample_pgd",
    "pgd_attack",
]
