"""The curve of robust accuracy over the radius.

Shapes: N samples, C classes or channels, E radii.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dkl.attacks import parse_number
from dkl.evaluation.accuracy import check_clean_logits, predict_logits
from dkl.evaluation.auto_attack import auto_attack
from dkl.evaluation.batch_run import ReportProgress
from dkl.evaluation.inputs import (
    EvaluationNorm,
    check_ball,
    check_batching,
    check_data,
    check_gradient_norm,
)
from dkl.evaluation.robustness import pgd_robust

SweepAttack = Literal["pgd", "cw", "auto_attack_fast", "auto_attack"]

SurviveAt = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(images, labels, their positions, radius) -> flags."""


@dataclass(frozen=True, eq=False)
class EpsilonSweep:
    """Robustness at several radii.

    Args:
        epsilons: the radii, in the order in which they were asked for.
        robust: [E, N] bool; which samples survive at each radius.
    """

    epsilons: tuple[float, ...]
    robust: Tensor

    @property
    def robust_accuracy(self) -> tuple[float, ...]:
        """The robust accuracy at each radius, from 0 to 1."""
        return tuple(self.robust.double().mean(dim=1).tolist())


def epsilon_sweep(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[float | str],
    *,
    norm: EvaluationNorm = "Linf",
    attack: SweepAttack = "pgd",
    num_steps: int | None = None,
    relative_step: float | None = None,
    batch_size: int = 256,
    seed: int = 0,
    known: Mapping[float, Tensor] | None = None,
    state_dir: str | Path | None = None,
    progress: ReportProgress | None = None,
    distributed: bool = False,
) -> EpsilonSweep:
    """Return which samples survive an attack at each of several radii.

    Balls are nested, so a sample that breaks at one radius is broken at every larger one: radii are
    taken in ascending order and only survivors are attacked again. The curve never rises.

    Args:
        model: returns logits [N, C].
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        labels: [N] int64 class indices.
        epsilons: radii; 0 gives the clean accuracy; "8/255" is accepted.
        norm: "Linf" or "L2"; "L1" for AutoAttack alone.
        attack: "pgd", "cw" (PGD on the margin), "auto_attack_fast" or "auto_attack".
        num_steps: steps of "pgd" and "cw"; None: 20.
        relative_step: length of these steps as a share of the radius; None: a quarter.
        batch_size: samples per forward pass.
        seed: of the attack.
        known: radius -> flags [N] of these samples that an earlier evaluation found; they are not
            attacked at that radius again, and what broke there is broken at larger ones too.
        state_dir: folder that keeps finished batches, a folder inside it for every radius; the same
            call takes up where it stopped.
        progress: called after every batch; an exception in it stops the evaluation.
        distributed: deal the batches to the processes of torch.distributed, which all call this
            alike; each gets the whole result.

    Returns:
        The flags and accuracies, in the order of ``epsilons``.

    Raises:
        ValueError: for wrong inputs, no radii, steps given to AutoAttack, or ``known`` flags of
            other samples.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> _ = model[1].bias.data.copy_(torch.tensor([0.5, -0.5]))
        >>> images = torch.tensor([0.1, 0.4]).reshape(2, 1, 1, 1)
        >>> sweep = epsilon_sweep(model, images, torch.tensor([0, 0]), [0.0, 0.2, 0.9])
        >>> sweep.robust_accuracy
        (1.0, 0.5, 0.0)
    """
    data = check_data(model, images, labels)
    check_batching(batch_size, seed)
    shared: dict[str, Any] = {
        "norm": norm,
        "batch_size": batch_size,
        "seed": seed,
        "progress": progress,
        "distributed": distributed,
    }
    folder = None if state_dir is None else Path(state_dir)
    run = _attack_at(model, attack, num_steps, relative_step, folder, shared)
    radii = _checked_radii(epsilons, norm, attack, images.shape[1:])
    flags = _checked_flags(known or {}, len(data))
    if 0.0 not in flags:
        logits_NC = predict_logits(model, images, batch_size=batch_size, distributed=distributed)
        check_clean_logits(logits_NC, data.labels)
        flags[0.0] = logits_NC.max(dim=1).indices == data.labels
    robust_N = torch.ones(len(data), dtype=torch.bool, device=images.device)
    for radius in sorted({*radii, *flags}):
        left = robust_N.nonzero().squeeze(1)
        if radius in flags:
            robust_N &= flags[radius].to(images.device)
        elif len(left):
            robust_N[left] = run(images[left], data.labels[left], left, radius)
        flags[radius] = robust_N.clone()
    return EpsilonSweep(tuple(radii), torch.stack([flags[radius] for radius in radii]))


def _checked_radii(
    epsilons: Sequence[float | str], norm: str, attack: SweepAttack, image_shape: torch.Size
) -> list[float]:
    """Return the radii as numbers."""
    if not epsilons:
        raise ValueError("epsilons must name at least one radius, got none.")
    radii = [parse_number(eps) for eps in epsilons]
    for radius in radii:
        if radius != 0.0:
            ball = check_ball(norm, radius, image_shape)
            if attack in {"pgd", "cw"}:
                check_gradient_norm(ball)
    return radii


def _checked_flags(known: Mapping[float, Tensor], num_samples: int) -> dict[float, Tensor]:
    """Return the flags that are known, by radius."""
    for radius, flags_N in known.items():
        if flags_N.shape != (num_samples,) or flags_N.dtype != torch.bool:
            raise ValueError(
                f"known flags must be bool of shape [{num_samples}], one for each image, got "
                f"{flags_N.dtype} {list(flags_N.shape)} for the radius {radius:g}."
            )
    return dict(known)


def _attack_at(
    model: nn.Module,
    attack: SweepAttack,
    num_steps: int | None,
    relative_step: float | None,
    folder: Path | None,
    shared: dict[str, Any],
) -> SurviveAt:
    """Return the function (images, labels, positions, radius) -> flags of one attack."""
    if attack not in get_args(SweepAttack):
        raise ValueError(f"attack must be one of {get_args(SweepAttack)}, got {attack!r}.")
    if relative_step is not None and not relative_step > 0:
        raise ValueError(f"relative_step must be positive, got {relative_step!r}.")

    def state_of(radius: float) -> Path | None:
        return None if folder is None else folder / f"eps_{radius:.9g}"

    if attack in {"pgd", "cw"}:
        return lambda images, labels, positions, eps: pgd_robust(
            model,
            images,
            labels,
            eps=eps,
            num_steps=20 if num_steps is None else num_steps,
            step_size=(0.25 if relative_step is None else relative_step) * eps,
            objective="ce" if attack == "pgd" else "margin",
            sample_ids=positions,
            state_dir=state_of(eps),
            **shared,
        )
    if num_steps is not None or relative_step is not None:
        raise ValueError(
            f"num_steps and relative_step belong to pgd and cw; {attack} chooses its own steps."
        )
    return lambda images, labels, _positions, eps: (
        auto_attack(
            model,
            images,
            labels,
            eps=eps,
            version="standard" if attack == "auto_attack" else "fast",
            state_dir=state_of(eps),
            **shared,
        ).robust
    )
