"""What the Triton programs do with one tile: B classes of R rows.

``_R`` is one number per row, ``_RB`` a tile. The formula, and what the state of a
row holds, are in ``triton_programs.py``. WEIGHTS is "given", "softmax", or "soft label" where
u = exp(gamma (m - max m) / tau) is what the soft label needs; UNIT_POWER says that gamma is one.
"""

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# What running maxima start from: finite, because 0 * inf would be NaN in the first merge.
LOWEST = tl.constexpr(-1e38)
LN2 = tl.constexpr(math.log(2.0))


def program(function: Callable[..., Any]) -> Any:
    """Compile a function with Triton, once for every number of rows."""
    return triton.jit(function, do_not_specialize=["num_positions", "num_table_rows"])


@program
def owned_rows(
    labels_ptr: tl.tensor,
    counted_ptr: tl.tensor,
    num_positions: tl.tensor,
    num_table_rows: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tuple:
    """Return rows, which exist, which count, their places, those of weights, which of these exist.

    Rows are neighbouring positions of one sample (a matrix has one sample and a position for each
    of its rows), and a place is a sample and positions. Those of weights by class are labels.
    """
    programs = tl.cdiv(num_positions, ROWS)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    position_R = (tl.program_id(0) % programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = position_R < num_positions
    rows_R = sample * num_positions + position_R
    counted_R = inside_R
    if counted_ptr is not None:
        counted_R = inside_R & (tl.load(counted_ptr + rows_R, mask=inside_R, other=0) != 0)
    place = sample, position_R
    weights_place = place
    known_R = counted_R
    if labels_ptr is not None:
        labels_R = tl.load(labels_ptr + rows_R, mask=counted_R, other=0)
        weights_place = sample, labels_R
        known_R = counted_R & (labels_R >= 0) & (labels_R < num_table_rows)
    return rows_R, inside_R, counted_R, place, weights_place, known_R


@program
def elements(
    pointer: tl.tensor,
    place: tl.tuple,
    columns_B: tl.tensor,
    strides: tl.tuple,
    ALIGNMENT: tl.constexpr,
) -> tl.tensor:
    """Return pointers to classes of rows.

    ALIGNMENT is zero unless the classes of a row are next to each other. Then it is a power of two
    that divides the other strides and the number of classes, which Triton only sees for 16, so that
    several classes are read at once.
    """
    sample, position_R = place
    sample_stride, class_stride, position_stride = strides
    if ALIGNMENT == 0:
        columns_B = columns_B.to(tl.int64) * class_stride
    else:
        sample_stride = sample_stride // ALIGNMENT * ALIGNMENT
        position_stride = position_stride // ALIGNMENT * ALIGNMENT
    first_R = pointer + sample * sample_stride + position_R * position_stride
    return first_R[:, None] + columns_B[None, :]


@program
def existing(columns_B: tl.tensor, num_classes: tl.tensor, ALIGNMENT: tl.constexpr) -> tl.tensor:
    """Return which columns are classes; ALIGNMENT as in ``elements``."""
    if ALIGNMENT > 0:
        num_classes = num_classes // ALIGNMENT * ALIGNMENT
    return columns_B < num_classes


@program
def load_weights(
    place_RB: tl.tensor,
    valid_RB: tl.tensor,
    known_R: tl.tensor,
    gamma: tl.tensor,
    UNIT_POWER: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Return given weights to the power gamma (0^gamma is 0, 0^0 is 1), zero where not valid.

    A label outside the table gives NaN: an exception would have to wait for the device.
    """
    mask_RB = valid_RB & known_R[:, None]
    weights_RB = tl.load(place_RB, mask=mask_RB, other=float("nan")).to(DTYPE)
    if not UNIT_POWER:
        power_of_zero = tl.where(gamma == 0.0, 1.0, 0.0)
        power_RB = tl.exp2(gamma * tl.log2(weights_RB))
        weights_RB = tl.where(weights_RB == 0.0, power_of_zero, power_RB)
    return tl.where(valid_RB, weights_RB, 0.0)


@program
def read_tile(
    start: tl.tensor,
    rows: tl.tuple,
    sources: tl.tuple,
    gamma: tl.tensor,
    WEIGHTS: tl.constexpr,
    UNIT_POWER: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tuple:
    """Return columns, which elements are valid, input, target and given weights (or the target).

    What is not valid is not read: rows that do not count bring in neither NaN nor memory traffic.
    There logits are -inf, so that they add nothing to maxima and sums of exponentials.
    """
    _, num_classes, counted_R, place, weights_place, known_R = rows
    pointers, strides = sources
    input_ptr, target_ptr, weights_ptr = pointers
    input_strides, target_strides, weights_strides = strides
    columns_B = start + tl.arange(0, BLOCK)
    valid_RB = counted_R[:, None] & existing(columns_B, num_classes, ALIGNMENT)[None, :]
    input_place_RB = elements(input_ptr, place, columns_B, input_strides, ALIGNMENT)
    target_place_RB = elements(target_ptr, place, columns_B, target_strides, ALIGNMENT)
    input_RB = tl.load(input_place_RB, mask=valid_RB, other=float("-inf")).to(DTYPE)
    target_RB = tl.load(target_place_RB, mask=valid_RB, other=float("-inf")).to(DTYPE)
    weights_RB = target_RB
    if WEIGHTS == "given":
        weights_place_RB = elements(
            weights_ptr, weights_place, columns_B, weights_strides, ALIGNMENT
        )
        weights_RB = load_weights(weights_place_RB, valid_RB, known_R, gamma, UNIT_POWER, DTYPE)
    return columns_B, valid_RB, input_RB, target_RB, weights_RB


@program
def exponentials(values_RB: tl.tensor, top_R: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """Return exp((x - max x) factor) as 2^((x - max x) rate), rate = factor log2(e)."""
    return tl.exp2((values_RB - top_R[:, None]) * rate)


@program
def offset(tile: tl.tuple) -> tl.tensor:
    """Return what is taken off d: the offset of target from input, or zero where it is small.

    An offset of 300 would round d to 3e-5, in the 24 bits of float32, and (m - offset) - n does
    not. Without an offset to speak of, it is m - n that is exact where m and n are close.
    """
    _, _, input_RB, target_RB, _ = tile
    offset_R = tl.max(target_RB, axis=1) - tl.max(input_RB, axis=1)
    return tl.where(tl.abs(offset_R) > 16.0, offset_R, 0.0)


@program
def _differences(tile: tl.tuple, offset_R: tl.tensor) -> tl.tensor:
    _, valid_RB, input_RB, target_RB, _ = tile
    return tl.where(valid_RB, target_RB - offset_R[:, None] - input_RB, 0.0)


@program
def _relative_weights(
    tile: tl.tuple,
    target_e_RB: tl.tensor,
    target_top_R: tl.tensor,
    rate: tl.tensor,
    WEIGHTS: tl.constexpr,
) -> tl.tensor:
    """Return u: given weights, or exp(gamma (m - max m) / tau)."""
    _, valid_RB, _, target_RB, weights_RB = tile
    if WEIGHTS == "given":
        u_RB = weights_RB
    elif WEIGHTS == "soft label":
        u_RB = target_e_RB
    else:
        # With gamma zero, -inf would become NaN.
        u_RB = tl.where(valid_RB, exponentials(target_RB, target_top_R, rate), 0.0)
    return u_RB


@program
def store(place_RB: tl.tensor, values_RB: tl.tensor, mask_RB: tl.tensor) -> None:
    """Store values in the dtype of the place."""
    if place_RB.dtype.element_ty != tl.float64:
        values_RB = values_RB.to(tl.float32)  # not every target rounds float64 to bfloat16
    tl.store(place_RB, values_RB, mask=mask_RB)


@program
def _merge_moments(u_RB: tl.tensor, difference_RB: tl.tensor, moments: tl.tuple) -> tl.tuple:
    """Take a tile into sum_j u_j, mu and sum_j u_j (d_j - mu)^2 of the tiles before it."""
    weight_R, mean_R, square_R = moments
    tile_weight_R = tl.sum(u_RB, axis=1)
    divisor_R = tl.where(tile_weight_R == 0.0, 1.0, tile_weight_R)
    tile_mean_R = tl.sum(u_RB * difference_RB, axis=1) / divisor_R
    centred_RB = difference_RB - tile_mean_R[:, None]
    # The mean of what is left is what rounding cost; with it the mean is right to its last digit.
    slip_R = tl.sum(u_RB * centred_RB, axis=1) / divisor_R
    tile_square_R = tl.sum(u_RB * centred_RB * centred_RB, axis=1)
    tile_square_R = tile_square_R - tile_weight_R * slip_R * slip_R
    tile_mean_R = tile_mean_R + slip_R
    total_R = weight_R + tile_weight_R
    divisor_R = tl.where(total_R == 0.0, 1.0, total_R)
    share_R = weight_R / divisor_R
    tile_share_R = tile_weight_R / divisor_R
    step_R = tile_mean_R - mean_R
    square_R = square_R + tile_square_R + step_R * step_R * weight_R * tile_share_R
    # From the heavier side, so that a side without weight does not even round the other one.
    later_R = share_R < tile_share_R
    mean_R = tl.where(later_R, tile_mean_R - step_R * share_R, mean_R + step_R * tile_share_R)
    return total_R, mean_R, square_R


@program
def merge_tile(
    tile: tl.tuple,
    state: tl.tuple,
    rates: tl.tuple,
    WEIGHTS: tl.constexpr,
    UNIT_POWER: tl.constexpr,
) -> tl.tuple:
    """Take a tile into the state of each row; rates are 1 / T, 1 / tau, gamma / tau for 2^x."""
    _, valid_RB, input_RB, target_RB, _ = tile
    tops, sums, moments = state
    old_input_top_R, old_target_top_R, offset_R = tops
    input_sum_R, target_sum_R, gap_R, base_R = sums
    rate_T, rate_tau, rate_power = rates
    input_top_R = tl.maximum(old_input_top_R, tl.max(input_RB, axis=1))
    target_top_R = tl.maximum(old_target_top_R, tl.max(target_RB, axis=1))
    input_drop_R = old_input_top_R - input_top_R
    target_drop_R = old_target_top_R - target_top_R

    input_e_RB = exponentials(input_RB, input_top_R, rate_T)
    target_e_RB = exponentials(target_RB, target_top_R, rate_T)
    target_keep_R = tl.exp2(target_drop_R * rate_T)
    # The cross-entropy is a sum over gaps to the maximum: terms >= 0, so that nothing cancels.
    gap_RB = tl.where(valid_RB, target_e_RB * (input_top_R[:, None] - input_RB), 0.0)
    gap_R = (gap_R - target_sum_R * input_drop_R) * target_keep_R + tl.sum(gap_RB, axis=1)
    target_sum_R = target_sum_R * target_keep_R + tl.sum(target_e_RB, axis=1)
    input_keep_R = tl.exp2(input_drop_R * rate_T)
    input_sum_R = input_sum_R * input_keep_R + tl.sum(input_e_RB, axis=1)

    if WEIGHTS != "given":
        weight_R, mean_R, square_R = moments
        keep_R = tl.exp2(target_drop_R * rate_power)
        moments = weight_R * keep_R, mean_R, square_R * keep_R
        if not UNIT_POWER:
            base_e_RB = exponentials(target_RB, target_top_R, rate_tau)
            base_R = base_R * tl.exp2(target_drop_R * rate_tau) + tl.sum(base_e_RB, axis=1)
    u_RB = _relative_weights(tile, target_e_RB, target_top_R, rate_power, WEIGHTS)
    moments = _merge_moments(u_RB, _differences(tile, offset_R), moments)
    tops = input_top_R, target_top_R, offset_R
    sums = input_sum_R, target_sum_R, gap_R, base_R
    return tops, sums, moments


@program
def write_gradients(
    tile: tl.tuple,
    rows: tl.tuple,
    input_gradient_ptr: tl.tensor,
    target_gradient_ptr: tl.tensor,
    gradient_strides: tl.tuple,
    state: tl.tuple,
    numbers: tl.tuple,
    rates: tl.tuple,
    WEIGHTS: tl.constexpr,
    BREAK_ASYMMETRY: tl.constexpr,
    ALIGNMENT: tl.constexpr,
) -> None:
    """Write the gradients of a tile from the numbers of its rows, in the dtypes of the pointers."""
    columns_B, _, input_RB, target_RB, _ = tile
    inside_R, num_classes, _, place, _, _ = rows
    input_strides, target_strides = gradient_strides
    tops, _, moments = state
    input_top_R, target_top_R, offset_R = tops
    _, mean_R, _ = moments
    a_R, b_R, ratio_R = numbers
    rate_T, _, rate_power = rates
    stored_RB = inside_R[:, None] & existing(columns_B, num_classes, ALIGNMENT)[None, :]
    target_e_RB = exponentials(target_RB, target_top_R, rate_T)
    u_RB = _relative_weights(tile, target_e_RB, target_top_R, rate_power, WEIGHTS)
    mse_gradient_RB = a_R[:, None] * u_RB * (_differences(tile, offset_R) - mean_R[:, None])
    if target_gradient_ptr is not None:
        target_place_RB = elements(target_gradient_ptr, place, columns_B, target_strides, ALIGNMENT)
        store(target_place_RB, mse_gradient_RB, stored_RB)
    if input_gradient_ptr is not None:
        input_e_RB = exponentials(input_RB, input_top_R, rate_T)
        # q - p, times input_sum: with ratio = input_sum / target_sum it is zero where input equals
        # target, even when the compiler fuses the product and the difference.
        gradient_RB = b_R[:, None] * (input_e_RB - ratio_R[:, None] * target_e_RB)
        if BREAK_ASYMMETRY:
            gradient_RB = gradient_RB - mse_gradient_RB
        input_place_RB = elements(input_gradient_ptr, place, columns_B, input_strides, ALIGNMENT)
        store(input_place_RB, gradient_RB, stored_RB)
