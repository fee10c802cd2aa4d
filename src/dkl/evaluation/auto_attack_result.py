"""What an AutoAttack evaluation reports, while it runs and at its end.

Shapes: N samples, C classes or channels.
"""

from dataclasses import dataclass

from torch import Tensor

from dkl.evaluation.auto_attack_phases import Version
from dkl.evaluation.inputs import EvaluationNorm


@dataclass(frozen=True)
class AttackProgress:
    """Where an evaluation stands; given to the progress callback after every batch.

    With several processes, each tells of its own batches.

    Args:
        attack: name of the running attack.
        attack_index: its 0-based position among ``num_attacks``.
        num_attacks: attacks of the whole evaluation.
        num_done: samples that this attack has finished in this process.
        num_attacked: samples that this attack takes on in this process.
        num_robust: samples that are still robust, of ``num_samples``.
        num_samples: samples of the whole evaluation.
        seconds: spent on this attack so far, batches of earlier runs included.
    """

    attack: str
    attack_index: int
    num_attacks: int
    num_done: int
    num_attacked: int
    num_robust: int
    num_samples: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """What is left of this attack at its pace so far; None before its first batch.

        Example:
            >>> AttackProgress("pgd-20", 0, 1, 30, 90, 80, 100, seconds=60.0).seconds_left
            120.0
        """
        if self.num_done == 0:
            return None
        return self.seconds / self.num_done * (self.num_attacked - self.num_done)


@dataclass(frozen=True, eq=False)
class AttackRecord:
    """What one attack of the ensemble did.

    Args:
        name: "apgd-ce", "apgd-t", "fab-t", "fab" or "square".
        num_attacked: samples that were still robust when it began.
        broken: [N] bool; samples that this attack broke.
        robust_accuracy: after this attack, from 0 to 1.
        seconds: of all its batches, one after the other; those of earlier runs and of other
            processes included.
        n_restarts: random restarts.
        n_targets: target classes per sample; None: untargeted.
    """

    name: str
    num_attacked: int
    broken: Tensor
    robust_accuracy: float
    seconds: float
    n_restarts: int
    n_targets: int | None


@dataclass(frozen=True, eq=False)
class AutoAttackResult:
    """What an evaluation found; tensors are on the device of the images.

    Args:
        robust: [N] bool; classified correctly and not broken by any attack.
        clean_correct: [N] bool; classified correctly without an attack.
        predictions: [N] int64; the class predicted for the adversarial image where one was found,
            for the clean image elsewhere.
        attacks: one record per attack, in order.
        standard: True when exactly the published standard ensemble ran: version "standard" and no
            attack dropped or changed because of the number of classes.
        version: "standard", "fast" or "square".
        norm: "Linf", "L2" or "L1".
        eps: radius.
        seed: of the attacks.
        batch_size: samples per batch; it decides which noise a sample gets.
        num_classes: C.
        package_version: of pyautoattack.
        arithmetic: what was computed in, for example "float32" or "float32 with TF32 convolutions".
        notes: what a reader of the number should know; empty when nothing was unusual.
        adversarial: [N, C, H, W] float32, clean images where no attack succeeded; None unless
            asked for.
    """

    robust: Tensor
    clean_correct: Tensor
    predictions: Tensor
    attacks: tuple[AttackRecord, ...]
    standard: bool
    version: Version
    norm: EvaluationNorm
    eps: float
    seed: int
    batch_size: int
    num_classes: int
    package_version: str
    arithmetic: str
    notes: tuple[str, ...]
    adversarial: Tensor | None = None

    @property
    def clean_accuracy(self) -> float:
        """Share of samples classified correctly without an attack, from 0 to 1."""
        return float(self.clean_correct.double().mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that survived every attack, from 0 to 1."""
        return float(self.robust.double().mean())

    @property
    def seconds(self) -> float:
        """Wall time of all attacks."""
        return sum(record.seconds for record in self.attacks)
