"""The programs (GPU kernels) of the Triton backend; ``triton_kernels.py`` launches them.

Shapes: N rows, C classes. A program owns R rows (one, or several where classes are few) and walks
over them in tiles of B classes: ``_R`` is one number per row, ``_RB`` a tile.

With m = target, n = input, d = m - n, p = softmax(m / T), q = softmax(n / T), weights w (given, or
softmax(m / tau); then w := w^gamma), W = sum_j w_j and mu = sum_j w_j d_j / W, a row has

    mse = (W / 2) sum_j w_j (d_j - mu)^2          ce = -sum_j p_j log q_j
    d/dn (a mse + b ce) = b (q - p) / T - a W w (d - mu)     (the last term only with BA)
    d/dm (a mse + b ce) = a W w (d - mu)

(equations 5 to 7 of arXiv 2305.13948; weights and soft label detached).

One sweep over the tiles of a row computes both terms, from ten numbers, its "state":

    offset                    taken off d: zero, or max m - max n of the first tile if that is large
    input_top, target_top     max n and max m so far; where they rise, the others are rescaled
    input_sum, target_sum     sum_j exp((n_j - max n) / T) and sum_j exp((m_j - max m) / T)
    gap                       sum_j exp((m_j - max m) / T) (max n - n_j)
    base                      sum_j exp((m_j - max m) / tau), only where gamma is not one
    weight, mean, square      sum_j u_j, mu - offset and sum_j u_j (d_j - mu)^2

with w = c u: c = 1 for given weights, else u = exp(gamma (m - max m) / tau) and c = base^-gamma.
Moments of tiles merge by Chan's formula, because plain sums of d and d^2 cancel. A sweep for the
maxima alone would save the rescaling, which is a few operations per tile and costs no accuracy (a
factor exp(old max - new max) <= 1), and would read the rows once more.

A second sweep writes the gradients, from the last tile back to the first, because what was read
last is most likely to be in a cache. A row of one tile stays in registers and is read only once,
and so is every row when no gradient is needed.
"""

import triton.language as tl

from dkl.losses.triton_tiles import (
    LN2,
    LOWEST,
    elements,
    existing,
    exponentials,
    load_weights,
    merge_tile,
    offset,
    owned_rows,
    program,
    read_tile,
    store,
    write_gradients,
)


@program
def _finish(
    state: tl.tuple,
    rates: tl.tuple,
    gamma: tl.tensor,
    WEIGHTS: tl.constexpr,
    UNIT_POWER: tl.constexpr,
) -> tl.tuple:
    """Return both terms, and the numbers that make gradients, from the state of whole rows."""
    _, sums, moments = state
    input_sum_R, target_sum_R, gap_R, base_R = sums
    weight_R, _, square_R = moments
    rate_T, _, _ = rates
    c_R = tl.full(weight_R.shape, 1.0, weight_R.dtype)
    if WEIGHTS != "given":
        # With gamma one, base is the sum of u.
        c_R = 1.0 / weight_R if UNIT_POWER else tl.exp2(-gamma * tl.log2(base_R))
    mse_R = 0.5 * (c_R * weight_R) * (c_R * square_R)
    ce_R = tl.log(input_sum_R) + gap_R * (rate_T * LN2) / target_sum_R
    mse_factor_R = (c_R * weight_R) * c_R
    ce_factor_R = rate_T * LN2 / input_sum_R
    # Exactly one where the sums are equal (zero, if the row does not count): division may be off.
    ratio_R = tl.where(input_sum_R == target_sum_R, 1.0, input_sum_R / target_sum_R)
    return mse_R, ce_R, mse_factor_R, ce_factor_R, ratio_R


@program
def _factor(
    number: tl.tensor,
    number_ptr: tl.tensor,
    upstream_ptr: tl.tensor,
    rows_R: tl.tensor,
    counted_R: tl.tensor,
    factor_R: tl.tensor,
) -> tl.tensor:
    """Return a factor times a scale (a number, or what its pointer holds) and upstream, if any.

    It is zero in rows that do not count, whose sums are zero and other factors infinite.
    """
    if number_ptr is None:
        factor_R = factor_R * tl.full((), number, factor_R.dtype)
    else:
        factor_R = factor_R * tl.load(number_ptr).to(factor_R.dtype)
    if upstream_ptr is not None:
        upstream_R = tl.load(upstream_ptr + rows_R, mask=counted_R, other=0.0)
        factor_R = factor_R * upstream_R.to(factor_R.dtype)
    return tl.where(counted_R, factor_R, 0.0)


@program
def rows_program(
    input_ptr: tl.tensor,
    target_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    input_gradient_ptr: tl.tensor,
    target_gradient_ptr: tl.tensor,
    input_strides: tl.tuple,
    target_strides: tl.tuple,
    weights_strides: tl.tuple,
    input_gradient_strides: tl.tuple,
    target_gradient_strides: tl.tuple,
    labels_ptr: tl.tensor,
    counted_ptr: tl.tensor,
    upstream_ptr: tl.tensor,
    mse_scale_ptr: tl.tensor,
    ce_scale_ptr: tl.tensor,
    mse_ptr: tl.tensor,
    ce_ptr: tl.tensor,
    num_classes: tl.tensor,
    num_positions: tl.tensor,
    num_table_rows: tl.tensor,
    mse_scale: tl.float64,
    ce_scale: tl.float64,
    label_rate: tl.float64,
    weight_rate: tl.float64,
    exponent: tl.float64,
    WEIGHTS: tl.constexpr,
    UNIT_POWER: tl.constexpr,
    BREAK_ASYMMETRY: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """Write mse and ce of R rows, and the gradients of a mse + b ce that have a pointer.

    The rates are log2(e) / T and log2(e) / tau, because exponentials are made as powers of two.
    """
    rows_R, inside_R, counted_R, place, weights_place, known_R = owned_rows(
        labels_ptr, counted_ptr, num_positions, num_table_rows, ROWS
    )
    rows = inside_R, num_classes, counted_R, place, weights_place, known_R
    pointers = input_ptr, target_ptr, target_ptr if weights_ptr is None else weights_ptr
    sources = pointers, (input_strides, target_strides, weights_strides)
    rate_tau = tl.full((), weight_rate, DTYPE)
    gamma = tl.full((), exponent, DTYPE)
    rates = tl.full((), label_rate, DTYPE), rate_tau, gamma * rate_tau

    low_R = tl.full((ROWS,), LOWEST, DTYPE)
    zero_R = tl.zeros((ROWS,), DTYPE)
    tile = read_tile(0, rows, sources, gamma, WEIGHTS, UNIT_POWER, ALIGNMENT, BLOCK, DTYPE)
    tops = low_R, low_R, offset(tile)
    state = tops, (zero_R, zero_R, zero_R, zero_R), (zero_R, zero_R, zero_R)
    state = merge_tile(tile, state, rates, WEIGHTS, UNIT_POWER)
    if not ONE_TILE:
        for start in range(BLOCK, num_classes, BLOCK):
            later_tile = read_tile(
                start, rows, sources, gamma, WEIGHTS, UNIT_POWER, ALIGNMENT, BLOCK, DTYPE
            )
            state = merge_tile(later_tile, state, rates, WEIGHTS, UNIT_POWER)

    mse_R, ce_R, mse_factor_R, ce_factor_R, ratio_R = _finish(
        state, rates, gamma, WEIGHTS, UNIT_POWER
    )
    tl.store(mse_ptr + rows_R, tl.where(counted_R, mse_R, 0.0), mask=inside_R)
    tl.store(ce_ptr + rows_R, tl.where(counted_R, ce_R, 0.0), mask=inside_R)
    if (input_gradient_ptr is not None) or (target_gradient_ptr is not None):
        a_R = _factor(mse_scale, mse_scale_ptr, upstream_ptr, rows_R, counted_R, mse_factor_R)
        b_R = _factor(ce_scale, ce_scale_ptr, upstream_ptr, rows_R, counted_R, ce_factor_R)
        numbers = a_R, b_R, ratio_R
        strides = input_gradient_strides, target_gradient_strides
        last = (num_classes - 1) // BLOCK * BLOCK
        for back in range(0, BLOCK if ONE_TILE else num_classes, BLOCK):
            if not ONE_TILE:
                tile = read_tile(
                    last - back,
                    rows,
                    sources,
                    gamma,
                    WEIGHTS,
                    UNIT_POWER,
                    ALIGNMENT,
                    BLOCK,
                    DTYPE,
                )
            write_gradients(
                tile,
                rows,
                input_gradient_ptr,
                target_gradient_ptr,
                strides,
                state,
                numbers,
                rates,
                WEIGHTS,
                BREAK_ASYMMETRY,
                ALIGNMENT,
            )


@program
def weight_sums_program(
    target_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    target_strides: tl.tuple,
    weights_strides: tl.tuple,
    labels_ptr: tl.tensor,
    counted_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_classes: tl.tensor,
    num_positions: tl.tensor,
    num_table_rows: tl.tensor,
    weight_rate: tl.float64,
    exponent: tl.float64,
    UNIT_POWER: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """Write W = sum_j w_j of R rows, for which only the weights, or else the target, are read."""
    rows_R, inside_R, counted_R, place, weights_place, known_R = owned_rows(
        labels_ptr, counted_ptr, num_positions, num_table_rows, ROWS
    )
    rate_tau = tl.full((), weight_rate, DTYPE)
    gamma = tl.full((), exponent, DTYPE)
    top_R = tl.full((ROWS,), LOWEST, DTYPE)
    base_R = tl.zeros((ROWS,), DTYPE)
    weight_R = tl.zeros((ROWS,), DTYPE)
    for start in range(0, num_classes, BLOCK):
        columns_B = start + tl.arange(0, BLOCK)
        valid_RB = counted_R[:, None] & existing(columns_B, num_classes, ALIGNMENT)[None, :]
        if weights_ptr is not None:
            place_RB = elements(weights_ptr, weights_place, columns_B, weights_strides, ALIGNMENT)
            u_RB = load_weights(place_RB, valid_RB, known_R, gamma, UNIT_POWER, DTYPE)
        else:
            place_RB = elements(target_ptr, place, columns_B, target_strides, ALIGNMENT)
            target_RB = tl.load(place_RB, mask=valid_RB, other=float("-inf")).to(DTYPE)
            old_top_R = top_R
            top_R = tl.maximum(old_top_R, tl.max(target_RB, axis=1))
            drop_R = (old_top_R - top_R) * rate_tau
            base_RB = exponentials(target_RB, top_R, rate_tau)
            base_R = base_R * tl.exp2(drop_R) + tl.sum(base_RB, axis=1)
            weight_R = weight_R * tl.exp2(drop_R * gamma)
            u_RB = tl.where(valid_RB, exponentials(target_RB, top_R, rate_tau * gamma), 0.0)
        weight_R += tl.sum(u_RB, axis=1)
    if weights_ptr is None:
        weight_R = weight_R * tl.exp2(-gamma * tl.log2(base_R))
    tl.store(sums_ptr + rows_R, tl.where(counted_R, weight_R, 0.0), mask=inside_R)


@program
def scale_program(
    values_ptr: tl.tensor,
    upstream_ptr: tl.tensor,
    num_values: tl.tensor,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """Multiply all values by one number in place; where it is one nothing else is read."""
    upstream = tl.load(upstream_ptr).to(DTYPE)
    end = tl.where(upstream == 1.0, 0, num_values)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, end, tl.num_programs(0) * BLOCK):
        places_B = values_ptr + start + tl.arange(0, BLOCK)
        inside_B = start + tl.arange(0, BLOCK) < num_values
        values_B = tl.load(places_B, mask=inside_B, other=0.0).to(DTYPE) * upstream
        store(places_B, values_B, inside_B)
