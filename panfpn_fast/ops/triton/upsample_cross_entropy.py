"""Cross-entropy of upsampled logits, interpolated one class after the other in registers.

The outputs between the same four inputs form a cell; cells at the border are cut off. Unlike in `_upsampling`, cell
(i, j) is between the rows i - 1 and i and the columns j - 1 and j of the input. Logits are in units of log 2 inside of
the kernel because the GPU's exponential instruction has base 2.

A thread has one column of the output and a few rows that form whole cells. First it finds the largest logit of all
classes in the inputs that it reads. Interpolated logits are weighted means and therefore not larger. Exponentials
relative to this bound cannot overflow, and no pixel needs its own maximum. The difference to the bound costs nothing,
because it is part of the interpolation along x. The thread interpolates each row of the input along x once.

The bound may be far above all logits of a pixel, if neighboring inputs have very different logits. Then the sum is
inaccurate or zero, and the program computes its pixels again with the maximum of each pixel. The same happens with
infinities and NaN.

The logits of the targets are read and interpolated separately, because a comparison of each class with the target would
take two instructions per class and output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton._counters import counters, is_last
from panfpn_fast.ops.triton._launch import cdiv, launch
from panfpn_fast.ops.triton._planar import planar
from panfpn_fast.ops.triton._upsampling import weights

LOG2_E = tl.constexpr(1.4426950408889634)
_LOG_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Least sum of exponentials relative to the bound. All logits that contribute are then less than 32 below the bound, and
# their rounding errors are those of logits with a size of 32 * log 2 = 22.
_LEAST_SUM = tl.constexpr(2.0**-32)

_COLUMNS = 64  # output columns of a program
_MOST_ROWS = 8  # output rows of a program
_PARTIALS = 512  # sums of programs that the last program loads at once


@triton.jit
def second_weight(phase, SCALE: tl.constexpr):
    """Weight of the second of the two inputs of a cell in its output at a phase."""
    _first, second = weights(phase, SCALE)
    return second


@triton.jit
def class_of(target, inside, ignore_index, channels):
    """Loads targets.

    Returns the class of each pixel in int32 (-1 if it has none), whether the pixel counts, and whether its target is
    invalid.
    """
    value = tl.load(target, inside, other=0).to(tl.int64)
    counts = inside & (value != ignore_index)
    is_class = (value >= 0) & (value < channels)
    return tl.where(counts & is_class, value, -1).to(tl.int32), counts, counts & (is_class == 0)


@triton.jit
def _class_weight(weight, label, counts, wrong, WEIGHTED: tl.constexpr):
    """Weight of a pixel: the weight of its class, 0 if it does not count, NaN if its target is invalid."""
    value = tl.where(counts, 1.0, 0.0)
    if WEIGHTED:
        value = tl.load(weight + label, label >= 0, other=0.0)
    return tl.where(wrong, float("nan"), value)


@triton.jit
def sum_of_class_weights(weight, channels, WEIGHTED: tl.constexpr):
    """Sum of the weights of all classes, which are 1 without WEIGHTED."""
    total = tl.cast(channels, tl.float32)
    if WEIGHTED:
        total = 0.0
        for c in range(channels):
            total += tl.load(weight + c)
    return total


@triton.jit
def _at_row(upper, lower, lower_weight):
    """Interpolates between two rows of the input."""
    return tl.fma(lower_weight, lower, (1.0 - lower_weight) * upper)


@triton.jit
def _add_to_spread(spread, value, weight, c, WEIGHTED: tl.constexpr):
    """Adds the logit of a class, times the weight of the class, to the sum of these products."""
    return tl.fma(value, tl.load(weight + c) if WEIGHTED else 1.0, spread)


@triton.jit
def _upper_bound(
    rows,
    column,
    plane_size,
    channels,
    input_width,
    INPUT_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Returns the largest logit that each thread reads, and whether all logits of the program are finite.

    Each thread finds the largest logit of one or a few inputs, and gets those of its own inputs from the others.
    """
    WIDTH: tl.constexpr = (COLUMNS + SCALE - 2) // SCALE + 2  # inputs of a row that a program reads, at most
    PIXELS: tl.constexpr = triton.next_power_of_2(INPUT_ROWS * WIDTH)
    first = tl.min(column, axis=0)
    pixel = tl.arange(0, PIXELS)
    position = tl.minimum(first + pixel % WIDTH, input_width - 1)
    pointer = rows[0] + position
    for i in tl.static_range(1, INPUT_ROWS):
        pointer = tl.where(pixel // WIDTH == i, rows[i] + position, pointer)
    highest = tl.full((PIXELS,), float("-inf"), tl.float32)
    zero = tl.zeros((PIXELS,), tl.float32)
    for _ in tl.range(0, channels, loop_unroll_factor=4):
        value = tl.load(pointer).to(tl.float32)
        highest = tl.maximum(highest, value)
        zero = tl.fma(value, 0.0, zero)
        pointer += plane_size
    own = (column - first).to(tl.int32)
    bound = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for i in tl.static_range(INPUT_ROWS):
        for k in tl.static_range(2):
            bound = tl.maximum(bound, tl.gather(highest, own + (i * WIDTH + k), axis=0))
    return bound, tl.max((zero != 0.0).to(tl.int32), axis=0) == 0


@triton.jit
def _sums_below(
    bound,
    rows,
    position,
    plane_size,
    channels,
    weight,
    has_right,
    left_weight,
    right_weight,
    lower_weights,
    ROWS: tl.constexpr,
    INPUT_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """Returns, for each row of the output, the sums of all exponentials and of all logits, relative to the bound."""
    total, spread = (), ()
    for _ in tl.static_range(ROWS):
        total += (tl.zeros(position.shape, tl.float32),)
        spread += (tl.zeros(position.shape, tl.float32),)
    for c in tl.range(0, channels, loop_unroll_factor=4):
        mixed = ()
        for i in tl.static_range(INPUT_ROWS):
            left = tl.load(rows[i] + position).to(tl.float32)
            right = tl.load(rows[i] + position + 1, has_right, other=0.0).to(tl.float32)
            mixed += (tl.fma(right_weight, right, tl.fma(left_weight, left, -bound)),)
        position += plane_size
        next_total, next_spread = (), ()
        for r in tl.static_range(ROWS):
            change = mixed[r // SCALE + 1] - mixed[r // SCALE]
            value = tl.fma(lower_weights[r], change, mixed[r // SCALE])
            next_total += (total[r] + tl.exp2(value),)
            if SMOOTHED:
                next_spread += (_add_to_spread(spread[r], value, weight, c, WEIGHTED),)
        total = next_total
        if SMOOTHED:
            spread = next_spread
    return total, spread


@triton.jit
def _sums_of_any(
    rows,
    position,
    plane_size,
    channels,
    weight,
    all_weights,
    has_right,
    left_weight,
    right_weight,
    lower_weights,
    ROWS: tl.constexpr,
    INPUT_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """Returns, for each row of the output, the largest logit and the sums of exponentials and logits relative to it.

    Any logits are allowed, also infinities and NaN.
    """
    top, total, spread = (), (), ()
    for _ in tl.static_range(ROWS):
        top += (tl.full(position.shape, _LOWEST, tl.float32),)
        total += (tl.zeros(position.shape, tl.float32),)
        spread += (tl.zeros(position.shape, tl.float32),)
    for c in range(channels):
        mixed = ()
        for i in tl.static_range(INPUT_ROWS):
            left = tl.load(rows[i] + position).to(tl.float32)
            right = tl.load(rows[i] + position + 1, has_right, other=0.0).to(tl.float32)
            mixed += (tl.fma(right_weight, right, left_weight * left),)
        position += plane_size
        next_top, next_total, next_spread = (), (), ()
        for r in tl.static_range(ROWS):
            value = _at_row(mixed[r // SCALE], mixed[r // SCALE + 1], lower_weights[r])
            highest = tl.maximum(top[r], value)
            next_total += (total[r] * tl.exp2(top[r] - highest) + tl.exp2(value - highest),)
            next_top += (highest,)
            if SMOOTHED:
                next_spread += (_add_to_spread(spread[r], value, weight, c, WEIGHTED),)
        top, total = next_top, next_total
        if SMOOTHED:
            spread = next_spread
    if SMOOTHED:
        relative = ()
        for r in tl.static_range(ROWS):
            relative += (spread[r] - all_weights * top[r],)
        spread = relative
    return top, total, spread


@triton.jit
def _add_partials(
    partials, loss, total_weight, MEAN: tl.constexpr, REDUCED: tl.constexpr, PARTIALS: tl.constexpr
):
    """Adds the sums of all programs, and divides by the sum of weights for a mean."""
    losses = tl.zeros((PARTIALS,), tl.float32)
    weights = tl.zeros((PARTIALS,), tl.float32)
    count = tl.num_programs(0)
    for start in range(0, count, PARTIALS):
        index = start + tl.arange(0, PARTIALS)
        losses += tl.load(partials + index * 2, index < count, other=0.0)
        weights += tl.load(partials + index * 2 + 1, index < count, other=0.0)
    all_losses, all_weights = tl.sum(losses, axis=0), tl.sum(weights, axis=0)
    if REDUCED:
        tl.store(loss, tl.div_rn(all_losses, all_weights) if MEAN else all_losses)
    tl.store(total_weight, all_weights)


@triton.jit(do_not_specialize=["input_height", "input_width"])
def _loss_kernel(
    logits,
    target,
    weight,
    losses,
    log_sum_exp,
    total_weight,
    partials,
    counter,
    channels,
    input_height,
    input_width,
    ignore_index,
    label_smoothing,
    SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUT_ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    MEAN: tl.constexpr,
    REDUCED: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Computes the losses of whole cells with ROWS rows in total, or of one of PARTS parts of a cell with many rows.

    Each program also sums its losses and weights. The last program adds these sums in a fixed order.
    """
    height, width = input_height * SCALE, input_width * SCALE
    column_blocks = tl.cdiv(width, COLUMNS)
    row_blocks = tl.cdiv(input_height + 1, INPUT_ROWS - 1) * PARTS
    program = tl.program_id(0)
    image = (program // (column_blocks * row_blocks)).to(tl.int64)
    row_block = program // column_blocks % row_blocks
    x = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)

    # Infinities and NaN have the effect that they have in F.interpolate. For outputs before the first pixel, it reads
    # the first two rows and columns, the second with a weight of zero. For outputs after the last pixel, it reads only
    # the last row and column.
    left = (x + SCALE - SCALE // 2) // SCALE - 1
    column = tl.minimum(tl.maximum(left, 0), input_width - 1)
    has_right = column + 1 < input_width
    right_weight = second_weight((x + SCALE - SCALE // 2) % SCALE, SCALE).to(tl.float32)
    right_weight = tl.where((left >= 0) & has_right, right_weight, 0.0)
    left_weight = (1.0 - right_weight) * LOG2_E
    right_weight *= LOG2_E

    position = tl.cast(column, tl.int64 if WIDE else tl.int32)
    plane_size = tl.cast(input_height, position.dtype) * input_width
    cell = row_block // PARTS * (INPUT_ROWS - 1)
    rows = ()
    for i in tl.static_range(INPUT_ROWS):
        row = tl.minimum(tl.where(cell + i == 0, 1, cell - 1 + i), input_height - 1).to(tl.int64)
        rows += (logits + image * channels * plane_size + row * input_width,)

    # With finite logits, the cells above the first row may read it twice, so that weights are compile-time constants.
    finite_rows = ()
    for i in tl.static_range(INPUT_ROWS):
        row = tl.minimum(tl.maximum(cell - 1 + i, 0), input_height - 1).to(tl.int64)
        finite_rows += (logits + image * channels * plane_size + row * input_width,)

    starts, inside_rows, lower_weights, finite_weights = (), (), (), ()
    for r in tl.static_range(ROWS):
        phase = r % SCALE + row_block % PARTS * ROWS
        y = (cell + r // SCALE - 1) * SCALE + SCALE // 2 + phase
        inside_row = (phase < SCALE) & (y >= 0) & (y < height)
        start = (image * height + y) * width
        starts += (start,)
        inside_rows += (inside_row,)
        lower_weight = tl.cast(second_weight(phase, SCALE), tl.float32)
        lower_weights += (tl.where(cell + r // SCALE == 0, 1.0, lower_weight),)
        finite_weights += (lower_weight,)

    bound, finite = _upper_bound(rows, column, plane_size, channels, input_width, INPUT_ROWS, SCALE, COLUMNS)
    bound *= LOG2_E
    total, spread = _sums_below(
        bound, finite_rows, position, plane_size, channels, weight, has_right, left_weight, right_weight,
        finite_weights, ROWS, INPUT_ROWS, SCALE, WEIGHTED, SMOOTHED,
    )  # fmt: skip
    spread_weight = label_smoothing / tl.cast(channels, tl.float32)
    all_weights = 0.0
    if SMOOTHED:
        all_weights = sum_of_class_weights(weight, channels, WEIGHTED)
    shifts = ()
    accurate = tl.full((COLUMNS,), 1, tl.int32)
    for r in tl.static_range(ROWS):
        accurate = tl.where(total[r] >= _LEAST_SUM, accurate, 0)
        shifts += (bound,)
    if (finite == 0) | (tl.min(accurate, axis=0) == 0):
        shifts, total, spread = _sums_of_any(
            rows, position, plane_size, channels, weight, all_weights, has_right, left_weight, right_weight,
            lower_weights, ROWS, INPUT_ROWS, SCALE, WEIGHTED, SMOOTHED,
        )  # fmt: skip

    sum_of_losses = tl.zeros((COLUMNS,), tl.float32)
    sum_of_weights = tl.zeros((COLUMNS,), tl.float32)
    for r in tl.static_range(ROWS):
        inside = inside_rows[r] & (x < width)
        label, counts, wrong = class_of(target + starts[r] + x, inside, ignore_index, channels)
        factor = _class_weight(weight, label, counts, wrong, WEIGHTED)
        chosen = ()
        for i in tl.static_range(2):
            source = rows[r // SCALE + i] + (position + label.to(position.dtype) * plane_size)
            left = tl.load(source, label >= 0, other=0.0).to(tl.float32)
            right = tl.load(source + 1, has_right & (label >= 0), other=0.0).to(tl.float32)
            chosen += (tl.fma(right_weight, right, tl.fma(left_weight, left, -shifts[r])),)
        in_bits = tl.log2(total[r])
        # Rounding errors must not make it negative.
        loss = in_bits - _at_row(chosen[0], chosen[1], lower_weights[r])
        loss = factor * tl.maximum(loss, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if SMOOTHED:
            of_spread = spread_weight * (all_weights * in_bits - spread[r])
            loss = tl.fma(loss, 1.0 - label_smoothing, of_spread)
        loss = tl.where(wrong, float("nan"), tl.where(counts, loss * _LOG_2, 0.0))
        # The NaN marks an invalid target for backward.
        tl.store(
            log_sum_exp + starts[r] + x, tl.where(wrong, float("nan"), (shifts[r] + in_bits) * _LOG_2), inside
        )
        if REDUCED:
            sum_of_losses += loss
        else:
            tl.store(losses + starts[r] + x, loss, inside)
        sum_of_weights += factor
    tl.store(partials + program * 2, tl.sum(sum_of_losses, axis=0))
    tl.store(partials + program * 2 + 1, tl.sum(sum_of_weights, axis=0))
    if is_last(counter, tl.num_programs(0)):
        _add_partials(partials, losses, total_weight, MEAN, REDUCED, PARTIALS)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale_factor: int,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements the op of csrc/library.cpp; the loss of a target that is not a class is NaN."""
    images, channels, height, width = logits.shape
    log_sum_exp = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    total_weight = torch.empty((), dtype=torch.float32, device=logits.device)
    if target.numel() == 0:
        total_weight = torch.zeros_like(total_weight)
        loss = log_sum_exp if reduction == "none" else total_weight
        return torch.full_like(loss, float("nan") if reduction == "mean" else 0.0), log_sum_exp, total_weight
    loss = torch.empty_like(log_sum_exp if reduction == "none" else total_weight)
    parts = cdiv(scale_factor, _MOST_ROWS)
    cells = max(_MOST_ROWS // scale_factor, 1)
    rows = cells * cdiv(scale_factor, parts)
    programs = images * cdiv(height + 1, cells) * parts * cdiv(width * scale_factor, _COLUMNS)
    partials = torch.empty((programs, 2), dtype=torch.float32, device=logits.device)
    launch(
        _loss_kernel,
        (programs,),
        planar(logits),
        target.contiguous(),
        None if weight is None else weight.contiguous(),
        loss,
        log_sum_exp,
        total_weight,
        partials,
        counters(logits, 1),
        channels,
        height,
        width,
        ignore_index,
        label_smoothing,
        SCALE=scale_factor,
        PARTS=parts,
        ROWS=rows,
        INPUT_ROWS=cells + 1,
        WEIGHTED=weight is not None,
        SMOOTHED=label_smoothing > 0,
        MEAN=reduction == "mean",
        REDUCED=reduction != "none",
        WIDE=channels * height * width >= 2**31,
        COLUMNS=_COLUMNS,
        PARTIALS=_PARTIALS,
        num_warps=2,
    )
    return loss, log_sum_exp, total_weight
