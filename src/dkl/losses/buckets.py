"""Buckets of a cached teacher: its k most likely classes, and one for the rest.

Shapes: N rows (tokens), V classes (the vocabulary), K = k listed classes, B = k + 1 buckets.

With listed classes I, temperature T and teacher log-probabilities l_j = log softmax(m / T)_j, the
buckets' logits are

    teacher:  T l_j for j in I,    T log(1 - sum_I exp l_j)  for the rest
    student:  n_j for j in I,      T log(sum over the rest of exp(n_j / T))  for the rest

Their softmax at temperature T is that of m and n, summed over the buckets, and differences between
listed classes are those of the raw logits; no term notices a shift of a row. With all V classes
listed it is therefore the dense loss itself.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dkl.losses.chunks import CountedRows, chunks_of
from dkl.losses.row_kernel import RowOptions
from dkl.losses.rows import check_number

_FLOOR = 1e4
"""How far an empty bucket lies below the others, in units of T: exp(-1e4) is zero."""

_MASS_TOLERANCE = 0.01
"""How far from one probabilities may sum: log-probabilities cached in bfloat16 stay within."""

_BLOCK_ELEMENTS = {"cpu": 1 << 19}
"""Elements of a block that stay in cache; 2^26 on any other device, where launches cost more."""


class Buckets(NamedTuple):
    """What is known of a cached teacher, by bucket; the last one is the rest.

    Args:
        indices: [N, K] listed classes; padding repeats one that is listed.
        filled: [N, B] bool: whether the bucket has a class in it.
        logits: [N, B] T times the log-probabilities, finite.
        weights: [N, B] w, powered; zero where the teacher's probability is zero.
        temperature: T.
    """

    indices: Tensor
    filled: Tensor
    logits: Tensor
    weights: Tensor
    temperature: float

    def rows(self, chunk: slice) -> "Buckets":
        """Return those of a chunk of rows."""
        indices, filled, logits, weights, temperature = self
        return Buckets(indices[chunk], filled[chunk], logits[chunk], weights[chunk], temperature)


def teacher_buckets(
    log_probs_NK: Tensor,
    indices_NK: Tensor,
    tail_N: Tensor | None,
    num_classes: int,
    options: RowOptions,
) -> Buckets:
    """Return the buckets of a teacher whose probabilities at temperature T are given."""
    listed_NK = ~log_probs_NK.isneginf()
    rest_N1 = listed_NK.sum(1, keepdim=True) < num_classes
    if tail_N is None:
        tail_N1 = (1.0 - log_probs_NK.exp().sum(1, keepdim=True)).clamp(min=0.0).log()
    else:
        tail_N1 = tail_N[:, None].to(log_probs_NK.dtype)
    # Where every class is listed, what remains of one is rounding.
    tail_N1 = tail_N1.where(rest_N1, -torch.inf)
    logits_NB = options.temperature * torch.cat([log_probs_NK, tail_N1], 1)
    possible_NB = ~logits_NB.isneginf()
    log_weights_NB = torch.log_softmax(logits_NB / options.weight_temperature, 1)
    weights_NB = (options.gamma * log_weights_NB).exp().masked_fill(~possible_NB, 0.0)
    likely_N1 = indices_NK.gather(1, log_probs_NK.argmax(1, keepdim=True))
    return Buckets(
        indices_NK.where(listed_NK, likely_N1),
        torch.cat([listed_NK, rest_N1], 1),
        _fill_empty(logits_NB, possible_NB, options.temperature),
        weights_NB,
        options.temperature,
    )


def rest_logits(input_NV: Tensor, target: Buckets) -> Tensor:
    """Return n / T [N, V], -inf for listed classes; differentiable."""
    rest_NV = input_NV.to(target.logits.dtype, copy=True)
    if target.temperature != 1.0:
        rest_NV.div_(target.temperature)
    rest_NV.scatter_(1, target.indices, -torch.inf)
    if target.indices.shape[1] >= input_NV.shape[1]:  # an empty sum would have no derivative
        rest_NV.masked_fill_(~target.filled[:, -1:], 0.0)
    return rest_NV


def student_buckets(input_NV: Tensor, rest_NV: Tensor, target: Buckets) -> tuple[Tensor, Tensor]:
    """Return logits [N, B] of the student's buckets, and the rest's logsumexp [N, 1].

    It sums over the classes of the rest: one minus the listed ones would cancel near one.
    """
    total_N1 = rest_NV.logsumexp(1, keepdim=True)
    listed_NK = input_NV.gather(1, target.indices).to(rest_NV.dtype)
    logits_NB = torch.cat([listed_NK, target.temperature * total_N1], 1)
    return _fill_empty(logits_NB, target.filled, target.temperature), total_N1


def blockwise_buckets(input_NV: Tensor, target: Buckets) -> tuple[Tensor, Tensor]:
    """Return what ``student_buckets`` does, without autograd and block by block."""
    logits_NB = torch.empty_like(target.logits)
    total_N1 = torch.empty_like(target.logits[:, :1])
    for block in _blocks(input_NV):
        input_RV, part = input_NV[block], target.rows(block)
        found = student_buckets(input_RV, rest_logits(input_RV, part), part)
        logits_NB[block], total_N1[block] = found
    return logits_NB, total_N1


def blockwise_gradient(
    gradient_NB: Tensor, input_NV: Tensor, total_N1: Tensor, target: Buckets
) -> Tensor:
    """Return the gradient for the student's logits [N, V] from that of its buckets.

    Listed classes get their bucket's, those of the rest a share softmax(n / T) of the last one.
    """
    gradient_NV = torch.empty_like(input_NV)
    for block in _blocks(input_NV):
        gradient_RB, part = gradient_NB[block], target.rows(block)
        shares_RV = rest_logits(input_NV[block], part).sub_(total_N1[block]).exp_()
        shares_RV.mul_(gradient_RB[:, -1:])
        gradient_NV[block] = shares_RV.scatter_add_(1, part.indices, gradient_RB[:, :-1])
    return gradient_NV


def _blocks(input_NV: Tensor) -> Iterator[slice]:
    num_rows, num_classes = input_NV.shape
    elements = _BLOCK_ELEMENTS.get(input_NV.device.type, 1 << 26)
    return chunks_of(num_rows, max(1, elements // num_classes))


def _fill_empty(logits_NB: Tensor, filled_NB: Tensor, temperature: float) -> Tensor:
    """Return logits so far below the others where a bucket is empty that its probability is 0."""
    most_N1 = logits_NB.detach().masked_fill(~filled_NB, -torch.inf).amax(1, keepdim=True)
    return logits_NB.where(filled_NB, most_N1 - _FLOOR * temperature)


def check_teacher(
    row_shape: torch.Size,
    num_classes: int,
    log_probs: Tensor,
    indices: Tensor,
    tail: Tensor | None,
) -> None:
    """Raise ValueError for shapes and dtypes of a cached teacher that do not fit."""
    if log_probs.shape[:-1] != row_shape or log_probs.shape != indices.shape:
        raise ValueError(
            "target_log_probs and target_indices must be [..., k] with the input's rows "
            f"{list(row_shape)} before k, got {list(log_probs.shape)} and {list(indices.shape)}"
        )
    if not 1 <= log_probs.shape[-1] <= num_classes:
        raise ValueError(
            f"k must be in [1, {num_classes}], the number of classes, got {log_probs.shape[-1]}"
        )
    if not log_probs.is_floating_point() or indices.is_floating_point():
        raise ValueError(
            "target_log_probs must be floating-point and target_indices integers, got "
            f"{log_probs.dtype} and {indices.dtype}"
        )
    if tail is not None and (tail.shape != row_shape or not tail.is_floating_point()):
        raise ValueError(
            "target_tail_log_prob must be floating-point, one number per row "
            f"{list(row_shape)}, got {tail.dtype} {list(tail.shape)}"
        )
    if any(x is not None and x.requires_grad for x in (log_probs, tail)):
        raise ValueError(
            "a cached teacher gets no gradient: detach target_log_probs and target_tail_log_prob"
        )


def take_teacher(
    rows: CountedRows,
    num_classes: int,
    dtype: torch.dtype,
    log_probs: Tensor,
    indices: Tensor,
    tail: Tensor | None,
    options: RowOptions,
) -> Buckets:
    """Return the teacher's buckets for the rows that ``rows`` takes.

    Raises:
        ValueError: numbers that are no log-probabilities, classes that do not exist (elsewhere
            than on the CPU an assertion of the device, which need not be waited for).
    """
    check_number("temperature", options.temperature, positive=True)
    check_number("weight_temperature", options.weight_temperature, positive=True)
    check_number("gamma", options.gamma)
    # A row that does not count lists nothing: all its probability is in the rest.
    log_probs_NK = rows.take(log_probs, -torch.inf)
    double = torch.float64 in (dtype, log_probs.dtype)
    log_probs_NK = log_probs_NK.to(torch.float64 if double else torch.float32)
    indices_NK = rows.take(indices.long(), 0)
    tail_N = None if tail is None else rows.take(tail[..., None], 0.0).squeeze(1)

    mass_N = log_probs_NK.exp().sum(1)
    least = -torch.inf
    if tail_N is not None:
        mass_N, least = mass_N + tail_N.exp(), 1.0 - _MASS_TOLERANCE
    valid = ((mass_N <= 1.0 + _MASS_TOLERANCE) & (mass_N >= least)).all()
    _require(
        valid,
        "target_log_probs must be log-probabilities, of all classes log_softmax(logits / "
        "temperature), whose exponentials sum to one at most, or to one exactly together with "
        "target_tail_log_prob",
        mass_N,
    )
    _require(
        ((indices_NK >= 0) & (indices_NK < num_classes)).all(),
        f"target_indices must be classes in [0, {num_classes})",
        indices_NK,
    )
    return teacher_buckets(log_probs_NK, indices_NK, tail_N, num_classes, options)


def _require(condition: Tensor, message: str, values: Tensor) -> None:
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(f"{message}; got {values.min().item():.4g} to {values.max().item():.4g}")
