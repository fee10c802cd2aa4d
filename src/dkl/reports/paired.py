"""The paired comparison of two methods that were trained with the same seeds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class PairedDifference:
    """Mean and sample standard deviation of differences by seed, and the test that it is zero.

    ``p_value`` is None where the test says nothing: all differences are equal.
    """

    mean: float
    deviation: float
    num_seeds: int
    p_value: float | None


def paired_difference(
    method: Mapping[int, float], reference: Mapping[int, float]
) -> PairedDifference | None:
    """Compare two methods over the seeds that both have.

    With d_i = method_i - reference_i over n common seeds, t = mean(d) / (stdev(d) / sqrt(n)) and
    p = 2 P(T > |t|) for T with n - 1 degrees of freedom (two-sided paired t-test).

    Args:
        method: seed -> value.
        reference: seed -> value, in the same unit.

    Returns:
        The difference; None with fewer than two common seeds.

    Raises:
        ImportError: scipy is not installed, naming the extra that brings it.

    Example:
        >>> paired_difference({0: 3.0, 1: 5.0, 2: 9.0}, {0: 2.0, 1: 3.0, 5: 0.0})
        PairedDifference(mean=1.5, deviation=0.70..., num_seeds=2, p_value=0.20...)
    """
    differences = [method[seed] - reference[seed] for seed in sorted({*method} & {*reference})]
    num_seeds = len(differences)
    if num_seeds < 2:
        return None
    mean, deviation = fmean(differences), stdev(differences)
    # Differences that are equal but for rounding would give an arbitrary, tiny p.
    if deviation <= 1e-9 * max(1.0, abs(mean)):
        return PairedDifference(mean, 0.0, num_seeds, None)
    t = mean / (deviation / math.sqrt(num_seeds))
    p_value = 2 * float(_student_t().sf(abs(t), num_seeds - 1))
    return PairedDifference(mean, deviation, num_seeds, p_value)


def _student_t() -> Any:
    try:
        return import_module("scipy.stats").t
    except ImportError as error:
        raise ImportError(
            "the paired t-test needs scipy, which comes with scikit-learn: pip install 'dkl[train]'"
        ) from error
