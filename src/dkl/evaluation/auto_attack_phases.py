"""Which attacks AutoAttack runs, with which settings, and the package's objects that run them.

Shapes: B samples of a batch, C classes or channels.
"""

import importlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dkl.evaluation.inputs import Ball, EvaluationNorm
from dkl.evaluation.verdict import Predict

Version = Literal["standard", "fast", "square"]
Attack = Callable[[Tensor, Tensor], Tensor]

TESTED_VERSION = "0.2.0"
SQUARE_QUERIES = 5000
NUM_TARGETS = 9
# Under L1 the standard ensemble restarts APGD-CE and gives APGD-T fewer targets.
NUM_TARGETS_APGD_L1 = 5
NUM_RESTARTS_APGD_L1 = 5
# The targeted DLR loss divides by a gap between the largest, third and fourth largest logits.
MIN_CLASSES_DLR = 4
# The L2 and L1 Square attacks start from a grid of five tiles.
MIN_SIDE_SQUARE = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhaseSettings:
    """One attack of the ensemble.

    Args:
        name: "apgd-ce", "apgd-t", "fab-t", "fab" or "square".
        n_restarts: random restarts.
        n_targets: target classes per sample; None: untargeted.
        n_queries: forward passes of the Square attack; None: not a query attack.
        shrinks_radius: APGD begins in balls of three and two times the radius (L1).
    """

    name: str
    n_restarts: int = 1
    n_targets: int | None = None
    n_queries: int | None = None
    shrinks_radius: bool = False


@dataclass(frozen=True)
class Plan:
    """The attacks of one evaluation, in order.

    Args:
        phases: the attacks.
        changed: whether the number of classes dropped or changed an attack.
        notes: what was changed and why.
    """

    phases: tuple[PhaseSettings, ...]
    changed: bool
    notes: tuple[str, ...]

    def as_key(self) -> list[dict[str, object]]:
        """Return the settings as JSON-ready data."""
        return [asdict(phase) for phase in self.phases]


def plan_phases(version: Version, num_classes: int, norm: EvaluationNorm = "Linf") -> Plan:
    """Return the attacks of a version for a number of classes.

    The published ensemble has 9 targets and so needs 10 classes. With 4 to 9 classes every other
    class is a target; below 4 there is no targeted DLR loss, so APGD-T is dropped and FAB runs
    untargeted. Under L1 the ensemble's APGD shrinks its radius, restarts 5 times and has 5 targets.

    Args:
        version: "standard" (APGD-CE, APGD-T, FAB-T, Square), "fast" (the first two) or "square"
            (Square alone).
        num_classes: C, at least 2.
        norm: "Linf", "L2" or "L1".

    Returns:
        The attacks, and what was changed.

    Raises:
        ValueError: for an unknown version.

    Example:
        >>> [phase.name for phase in plan_phases("standard", num_classes=3).phases]
        ['apgd-ce', 'fab', 'square']
        >>> plan_phases("fast", num_classes=6).phases[1].n_targets
        5
    """
    if version not in get_args(Version):
        raise ValueError(f'version must be "standard", "fast" or "square", got {version!r}.')
    square = PhaseSettings("square", n_queries=SQUARE_QUERIES)
    if version == "square":
        return Plan((square,), changed=False, notes=())
    shrinks = norm == "L1"
    restarts = NUM_RESTARTS_APGD_L1 if shrinks else 1
    phases = [PhaseSettings("apgd-ce", n_restarts=restarts, shrinks_radius=shrinks)]
    notes = []
    if num_classes >= MIN_CLASSES_DLR:
        wanted = NUM_TARGETS_APGD_L1 if shrinks else NUM_TARGETS
        targets = min(wanted, num_classes - 1)
        phases.append(PhaseSettings("apgd-t", n_targets=targets, shrinks_radius=shrinks))
        fab = PhaseSettings("fab-t", n_targets=min(NUM_TARGETS, num_classes - 1))
        most = NUM_TARGETS if version == "standard" else wanted
        if num_classes - 1 < most:
            notes.append(
                f"not the standard ensemble: {num_classes} classes leave {num_classes - 1} targets "
                f"where {most} are standard"
            )
    else:
        fab = PhaseSettings("fab")
        swapped = " and FAB ran untargeted" if version == "standard" else ""
        notes.append(
            f"not the standard ensemble: {num_classes} classes are too few for the targeted DLR "
            f"loss (it needs {MIN_CLASSES_DLR}), so APGD-T was dropped{swapped}"
        )
    if version == "standard":
        phases += [fab, square]
    return Plan(tuple(phases), changed=bool(notes), notes=tuple(notes))


def check_square_size(version: Version, norm: EvaluationNorm, image_shape: torch.Size) -> None:
    """Refuse images [C, H, W] that are too small for the Square attack of a version.

    Raises:
        ValueError: with the smallest size.
    """
    if version != "fast" and norm != "Linf" and min(image_shape[1:]) < MIN_SIDE_SQUARE:
        raise ValueError(
            f"Square under {norm} needs images of at least {MIN_SIDE_SQUARE} x {MIN_SIDE_SQUARE} "
            f'pixels, got {list(image_shape[1:])}. version="fast" runs.'
        )


def load_package() -> tuple[ModuleType, tuple[str, ...]]:
    """Import pyautoattack and return it with notes on its version.

    Raises:
        ImportError: when it is not installed, naming the extra that brings it.
    """
    try:
        package = importlib.import_module("pyautoattack")
    except ImportError as error:
        raise ImportError(
            'AutoAttack needs the pyautoattack package: pip install "dkl[robust]"'
        ) from error
    version = getattr(package, "__version__", "unknown")
    if version == TESTED_VERSION:
        return package, ()
    note = f"pyautoattack {version} is installed, tested is {TESTED_VERSION}"
    logger.warning("%s: the result may not be comparable", note)
    return package, (note,)


class WarningCounter:
    """Stands in for the package's logger: counts its warnings instead of repeating them."""

    def __init__(self) -> None:
        self.num_warnings = 0

    def warning(self, message: str, *_args: object) -> None:
        """Count one warning (the only one attack objects give is about zero gradients)."""
        logger.debug("%s", message)
        self.num_warnings += 1


def build_attack(
    package: ModuleType,
    phase: PhaseSettings,
    predict: Predict,
    *,
    ball: Ball,
    device: torch.device,
    seed: int,
    warnings: WarningCounter,
) -> Attack:
    """Return a function that attacks one batch with one of the package's attack objects.

    Args:
        package: pyautoattack.
        phase: which attack, with its settings.
        predict: returns float32 logits [B, C].
        ball: norm and radius.
        device: where the batches are.
        seed: set before every batch, as the package's own loop does.
        warnings: counts what the attack warns about.

    Returns:
        (images, labels) -> finished images; generators are reseeded by every call.
    """
    ensemble = package.AutoAttack(predict, norm=ball.norm, eps=ball.eps, seed=seed, device=device)
    attack: Any
    if phase.name == "apgd-ce":
        attack = ensemble.apgd
        attack.loss = "ce"
        attack.use_largereps = phase.shrinks_radius
        attack.logger = warnings
    elif phase.name == "apgd-t":
        attack = ensemble.apgd_targeted
        attack.n_target_classes = phase.n_targets
        attack.use_largereps = phase.shrinks_radius
        attack.logger = warnings
    elif phase.name in {"fab-t", "fab"}:
        attack = ensemble.fab
        attack.targeted = phase.name == "fab-t"
        if phase.n_targets is not None:
            attack.n_target_classes = phase.n_targets
    else:
        attack = ensemble.square
        attack.n_queries = phase.n_queries
    attack.n_restarts = phase.n_restarts

    def run(images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        attack.seed = seed
        adversarial_BCHW: Tensor = attack.perturb(images_BCHW.clone(), labels_B.clone())
        return adversarial_BCHW.detach()

    return run
