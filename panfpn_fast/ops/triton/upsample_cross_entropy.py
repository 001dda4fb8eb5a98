"""Cross-entropy of upsampled logits, interpolated one class after the other in registers, and its gradient.

The outputs between the same four inputs form a cell; cells at the border are cut off. Unlike in `_upsampling`, cell
(i, j) is between the rows i - 1 and i and the columns j - 1 and j of the input. Logits are in units of log 2 inside of
the kernels because the GPU's exponential instruction has base 2.

Forward: a thread has one column of the output and a few rows that form whole cells. It interpolates each row of the
input that it needs along x once. The logits of the targets are read and interpolated separately, because a comparison
of each class with the target would take two instructions per class and output.

Backward interpolates again. A thread has a cell and sums the gradients that the cell's outputs contribute to its four
corners. It gets the sums of its neighbor's corners from the next thread. Each row of the input receives contributions
from the cells above and from the cells below; these go to two separate maps, which a second kernel adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast._layout import channels_last_only
from panfpn_fast.ops.triton._counters import counters, is_last
from panfpn_fast.ops.triton._launch import cdiv, launch
from panfpn_fast.ops.triton._planar import planar, sum_to_channels_last
from panfpn_fast.ops.triton._upsampling import weights

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)

_COLUMNS = 64  # output columns of a program of the forward kernel
_MOST_ROWS = 8  # output rows of such a program
_CLASSES = 4  # classes per step of the running maximum
_CELLS = 32  # cells of a program of the backward kernel, which is one warp
_MOST_CLASSES = 32  # classes of a program of the backward kernel; fewer keep more of the GPU busy
_BLOCK = 4  # outputs of a cell that a thread has in registers at a time, along each axis
_PARTIALS = 512  # sums of programs that the last program of the forward kernel loads at once


@triton.jit
def _second_weight(phase, SCALE: tl.constexpr):
    """Weight of the second of the two inputs of a cell in its output at a phase."""
    _first, second = weights(phase, SCALE)
    return second


@triton.jit
def _class_of(target, inside, ignore_index, channels):
    """Loads targets: class in float32, -1 if there is none; whether the pixel counts; whether the target is invalid."""
    value = tl.load(target, inside, other=0).to(tl.int64)
    counts = inside & (value != ignore_index)
    is_class = (value >= 0) & (value < channels)
    return tl.where(counts & is_class, value, -1).to(tl.float32), counts, counts & (is_class == 0)


@triton.jit
def _class_weight(weight, label, counts, wrong, WEIGHTED: tl.constexpr):
    """Weight of a pixel: the weight of its class, 0 if it does not count, NaN if its target is invalid."""
    value = tl.where(counts, 1.0, 0.0)
    if WEIGHTED:
        value = tl.load(weight + label.to(tl.int32), label >= 0, other=0.0)
    return tl.where(wrong, float("nan"), value)


@triton.jit
def _sum_of_class_weights(weight, channels, WEIGHTED: tl.constexpr):
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
def _add_classes(
    state,
    rows,
    position,
    plane_size,
    first,
    stop,
    weight,
    has_right,
    left_weight,
    right_weight,
    lower_weights,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    INPUT_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """Adds the classes [first, stop), whose number is a multiple of CLASSES, to the state of each row.

    The state is the largest logit so far, and the sum of exponentials relative to it. With SMOOTHED a third member is
    the sum of all logits times the weights of their classes.
    """
    for c in range(first, stop, CLASSES):
        top, total, spread = state
        values = ()
        for k in tl.static_range(CLASSES):
            mixed = ()
            for i in tl.static_range(INPUT_ROWS):
                left = tl.load(rows[i] + position).to(tl.float32)
                right = tl.load(rows[i] + position + 1, has_right, other=0.0).to(tl.float32)
                mixed += (tl.fma(right_weight, right, left_weight * left),)
            position += plane_size
            next_spread = ()
            for r in tl.static_range(ROWS):
                value = _at_row(mixed[r // SCALE], mixed[r // SCALE + 1], lower_weights[r])
                values += (value,)
                if SMOOTHED:
                    class_weight = tl.load(weight + c + k) if WEIGHTED else 1.0
                    next_spread += (tl.fma(value, class_weight, spread[r]),)
            spread = next_spread
        next_top, next_total = (), ()
        for r in tl.static_range(ROWS):
            highest = top[r]
            for k in tl.static_range(CLASSES):
                highest = tl.maximum(highest, values[k * ROWS + r])
            sum_of_powers = total[r] * tl.exp2(top[r] - highest)
            for k in tl.static_range(CLASSES):
                sum_of_powers += tl.exp2(values[k * ROWS + r] - highest)
            next_top += (highest,)
            next_total += (sum_of_powers,)
        state = (next_top, next_total, spread)
    return state, position


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
    CLASSES: tl.constexpr,
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
    right_weight = _second_weight((x + SCALE - SCALE // 2) % SCALE, SCALE).to(tl.float32)
    right_weight = tl.where((left >= 0) & has_right, right_weight, 0.0)
    left_weight = (1.0 - right_weight) * _LOG2_E
    right_weight *= _LOG2_E

    position = tl.cast(column, tl.int64 if WIDE else tl.int32)
    plane_size = tl.cast(input_height, position.dtype) * input_width
    cell = row_block // PARTS * (INPUT_ROWS - 1)
    rows = ()
    for i in tl.static_range(INPUT_ROWS):
        row = tl.minimum(tl.where(cell + i == 0, 1, cell - 1 + i), input_height - 1).to(tl.int64)
        rows += (logits + image * channels * plane_size + row * input_width,)

    starts, inside_rows, lower_weights = (), (), ()
    top, total, zeros = (), (), ()
    for r in tl.static_range(ROWS):
        phase = r % SCALE + row_block % PARTS * ROWS
        y = (cell + r // SCALE - 1) * SCALE + SCALE // 2 + phase
        inside_row = (phase < SCALE) & (y >= 0) & (y < height)
        start = (image * height + y) * width
        starts += (start,)
        inside_rows += (inside_row,)
        lower_weight = tl.cast(_second_weight(phase, SCALE), tl.float32)
        lower_weights += (tl.where(cell + r // SCALE == 0, 1.0, lower_weight),)
        top += (tl.full((COLUMNS,), _LOWEST, tl.float32),)
        total += (tl.zeros((COLUMNS,), tl.float32),)
        zeros += (tl.zeros((COLUMNS,), tl.float32),)

    state = (top, total, zeros if SMOOTHED else ())
    in_groups = channels // CLASSES * CLASSES
    state, after = _add_classes(
        state, rows, position, plane_size, 0, in_groups, weight, has_right, left_weight, right_weight, lower_weights,
        CLASSES, ROWS, INPUT_ROWS, SCALE, WEIGHTED, SMOOTHED,
    )  # fmt: skip
    state, after = _add_classes(
        state, rows, after, plane_size, in_groups, channels, weight, has_right, left_weight, right_weight,
        lower_weights, 1, ROWS, INPUT_ROWS, SCALE, WEIGHTED, SMOOTHED,
    )  # fmt: skip

    top, total, spread = state
    spread_weight = label_smoothing / tl.cast(channels, tl.float32)
    if SMOOTHED:
        all_weights = _sum_of_class_weights(weight, channels, WEIGHTED)
    sum_of_losses = tl.zeros((COLUMNS,), tl.float32)
    sum_of_weights = tl.zeros((COLUMNS,), tl.float32)
    for r in tl.static_range(ROWS):
        inside = inside_rows[r] & (x < width)
        label, counts, wrong = _class_of(target + starts[r] + x, inside, ignore_index, channels)
        factor = _class_weight(weight, label, counts, wrong, WEIGHTED)
        in_bits = top[r] + tl.log2(total[r])
        chosen = ()
        for i in tl.static_range(2):
            source = rows[r // SCALE + i] + (position + label.to(position.dtype) * plane_size)
            left = tl.load(source, label >= 0, other=0.0).to(tl.float32)
            right = tl.load(source + 1, has_right & (label >= 0), other=0.0).to(tl.float32)
            chosen += (tl.fma(right_weight, right, left_weight * left),)
        loss = factor * (in_bits - _at_row(chosen[0], chosen[1], lower_weights[r]))
        if SMOOTHED:
            of_spread = spread_weight * (all_weights * in_bits - spread[r])
            loss = tl.fma(loss, 1.0 - label_smoothing, of_spread)
        loss = tl.where(wrong, float("nan"), tl.where(counts, loss * _LOG_2, 0.0))
        # The NaN marks an invalid target for backward.
        tl.store(log_sum_exp + starts[r] + x, tl.where(wrong, float("nan"), in_bits * _LOG_2), inside)
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
        CLASSES=_CLASSES,
        COLUMNS=_COLUMNS,
        PARTIALS=_PARTIALS,
        num_warps=2,
    )
    return loss, log_sum_exp, total_weight


@triton.jit
def _add_to_corners(corners, value, right_weights, lower_weights, BLOCK: tl.constexpr):
    """Adds the contributions of the outputs of a block, row by row, to the four corners of their cell.

    The corners are: above left, above right, below left, below right.
    """
    above_left, above_right, below_left, below_right = corners
    for r in tl.static_range(BLOCK):
        both = value[r * BLOCK]
        right = right_weights[0] * both
        for q in tl.static_range(1, BLOCK):
            both += value[r * BLOCK + q]
            right = tl.fma(right_weights[q], value[r * BLOCK + q], right)
        left = both - right
        above_left = tl.fma(1.0 - lower_weights[r], left, above_left)
        above_right = tl.fma(1.0 - lower_weights[r], right, above_right)
        below_left = tl.fma(lower_weights[r], left, below_left)
        below_right = tl.fma(lower_weights[r], right, below_right)
    return above_left, above_right, below_left, below_right


@triton.jit
def _joined(left, right, CELLS: tl.constexpr):
    """Adds the sums of the cells on both sides of each column of the input; the last thread has no valid result."""
    following = tl.minimum(tl.arange(0, CELLS) + 1, CELLS - 1)
    return right + tl.gather(left, following, axis=0)


@triton.jit(do_not_specialize=["plane_offset", "input_height", "input_width"])
def _gradient_kernel(
    grad,
    logits,
    target,
    weight,
    log_sum_exp,
    total_weight,
    planes,
    plane_offset,
    channels,
    classes,
    input_height,
    input_width,
    ignore_index,
    label_smoothing,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    MEAN: tl.constexpr,
    REDUCED: tl.constexpr,
    WIDE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Computes `classes` classes of a row of CELLS cells, one block of BLOCK x BLOCK outputs of each cell at a time."""
    BLOCKS: tl.constexpr = (SCALE + BLOCK - 1) // BLOCK
    height, width = input_height * SCALE, input_width * SCALE
    column_blocks = tl.cdiv(input_width, CELLS - 1)
    groups = tl.cdiv(channels, classes)
    program = tl.program_id(0)
    image = (program // (column_blocks * groups * (input_height + 1))).to(tl.int64)
    i = program // (column_blocks * groups) % (input_height + 1)
    first = program // column_blocks % groups * classes
    last = tl.minimum(first + classes, channels)
    lane = tl.arange(0, CELLS)
    j = program % column_blocks * (CELLS - 1) + lane

    offset = tl.int64 if WIDE else tl.int32
    plane_size = tl.cast(input_height, offset) * input_width
    above = tl.maximum(i - 1, 0).to(tl.int64) * input_width
    below = tl.minimum(i, input_height - 1).to(tl.int64) * input_width
    of_image = image * channels * plane_size
    has_left, has_right = (j > 0) & (j <= input_width), j < input_width

    scale = 1.0
    if REDUCED:
        scale = tl.load(grad)
        if MEAN:  # without any counted pixel the gradient is 0
            weights = tl.load(total_weight)
            scale = tl.where(weights == 0.0, 0.0, tl.div_rn(scale, weights))
    if SMOOTHED:
        spread_weight = label_smoothing / tl.cast(channels, tl.float32)
        all_weights = _sum_of_class_weights(weight, channels, WEIGHTED)

    for block in range(BLOCKS * BLOCKS):
        right_weights, lower_weights = (), ()
        for q in tl.static_range(BLOCK):
            right_weight = tl.cast(_second_weight(block % BLOCKS * BLOCK + q, SCALE), tl.float32)
            right_weights += (tl.where(j <= 0, 1.0, tl.where(j >= input_width, 0.0, right_weight)),)
            lower_weight = tl.cast(_second_weight(block // BLOCKS * BLOCK + q, SCALE), tl.float32)
            lower_weights += (tl.where(i <= 0, 1.0, tl.where(i >= input_height, 0.0, lower_weight)),)

        labels, offsets, factors, chosen_factors, spread_factors = (), (), (), (), ()
        for p in tl.static_range(BLOCK * BLOCK):
            row = block // BLOCKS * BLOCK + p // BLOCK
            column = block % BLOCKS * BLOCK + p % BLOCK
            y = (i - 1) * SCALE + SCALE // 2 + row
            x = (j - 1) * SCALE + SCALE // 2 + column
            inside = (row < SCALE) & (column < SCALE) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            start = (image * height + y) * width
            label, counts, _wrong = _class_of(target + start + x, inside, ignore_index, channels)
            labels += (label,)
            # The tensor comes first: under Triton 3.8's interpreter a constexpr times a tensor is a constexpr.
            offsets += (tl.load(log_sum_exp + start + x, counts, other=float("inf")) * -_LOG2_E,)
            of_loss = tl.where(counts, 1.0, 0.0) if REDUCED else tl.load(grad + start + x, counts, other=0.0)
            of_class = of_loss
            if WEIGHTED:
                of_class *= tl.load(weight + label.to(tl.int32), label >= 0, other=0.0)
            if SMOOTHED:
                of_class *= 1.0 - label_smoothing
                spread_factors += (of_loss * spread_weight,)
                factors += (tl.fma(of_loss, spread_weight * all_weights, of_class),)
            else:
                factors += (of_class,)
            chosen_factors += (of_class,)
        zero = tl.zeros((CELLS,), tl.float32)
        if SMOOTHED:
            spread = _add_to_corners(
                (zero, zero, zero, zero), spread_factors, right_weights, lower_weights, BLOCK
            )

        position = first * plane_size + (j - 1)
        number = tl.cast(first, tl.float32)
        for c in range(first, last):
            corners = ()
            for k in tl.static_range(4):
                source = logits + of_image + (above if k < 2 else below) + position + k % 2
                value = tl.load(source, has_left if k % 2 == 0 else has_right, other=0.0)
                corners += (value.to(tl.float32) * _LOG2_E,)
            given = ()
            for r in tl.static_range(BLOCK):
                left = tl.fma(lower_weights[r], corners[2], (1.0 - lower_weights[r]) * corners[0])
                right = tl.fma(lower_weights[r], corners[3], (1.0 - lower_weights[r]) * corners[1])
                for q in tl.static_range(BLOCK):
                    power = tl.fma(1.0 - right_weights[q], left, offsets[r * BLOCK + q])
                    probability = tl.exp2(tl.fma(right_weights[q], right, power))
                    is_chosen = labels[r * BLOCK + q] == number
                    if WEIGHTED or not REDUCED:
                        chosen = tl.where(is_chosen, -chosen_factors[r * BLOCK + q], 0.0)
                        given += (tl.fma(factors[r * BLOCK + q], probability, chosen),)
                    elif (
                        SMOOTHED
                    ):  # the factor is 1 for pixels that count; the probability is 0 for the others
                        given += (probability - tl.where(is_chosen, 1.0 - label_smoothing, 0.0),)
                    else:
                        given += (tl.where(is_chosen, probability - 1.0, probability),)
            gradients = _add_to_corners((zero, zero, zero, zero), given, right_weights, lower_weights, BLOCK)
            above_left, above_right, below_left, below_right = gradients
            if SMOOTHED:
                share = 1.0
                if WEIGHTED:
                    share = tl.load(weight + c)
                above_left -= share * spread[0]
                above_right -= share * spread[1]
                below_left -= share * spread[2]
                below_right -= share * spread[3]
            # For the row above, these are the contributions from below; for the row below, those from above.
            stored = has_right & (lane < CELLS - 1)
            for k in tl.static_range(2):
                if k == 0:
                    total = _joined(above_left, above_right, CELLS)
                    destination = planes + of_image + above + position + 1
                    stored_here = stored & (i > 0)
                else:
                    total = _joined(below_left, below_right, CELLS)
                    destination = planes + plane_offset + of_image + below + position + 1
                    stored_here = stored & (i < input_height)
                total *= scale
                if BLOCKS > 1:
                    total += tl.load(destination, stored_here & (block > 0), other=0.0)
                tl.store(destination, total, stored_here)
            position += plane_size
            number += 1.0


def upsample_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    total_weight: Tensor,
    scale_factor: int,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Implements the op of csrc/library.cpp."""
    images, channels, height, width = logits.shape
    if logits.numel() == 0:
        return torch.empty_like(logits)
    # The block size whose blocks cover the fewest positions outside of a cell.
    block = min(range(1, _BLOCK + 1), key=lambda size: (cdiv(scale_factor, size) * size, -size))
    planes = torch.empty((2, *logits.shape), dtype=torch.float32, device=logits.device)
    groups = cdiv(channels, _MOST_CLASSES)
    grid = (images * (height + 1) * groups * cdiv(width, _CELLS - 1),)
    launch(
        _gradient_kernel,
        grid,
        grad.contiguous(),
        planar(logits),
        target.contiguous(),
        None if weight is None else weight.contiguous(),
        log_sum_exp,
        total_weight,
        planes,
        logits.numel(),
        channels,
        cdiv(channels, groups),
        height,
        width,
        ignore_index,
        label_smoothing,
        SCALE=scale_factor,
        BLOCK=block,
        WEIGHTED=weight is not None,
        SMOOTHED=label_smoothing > 0,
        MEAN=reduction == "mean",
        REDUCED=reduction != "none",
        WIDE=channels * height * width >= 2**31,
        CELLS=_CELLS,
        num_warps=1,
    )
    if channels_last_only(logits):
        return sum_to_channels_last(planes, logits.dtype)
    return planes.sum(0).to(logits.dtype)
