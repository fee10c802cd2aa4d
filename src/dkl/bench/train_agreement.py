"""Proof that the two sides of a timed training step do the same.

In float64 whole steps are compared, in float32 the update after the attack; see ``compare_float32``
for the reason.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dkl.bench.straightforward import StepNumbers
from dkl.bench.train_sides import (
    BASELINE,
    IMAGE_GRADIENTS,
    OURS,
    Case,
    OurStep,
    Problem,
    ScriptStep,
    StepState,
    make_problem,
    our_settings,
)
from dkl.engine.settings import LoopSettings

# Differences as Euclidean norms, relative to what differs.
FLOAT64_TOLERANCE = 1e-6
FLOAT32_TOLERANCE = 1e-4
EXACT_SAMPLES = 4
EXACT_STEPS = 2  # the first step of momentum, or of an average, does not show its factor


class StepMismatchError(RuntimeError):
    """Two ways to one training step ended in different places, so timing them means nothing."""


@dataclass(frozen=True)
class Differences:
    """How far apart two sides are after a step, as relative Euclidean norms.

    Args:
        parameters: difference of the parameters, relative to them.
        update: difference of the parameters, relative to what the step changed.
        buffers: difference of running statistics, relative to them; the worst of all buffers.
        class_sums: difference of the class statistics, relative to them.
        average: difference of the averaged weights, relative to what the step changed in them.
        adversarial: share of pixels in which the two attacks ended apart.
    """

    parameters: float
    update: float
    buffers: float
    class_sums: float
    average: float
    adversarial: float = 0.0


def differences(ours: StepState, other: StepState, start: StepState) -> Differences:
    """Compare two states after steps from the same start.

    Args:
        ours: after our step.
        other: after the other.
        start: before.

    Raises:
        StepMismatchError: they do not hold the same tensors.
    """
    for part, tensors in vars(ours).items():
        if set(tensors) != set(getattr(other, part)):
            odd = sorted(set(tensors) ^ set(getattr(other, part)))
            raise StepMismatchError(f"only one of the two sides keeps these {part}: {odd}")
    apart = _norm(ours.parameters, other.parameters)
    pairs = [(ours.buffers[name], value) for name, value in other.buffers.items()]
    return Differences(
        parameters=_relative(apart, _norm(other.parameters)),
        update=_relative(apart, _norm(other.parameters, start.parameters)),
        buffers=max(
            (_relative(_norm({"": a}, {"": b}), _norm({"": b})) for a, b in pairs), default=0.0
        ),
        class_sums=_relative(_norm(ours.class_sums, other.class_sums), _norm(other.class_sums)),
        average=_relative(
            _norm(ours.average, other.average), _norm(other.average, start.parameters)
        ),
    )


def _norm(tensors: Mapping[str, Tensor], minus: Mapping[str, Tensor] | None = None) -> float:
    """Return the norm of all tensors as one vector, or of their difference to their namesakes."""
    shifted = [value if minus is None else value - minus[name] for name, value in tensors.items()]
    return math.sqrt(sum(float(value.square().sum()) for value in shifted))


def _relative(apart: float, size: float) -> float:
    if apart == 0.0:
        return 0.0
    return apart / size if size > 0 else float("inf")


def check_agreement(found: Differences, *, what: str, is_float64: bool) -> None:
    """Refuse differences that rounding does not explain.

    In float64 everything has to agree. In float32 the update is not held to a limit relative to
    itself: rounding turns the sign of a few activations and of their gradients.

    Args:
        found: the differences.
        what: the two sides, for the message.
        is_float64: the step was taken in float64.

    Raises:
        StepMismatchError: a difference above its limit, or not a number.
    """
    limits = dict.fromkeys(("parameters", "buffers", "class_sums"), FLOAT32_TOLERANCE)
    if is_float64:
        limits = dict.fromkeys(asdict(found), FLOAT64_TOLERANCE)
    # NaN is above every limit.
    too_far = [
        f"{name} {value:.2g} (at most {limits[name]:.0e})"
        for name, value in asdict(found).items()
        if name in limits and not value <= limits[name]
    ]
    if too_far:
        raise StepMismatchError(
            f"{what}: the same training steps do not end in the same place; relative "
            f"differences: {', '.join(too_far)}. The two do different things: compare the numbers "
            "of the step, the order of the forward passes and what each pass updates. Where they "
            "agree in float64, rounding has turned an activation at zero; take another seed."
        )


def compare_float64(
    case: Case, loop: LoopSettings, options: Sequence[str] = (), *, script: StepNumbers
) -> dict[str, Differences]:
    """Take whole steps in float64, on a few samples, and compare.

    Args:
        case: what is trained.
        loop: settings of our side.
        options: further settings of our side; "bf16" is another precision and is left out.
        script: numbers of the scripts' side.

    Returns:
        Name of a side -> differences to the straightforward step.

    Raises:
        StepMismatchError: they do not agree.
    """
    few = replace(case, batch_size=min(case.batch_size, EXACT_SAMPLES))
    problem = make_problem(few, loop.seed, torch.float64)
    exact = replace(loop, batch_size=few.batch_size, dtype="float64", mixed_precision="no")
    sides: dict[str, OurStep | ScriptStep] = {
        name: OurStep(problem, case.numbers, case.kind, replace(exact, **changes))
        for name, changes in our_settings(options).items()
        if not name.endswith("bf16")
    }
    keyed: dict[str, Any] = {"seed": loop.seed, "device": _device(sides)}
    baseline = ScriptStep(problem, script, **keyed)
    if case.teacher is None:
        sides[IMAGE_GRADIENTS] = ScriptStep(problem, script, parameter_gradients=False, **keyed)
    for _ in range(EXACT_STEPS):
        for side in (baseline, *sides.values()):
            side()
    return {
        name: _compared(side, baseline, problem, name, is_float64=True)
        for name, side in sides.items()
    }


def _device(sides: Mapping[str, OurStep | ScriptStep]) -> torch.device:
    ours = sides[OURS]
    assert isinstance(ours, OurStep)
    return ours.training.device


def compare_float32(case: Case, loop: LoopSettings, *, script: StepNumbers) -> Differences:
    """Take the step in float32 on all samples, both sides updating from our adversarial images.

    The attack itself is compared in float64: at its start, noise of 0.001, the objective lives on
    differences of nearly equal logits, and in float32 a rounding error that decides the sign of one
    pixel's gradient changes many pixels in the steps after it. Memory formats round differently, so
    that ours is the scripts' here.

    Args:
        case: what is trained.
        loop: settings of our side.
        script: numbers of the scripts' side.

    Raises:
        StepMismatchError: they do not agree.
    """
    problem = make_problem(case, loop.seed)
    ours = OurStep(problem, case.numbers, case.kind, replace(loop, channels_last=False))
    other = ScriptStep(problem, script, seed=loop.seed, device=ours.training.device)
    # On a GPU convolutions in TF32 round so coarsely that nothing could be compared.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        ours()
        share = other.follow(ours.adversarial)
    found = _compared(ours, other, problem, f"{OURS}, contiguous", is_float64=False)
    return replace(found, adversarial=share)


def _compared(
    side: OurStep | ScriptStep,
    baseline: ScriptStep,
    problem: Problem,
    name: str,
    *,
    is_float64: bool,
) -> Differences:
    found = differences(side.state(), baseline.state(), StepState.of(problem.model))
    dtype = "float64" if is_float64 else "float32"
    check_agreement(found, what=f"{name} and {BASELINE}, {dtype}", is_float64=is_float64)
    return found
