"""Learning-rate, momentum, epsilon and attack schedules as pure functions.

A ``Schedule`` maps progress in epochs (2.5 is the middle of the third epoch) to a factor of the
base value. The loop evaluates it before every optimiser step; ``per_epoch`` makes it constant
within an epoch. Epsilon and attack schedules map the 0-based epoch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

Schedule = Callable[[float], float]


class AttackSteps(NamedTuple):
    """Steps of a training attack; ``step_factor`` is the step size in units of epsilon."""

    num_steps: int
    step_factor: float


def constant(value: float = 1.0) -> Schedule:
    """Return a schedule that is always ``value``.

    Example:
        >>> constant()(12.5)
        1.0
    """
    return lambda _: value


def cosine(num_epochs: float, *, offset: float = 0.0, final: float = 0.0) -> Schedule:
    """Return half a cosine from 1 to ``final``.

    factor(p) = final + (1 - final) (1 + cos(pi min(1, (p + offset) / num_epochs))) / 2

    Args:
        num_epochs: epochs until ``final`` is reached.
        offset: added to the progress, in epochs.
        final: factor at the end.

    Raises:
        ValueError: if ``num_epochs`` is not positive.

    Example:
        The authors' rate of epoch e = 1..E is (1 + cos(pi e / (E + 1))) / 2, kept for the epoch:

        >>> E = 200
        >>> official = per_epoch(cosine(E + 1, offset=1))
        >>> official(0.7) == (1 + math.cos(math.pi * 1 / (E + 1))) / 2
        True
    """
    _require_positive("num_epochs", num_epochs)

    def factor(progress: float) -> float:
        position = min(1.0, (progress + offset) / num_epochs)
        return final + (1 - final) * (1 + math.cos(math.pi * position)) / 2

    return factor


def step_decay(milestones: Sequence[float], factor: float = 0.1) -> Schedule:
    """Return a schedule that multiplies by ``factor`` at every milestone.

    Args:
        milestones: progress in epochs, increasing.
        factor: what each milestone multiplies by.

    Raises:
        ValueError: if the milestones do not increase.

    Example:
        >>> schedule = step_decay([100, 150])
        >>> [round(schedule(progress), 6) for progress in (99.9, 100, 150)]
        [1.0, 0.1, 0.01]
    """
    points = tuple(milestones)
    if any(later <= earlier for earlier, later in pairwise(points)):
        raise ValueError(f"milestones must increase; got {list(points)}")
    return lambda progress: math.pow(factor, sum(progress >= point for point in points))


def one_cycle(
    num_epochs: float,
    *,
    pct_start: float = 0.3,
    div: float = 25.0,
    final_div: float = 1e4,
    unit: float = 0.0,
) -> Schedule:
    """Return the one-cycle rate with cosine annealing: up to 1, then down.

    It starts at 1 / div, reaches 1 at ``pct_start * num_epochs - unit`` and ends at
    ``1 / (div * final_div)`` at ``num_epochs - unit``. PyTorch's ``OneCycleLR`` counts
    evaluations from 0, so its peak and end come one evaluation early: ``unit=1`` reproduces it
    stepped per epoch, ``unit=1 / steps_per_epoch`` stepped per step.

    Args:
        num_epochs: length of the cycle.
        pct_start: share of the cycle spent on the way up, in (0, 1).
        div: peak over start.
        final_div: start over end.
        unit: length of one evaluation in epochs.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> schedule = one_cycle(10, pct_start=0.5)
        >>> schedule(0), schedule(5), round(schedule(10) * 25e4, 9)
        (0.04, 1.0, 1.0)
    """
    return _cycle(num_epochs, pct_start, unit, 1 / div, 1.0, 1 / (div * final_div))


def one_cycle_momentum(
    num_epochs: float,
    *,
    low: float = 0.85,
    high: float = 0.95,
    pct_start: float = 0.3,
    unit: float = 0.0,
) -> Schedule:
    """Return the momentum that goes with ``one_cycle``: from ``high`` down to ``low`` and back.

    The values are momenta, not factors. PyTorch cycles the momentum by default, which replaces the
    momentum given to the optimiser.

    Example:
        >>> momentum = one_cycle_momentum(10, pct_start=0.5)
        >>> momentum(0), momentum(5), momentum(10)
        (0.95, 0.85, 0.95)
    """
    return _cycle(num_epochs, pct_start, unit, high, low, high)


def with_warmup(schedule: Schedule, num_epochs: float, *, start: float = 0.0) -> Schedule:
    """Return ``schedule`` times a linear ramp from ``start`` to 1 over the first ``num_epochs``.

    Raises:
        ValueError: if ``num_epochs`` is not positive.

    Example:
        >>> schedule = with_warmup(constant(), 5)
        >>> schedule(0), schedule(2.5), schedule(7)
        (0.0, 0.5, 1.0)
    """
    _require_positive("num_epochs", num_epochs)
    return lambda progress: (
        schedule(progress) * (start + (1 - start) * min(1.0, progress / num_epochs))
    )


def after_warmup(schedule: Schedule, num_epochs: float, *, unit: float = 0.0) -> Schedule:
    """Return a linear ramp from 0 to 1 over the first ``num_epochs``, then ``schedule`` from 0 on.

    Args:
        schedule: over the epochs after the ramp.
        num_epochs: of the ramp.
        unit: length of one evaluation in epochs; 1 together with ``per_epoch`` makes epoch e of W
            have e / W, e = 1..W.

    Raises:
        ValueError: if ``num_epochs`` is not positive.

    Example:
        The rates published for ImageNet-LT: 10 epochs of the ramp, then a cosine of 80 epochs.

        >>> official = per_epoch(after_warmup(cosine(81, offset=1), 10, unit=1))
        >>> [round(official(epoch), 3) for epoch in (0, 9, 10, 50, 89)]
        [0.1, 1.0, 1.0, 0.49, 0.0]
    """
    _require_positive("num_epochs", num_epochs)

    def factor(progress: float) -> float:
        if progress < num_epochs:
            return min(1.0, (progress + unit) / num_epochs)
        return schedule(progress - num_epochs)

    return factor


def with_first_epoch(schedule: Schedule, factor: float) -> Schedule:
    """Return ``schedule`` with another factor throughout the first epoch.

    Args:
        schedule: what counts from the second epoch on.
        factor: of the base value in the first epoch, at least 0.

    Raises:
        ValueError: if ``factor`` is negative.

    Example:
        LBGAT's rates, 0.02 in epoch 1, then 0.1, a tenth of it from epoch 76, a hundredth from 91:

        >>> schedule = with_first_epoch(step_decay([75, 90]), 0.2)
        >>> [round(0.1 * schedule(progress), 6) for progress in (0, 0.99, 1, 74.9, 75, 90)]
        [0.02, 0.02, 0.1, 0.1, 0.01, 0.001]
    """
    if factor < 0:
        raise ValueError(f"factor must not be negative; got {factor}")
    return lambda progress: factor if progress < 1 else schedule(progress)


def per_epoch(schedule: Schedule) -> Schedule:
    """Return ``schedule`` evaluated at the start of the epoch and kept until its end.

    Example:
        >>> per_epoch(cosine(2))(1.9) == cosine(2)(1.0)
        True
    """
    return lambda progress: schedule(math.floor(progress))


def linear_ramp(num_epochs: int) -> Callable[[int], float]:
    """Return the epsilon factor (e + 1) / num_epochs of 0-based epoch e, at most 1.

    Args:
        num_epochs: epochs of the ramp: those of the run, or only its first ones.

    Raises:
        ValueError: if ``num_epochs`` is not positive.

    Example:
        >>> ramp = linear_ramp(4)
        >>> [ramp(epoch) for epoch in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    _require_positive("num_epochs", num_epochs)
    return lambda epoch: min(1.0, (epoch + 1) / num_epochs)


def attack_steps(
    budget: Literal["low", "high", "high_intended"], num_epochs: int
) -> Callable[[int], AttackSteps]:
    """Return the attack steps of an epoch for a named training budget of the DAJAT family.

    "low" is 2 steps of epsilon. "high" is what the published code executes, 5 steps of epsilon / 2
    in every epoch. "high_intended" is what that code means to do, 2, 3, 4 and 5 steps by quarter of
    the run; its step sizes are not published, and 2 epsilon / num_steps is our choice, which keeps
    the distance travelled of "low".

    Raises:
        ValueError: for another budget, or if ``num_epochs`` is not positive.

    Example:
        >>> attack_steps("high", 200)(0)
        AttackSteps(num_steps=5, step_factor=0.5)
        >>> [attack_steps("high_intended", 8)(epoch).num_steps for epoch in range(8)]
        [2, 2, 3, 3, 4, 4, 5, 5]
    """
    _require_positive("num_epochs", num_epochs)
    if budget == "low":
        return lambda _: AttackSteps(2, 1.0)
    if budget == "high":
        return lambda _: AttackSteps(5, 0.5)
    if budget != "high_intended":
        raise ValueError(f"budget must be 'low', 'high' or 'high_intended'; got {budget!r}")

    def by_quarter(epoch: int) -> AttackSteps:
        num_steps = 2 + min(3, 4 * epoch // num_epochs)
        return AttackSteps(num_steps, 2 / num_steps)

    return by_quarter


def set_rates(
    groups: Iterable[dict[str, Any]],
    progress: float,
    schedule: Schedule,
    momentum_schedule: Schedule | None = None,
) -> None:
    """Set learning rate and momentum of an optimiser's parameter groups.

    Args:
        groups: with their base learning rate under "initial_lr".
        progress: in epochs.
        schedule: factor of the base learning rate.
        momentum_schedule: momentum, or the first of Adam's betas; None leaves it.

    Example:
        >>> group = {"initial_lr": 0.2, "lr": 0.2, "betas": (0.9, 0.999)}
        >>> set_rates([group], 1.0, cosine(2), constant(0.8))
        >>> round(group["lr"], 6), group["betas"]
        (0.1, (0.8, 0.999))
    """
    for group in groups:
        group["lr"] = group["initial_lr"] * schedule(progress)
        if momentum_schedule is not None and "betas" in group:
            group["betas"] = (momentum_schedule(progress), *group["betas"][1:])
        elif momentum_schedule is not None:
            group["momentum"] = momentum_schedule(progress)


def _require_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be positive; got {value}")


def _cycle(
    num_epochs: float, pct_start: float, unit: float, start: float, peak: float, end: float
) -> Schedule:
    peak_at = pct_start * num_epochs - unit
    end_at = num_epochs - unit
    if not 0 < peak_at < end_at:
        raise ValueError(
            f"a cycle needs 0 < pct_start * num_epochs - unit < num_epochs - unit; got "
            f"num_epochs={num_epochs}, pct_start={pct_start}, unit={unit}"
        )

    def value(progress: float) -> float:
        if progress <= peak_at:
            return _anneal(start, peak, progress / peak_at)
        return _anneal(peak, end, min(1.0, (progress - peak_at) / (end_at - peak_at)))

    return value


def _anneal(start: float, end: float, position: float) -> float:
    share = (1 + math.cos(math.pi * position)) / 2
    return start * share + end * (1 - share)
