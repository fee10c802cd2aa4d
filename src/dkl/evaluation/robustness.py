"""Robust accuracy under projected gradient descent, and its curve over the radius.

Shapes: N samples, B samples of a batch, C classes or channels, E radii.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dkl.attacks import (
    Norm,
    PGDSettings,
    RandomStart,
    ThreatModel,
    cross_entropy_objective,
    margin_objective,
    parse_number,
)
from dkl.evaluation.accuracy import check_clean_logits, predict_logits
from dkl.evaluation.auto_attack import auto_attack
from dkl.evaluation.inputs import (
    check_batching,
    check_data,
    check_threat,
    index_batches,
    isolated,
)
from dkl.evaluation.verdict import LogitsModel, judge

ObjectiveName = Literal["ce", "margin"]
SweepAttack = Literal["pgd", "cw", "auto_attack_fast", "auto_attack"]

OBJECTIVES = {"ce": cross_entropy_objective, "margin": margin_objective}


class SampleDraw:
    """Uniform noise that depends on the seed and on each sample's own number, not on its batch.

    Args:
        seed: of the whole evaluation.
        sample_ids_B: [B] numbers of the samples.
        restart: 0-based restart of the attack.
        device: where the noise is wanted; it is made on the CPU, the same for every device.
    """

    def __init__(self, seed: int, sample_ids_B: Tensor, restart: int, device: torch.device) -> None:
        self.seed = seed
        self.sample_ids = sample_ids_B.tolist()
        self.restart = restart
        self.device = device
        self.num_calls = 0

    def __call__(self, num_columns: int) -> Tensor:
        """Return fresh noise [B, num_columns] in [0, 1)."""
        generator = torch.Generator()
        rows = []
        for sample_id in self.sample_ids:
            key = f"{self.seed}/{self.restart}/{self.num_calls}/{sample_id}".encode()
            generator.manual_seed(
                int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")
            )
            rows.append(torch.rand(num_columns, generator=generator))
        self.num_calls += 1
        return torch.stack(rows).to(self.device)


def pgd_robust(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str,
    norm: Norm = "Linf",
    num_steps: int = 20,
    step_size: float | str | None = None,
    objective: ObjectiveName = "ce",
    random_start: RandomStart = "uniform",
    num_restarts: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Return which samples are classified correctly before and after a PGD attack.

    Only samples that are classified correctly are attacked. The finished images decide: a sample
    is lost when the last image of any restart is misclassified, lies in the ball and in [0, 1].

    Args:
        model: returns logits [N, C]; modes, parameters, ``.grad`` and generators are left as found.
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        labels: [N] int64 class indices.
        eps: radius in pixel units of [0, 1]; text such as "8/255" is accepted.
        norm: "Linf" or "L2".
        num_steps: gradient steps (20: PGD-20, CW-20).
        step_size: of one step; None: a quarter of ``eps`` (2/255 for 8/255).
        objective: "ce" (PGD: maximise the cross entropy) or "margin" (CW: maximise the largest
            other logit minus the label's).
        random_start: "uniform" in the ball, "gaussian" (a little noise) or "none".
        num_restarts: attacks per sample, each with its own random start.
        batch_size: samples per forward pass. Starts do not depend on it.
        seed: of the random starts.
        sample_ids: [N] integers that key each sample's noise; None: 0 to N - 1. Give the positions
            in the whole test set when only a part of it is evaluated here.

    Returns:
        [N] bool on the device of ``images``.

    Raises:
        ValueError: for wrong inputs or settings; the message says what to do.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]) / 4)
        >>> model[1].bias = nn.Parameter(torch.tensor([0.5, -0.5]))
        >>> images = torch.tensor([0.1, 0.4, 0.9, 0.9]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
        >>> pgd_robust(model, images, torch.tensor([0, 0, 1, 0]), eps=0.2, num_steps=5)
        tensor([ True, False,  True, False])
    """
    data = check_data(model, images, labels)
    check_batching(batch_size, seed)
    settings = _pgd_settings(check_threat(norm, eps), num_steps, step_size, random_start)
    if objective not in get_args(ObjectiveName):
        raise ValueError(f'objective must be "ce" (PGD) or "margin" (CW), got {objective!r}.')
    if num_restarts < 1 or (num_restarts > 1 and random_start == "none"):
        raise ValueError(
            f"num_restarts must be at least 1, and above 1 needs a random start: got "
            f"{num_restarts} with random_start={random_start!r}."
        )
    ids_N = _checked_ids(sample_ids, len(data))
    logits_NC = predict_logits(model, images, batch_size=batch_size)
    check_clean_logits(logits_NC, data.labels)
    robust_N = logits_NC.max(dim=1).indices == data.labels
    with isolated(model, data.device):
        predict = LogitsModel(model, logits_NC.shape[1])
        for indices_B in index_batches(robust_N.nonzero().squeeze(1), batch_size):
            batch_ids = ids_N[indices_B.cpu()]
            draws = [
                SampleDraw(seed, batch_ids, restart, data.device) for restart in range(num_restarts)
            ]
            robust_N[indices_B] = _survivors(
                predict, data.batch(indices_B), settings, OBJECTIVES[objective], draws
            ).to(robust_N.device)
    return robust_N


def _pgd_settings(
    threat: ThreatModel,
    num_steps: int,
    step_size: float | str | None,
    random_start: RandomStart,
) -> PGDSettings:
    """Return the checked settings of the attack; the default step is a quarter of the radius."""
    settings = PGDSettings(
        threat, num_steps, threat.eps / 4 if step_size is None else step_size, random_start
    )
    if settings.step_size == 0.0:
        raise ValueError("step_size must be positive, got 0: the attack would stand still.")
    return settings


def _checked_ids(sample_ids: Tensor | None, num_samples: int) -> Tensor:
    """Return the numbers that key the samples' noise, on the CPU."""
    if sample_ids is None:
        return torch.arange(num_samples)
    if sample_ids.shape != (num_samples,) or sample_ids.is_floating_point():
        raise ValueError(
            f"sample_ids must be {num_samples} integers, one per image, got {sample_ids.dtype} "
            f"{list(sample_ids.shape)}."
        )
    return sample_ids.cpu()


def _survivors(
    predict: LogitsModel,
    batch: tuple[Tensor, Tensor],
    settings: PGDSettings,
    make_objective: Callable[[Tensor], Callable[[Tensor], Tensor]],
    draws: Sequence[SampleDraw],
) -> Tensor:
    """Attack correctly classified samples, once per draw; return which survive: [B] bool."""
    images_BCHW, labels_B = batch
    objective = make_objective(labels_B)
    survived_B = torch.ones_like(labels_B, dtype=torch.bool)
    for draw in draws:
        adversarial_BCHW = settings.attack(
            predict.model, images_BCHW, lambda logits_BC: objective(logits_BC.float()), draw
        )
        verdict = judge(predict, adversarial_BCHW, images_BCHW, labels_B, settings.threat)
        if verdict.num_rejected:
            # Counting these as robust would flatter the model, as broken would wrong it.
            raise ValueError(
                f"the attack on {verdict.num_rejected} samples gave images outside of the ball or "
                "with NaN pixels. The model's gradients are not finite there: check the weights."
            )
        survived_B &= ~verdict.broken
    return survived_B


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
    norm: Norm = "Linf",
    attack: SweepAttack = "pgd",
    num_steps: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> EpsilonSweep:
    """Return which samples survive an attack at each of several radii.

    Balls are nested, so a sample that breaks at one radius is broken at every larger one: radii are
    taken in ascending order and only survivors are attacked again. The curve never rises.

    Args:
        model: returns logits [N, C].
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        labels: [N] int64 class indices.
        epsilons: radii; 0 gives the clean accuracy; "8/255" is accepted.
        norm: "Linf" or "L2".
        attack: "pgd", "cw" (PGD on the margin), "auto_attack_fast" or "auto_attack".
        num_steps: steps of "pgd" and "cw", each a quarter of the radius; None: 20.
        batch_size: samples per forward pass.
        seed: of the attack.

    Returns:
        The flags and accuracies, in the order of ``epsilons``.

    Raises:
        ValueError: for wrong inputs, no radii, or ``num_steps`` given to AutoAttack.

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
    run = _sweep_attack(model, norm, attack, num_steps, batch_size, seed)
    if not epsilons:
        raise ValueError("epsilons must name at least one radius, got none.")
    radii = [parse_number(eps) for eps in epsilons]
    for radius in radii:
        if radius != 0.0:
            check_threat(norm, radius)
    logits_NC = predict_logits(model, images, batch_size=batch_size)
    check_clean_logits(logits_NC, data.labels)
    robust_N = logits_NC.max(dim=1).indices == data.labels
    flags = {0.0: robust_N.clone()}
    for radius in sorted(set(radii) - {0.0}):
        left = robust_N.nonzero().squeeze(1)
        if len(left):
            robust_N[left] = run(images[left], data.labels[left], left, radius)
        flags[radius] = robust_N.clone()
    return EpsilonSweep(tuple(radii), torch.stack([flags[radius] for radius in radii]))


def _sweep_attack(
    model: nn.Module,
    norm: Norm,
    attack: SweepAttack,
    num_steps: int | None,
    batch_size: int,
    seed: int,
) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Return the function (images, labels, positions, radius) -> flags of one attack."""
    if attack not in get_args(SweepAttack):
        raise ValueError(f"attack must be one of {get_args(SweepAttack)}, got {attack!r}.")
    if attack in {"pgd", "cw"}:
        return lambda images, labels, positions, eps: pgd_robust(
            model,
            images,
            labels,
            eps=eps,
            norm=norm,
            num_steps=20 if num_steps is None else num_steps,
            objective="ce" if attack == "pgd" else "margin",
            batch_size=batch_size,
            seed=seed,
            sample_ids=positions,
        )
    if num_steps is not None:
        raise ValueError(f"num_steps belongs to pgd and cw; {attack} chooses its own steps.")
    return lambda images, labels, _positions, eps: (
        auto_attack(
            model,
            images,
            labels,
            eps=eps,
            norm=norm,
            version="standard" if attack == "auto_attack" else "fast",
            batch_size=batch_size,
            seed=seed,
        ).robust
    )
