"""Labels pixels: at once where one class leads, otherwise by interpolating and comparing one class after the other.

A program labels a tile: a few rows of the output over the columns of one warp. First each thread finds the class with
the largest logit in some pixels of the input. A pixel of the output is a weighted mean of pixels of the input. If one
class leads in all of those that the tile reads, by more than rounding errors, it also has the largest logit in all
pixels of the tile, and the program is done. In a segmentation this holds for most tiles.

Otherwise a thread has one column of the tile. It interpolates each row of the input that it needs along x once, for all
of its output rows. If the output is the input upsampled by a whole
factor, the rows of a program are whole cells (see `_upsampling`), so their input rows and weights are compile-time
constants. Otherwise each row of the output may read every input row of the program.

The loop over the classes is written for finite numbers and detects others. If it finds any, the program labels its
pixels again with a slower loop that handles infinities and NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton._launch import cdiv, launch
from panfpn_fast.ops.triton._planar import planar
from panfpn_fast.ops.triton._upsampling import weights

_COLUMNS = 32  # output columns of a program, which is one warp, so that undecided tiles are small
_ROWS = 8  # output rows of a program, at most
_MOST_INPUT_ROWS = 6  # a thread has registers for so many, if every output row may read all of them
_SAFE_LEAD = tl.constexpr(
    2.0**-18
)  # least lead of a class relative to its logit; 32 times the largest rounding error


@triton.jit
def _composed_taps(output, size, crop, factor, input_size):
    """First of three adjacent inputs and their weights, for an output after an upsampling, a crop and a resize."""
    scale = tl.div_rn(tl.cast(crop, tl.float32), tl.cast(size, tl.float32))
    source = tl.maximum(scale * (tl.cast(output, tl.float32) + 0.5) - 0.5, 0.0)
    low = tl.minimum(tl.cast(source, tl.int32), crop - 1)
    share = tl.minimum(tl.maximum(source - tl.cast(low, tl.float32), 0.0), 1.0)
    low = tl.where(size == crop, output, low)  # like F.interpolate, which does not resize then
    share = tl.where(size == crop, 0.0, share)
    high = tl.minimum(low + 1, crop - 1)

    # Positions in the input are in units of 1 / (2 * factor), so that they are integers.
    unit = 2 * factor
    low_rest = tl.maximum(2 * low + 1 - factor, 0)
    base = low_rest // unit
    low_rest -= base * unit
    high_rest = tl.maximum(2 * high + 1 - factor, 0) - base * unit
    further = high_rest >= unit
    high_rest -= tl.where(further, unit, 0)
    one = tl.div_rn(1.0, tl.cast(unit, tl.float32))
    low_weight = tl.cast(low_rest, tl.float32) * one
    high_weight = tl.cast(high_rest, tl.float32) * one
    weight_0 = (1.0 - share) * (1.0 - low_weight) + tl.where(further, 0.0, share * (1.0 - high_weight))
    weight_1 = (1.0 - share) * low_weight + share * tl.where(further, 1.0 - high_weight, high_weight)
    weight_2 = tl.where(further, share * high_weight, 0.0)
    # The last input stands for inputs after it.
    inside_2, inside_1 = base + 2 < input_size, base + 1 < input_size
    weight_1 += tl.where(inside_2, 0.0, weight_2)
    weight_0 += tl.where(inside_1, 0.0, weight_1)
    return base, weight_0, tl.where(inside_1, weight_1, 0.0), tl.where(inside_2, weight_2, 0.0)


@triton.jit
def _weighted(weight, value, EXACT: tl.constexpr):
    """Product of weight and value; with EXACT, which allows infinities and NaN, a weight of 0 gives 0 for any value."""
    return tl.where(weight == 0.0, 0.0, weight * value) if EXACT else weight * value


@triton.jit
def _interpolate_row(row, column_weights, TAPS: tl.constexpr, EXACT: tl.constexpr):
    """Interpolates a row of the input at each thread's column."""
    mixed = tl.load(row).to(tl.float32)
    if TAPS == 2 and not EXACT:
        mixed += column_weights[1] * (tl.load(row + 1).to(tl.float32) - mixed)
    elif TAPS > 1:
        mixed = _weighted(column_weights[0], mixed, EXACT)
        for k in tl.static_range(1, TAPS):
            mixed += _weighted(column_weights[k], tl.load(row + k).to(tl.float32), EXACT)
    return mixed


@triton.jit
def _interpolate_column(
    mixed, row_weights, r: tl.constexpr, SCALE: tl.constexpr, INPUT_ROWS: tl.constexpr, EXACT: tl.constexpr
):
    """Interpolates the logit in row r of the output."""
    if SCALE > 0:
        low_weight, high_weight = weights(r % SCALE, SCALE)
        low, high = mixed[r // SCALE], mixed[r // SCALE + 1]
        if not EXACT:
            value = low + high_weight * (high - low)
        elif SCALE % 2 == 1 and r % SCALE == 0:  # the high end has a weight of 0
            value = low
        else:
            value = low_weight * low + high_weight * high
    else:
        value = _weighted(row_weights[r * INPUT_ROWS], mixed[0], EXACT)
        for i in tl.static_range(1, INPUT_ROWS):
            value += _weighted(row_weights[r * INPUT_ROWS + i], mixed[i], EXACT)
    return value


@triton.jit
def _best_classes(
    rows,
    position,
    plane_size,
    channels,
    row_weights,
    column_weights,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    INPUT_ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    EXACT: tl.constexpr,
    WITH_PROB: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For each row of the output: the largest logit, its class, and the sum of exponentials relative to it.

    The fourth result has a number for each column that is NaN unless all inputs are finite and not too far apart.
    """
    best, label, total = (), (), ()
    for _ in tl.static_range(ROWS):
        best += (tl.full((COLUMNS,), float("-inf"), tl.float32),)
        label += (tl.zeros((COLUMNS,), tl.int32),)
        total += (tl.zeros((COLUMNS,), tl.float32),)
    finite = tl.zeros((COLUMNS,), tl.float32)
    for c in tl.range(0, channels):
        mixed = ()
        for i in tl.static_range(INPUT_ROWS):
            mixed += (_interpolate_row(rows[i] + position, column_weights, TAPS, EXACT),)
        position += plane_size
        if not EXACT:
            if SCALE > 0:
                for i in tl.static_range(INPUT_ROWS - 1):
                    finite += 0.0 * (mixed[i + 1] - mixed[i])
            else:
                for i in tl.static_range(INPUT_ROWS):
                    finite += 0.0 * mixed[i]
        next_best, next_label, next_total = (), (), ()
        for r in tl.static_range(ROWS):
            value = _interpolate_column(mixed, row_weights, r, SCALE, INPUT_ROWS, EXACT)
            better = value > best[r]
            if EXACT:
                better = better | ((value != value) & (best[r] == best[r]))
            if WITH_PROB:
                share = tl.exp2(-tl.abs(value - best[r]) * 1.4426950408889634)
                if EXACT:
                    share = tl.where(value == best[r], 1.0, share)
                next_total += (total[r] * tl.where(better, share, 1.0) + tl.where(better, 1.0, share),)
            next_best += (tl.where(better, value, best[r]),)
            next_label += (tl.where(better, c, label[r]),)
        best, label = next_best, next_label
        if WITH_PROB:
            total = next_total
    return best, label, total, finite


@triton.jit
def _common_leader(
    logits,
    base,
    first,
    last,
    plane_size,
    channels,
    input_height,
    input_width,
    INPUT_ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Class that leads in the columns [first, last] of INPUT_ROWS rows of the input from row `base` on; -1 if none.

    A class leads if its logit is so much larger than the others that rounding errors cannot change the order of means.
    The errors are relative to the leader's logit: a class with a much lower logit has larger errors, and more distance.
    """
    columns = last - first + 1
    count = columns * INPUT_ROWS
    lowest = tl.full((PIXELS,), 0x7FFFFFFF, tl.int32)
    highest = tl.full((PIXELS,), -1, tl.int32)
    lead = tl.full((PIXELS,), float("inf"), tl.float32)
    size = tl.zeros((PIXELS,), tl.float32)
    for start in range(0, count, PIXELS):
        pixel = tl.minimum(start + tl.arange(0, PIXELS), count - 1).to(tl.int32)
        row = tl.minimum(tl.maximum(base + pixel // columns, 0), input_height - 1)
        position = row.to(plane_size.dtype) * input_width + first + pixel % columns
        best = tl.full((PIXELS,), float("-inf"), tl.float32)
        second = tl.full((PIXELS,), float("-inf"), tl.float32)
        leader = tl.zeros((PIXELS,), tl.int32)
        for c in tl.range(0, channels, loop_unroll_factor=6):
            value = tl.load(logits + position).to(tl.float32)
            position += plane_size
            leader = tl.where(value > best, c, leader)
            second = tl.maximum(second, tl.minimum(best, value))
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        lowest = tl.minimum(lowest, leader)
        highest = tl.maximum(highest, leader)
        # NaN if a logit is NaN or the leader is infinite; then no class leads.
        lead = tl.minimum(lead, best - second, propagate_nan=tl.PropagateNan.ALL)
        size = tl.maximum(size, tl.abs(best))
    leads = lead > tl.max(size, axis=0) * _SAFE_LEAD
    common = tl.min(tl.where(leads, lowest, -1), axis=0)
    return tl.where(common == tl.max(highest, axis=0), common, -1)


# Specialized by size, photographs of all sizes would need 30 variants, each of which takes a second or more to compile.
@triton.jit(do_not_specialize=["input_height", "input_width", "crop_height", "crop_width", "height", "width"])
def _label_kernel(
    logits,
    labels,
    probabilities,
    channels,
    input_height,
    input_width,
    factor,
    crop_height,
    crop_width,
    height,
    width,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    INPUT_ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    WITH_PROB: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Labels ROWS rows and COLUMNS columns; SCALE is the factor if there is no resize, otherwise 0."""
    OFFSET: tl.constexpr = (
        SCALE - SCALE // 2
    )  # rows and columns of the first cells that are outside of the output
    column_blocks = tl.cdiv(width, COLUMNS)
    row_blocks = tl.cdiv(height + OFFSET, ROWS)
    program = tl.program_id(0)
    image = (program // (column_blocks * row_blocks)).to(tl.int64)
    row_block = program // column_blocks % row_blocks
    x = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)

    row_weights = ()
    if SCALE > 0:
        first = (x + OFFSET) // SCALE - 1
        _low_weight, weight_1 = weights((x + OFFSET) % SCALE, SCALE)
        weight_1 = tl.where((first < 0) | (first >= input_width - 1), 0.0, weight_1)
        weight_0 = 1.0 - weight_1
        weight_2 = tl.zeros((COLUMNS,), tl.float32)
        first = tl.minimum(tl.maximum(first, 0), input_width - 1)
        base = row_block * (ROWS // SCALE) - 1
    else:
        first, weight_0, weight_1, weight_2 = _composed_taps(
            tl.minimum(x, width - 1), width, crop_width, factor, input_width
        )
        base, _0, _1, _2 = _composed_taps(row_block * ROWS, height, crop_height, factor, input_height)
        for r in tl.static_range(ROWS):
            row = tl.minimum(row_block * ROWS + r, height - 1)
            low, low_weight, middle_weight, high_weight = _composed_taps(
                row, height, crop_height, factor, input_height
            )
            for i in tl.static_range(INPUT_ROWS):
                weight = tl.where(low - base == i, low_weight, 0.0)
                weight = tl.where(low - base == i - 1, middle_weight, weight)
                row_weights += (tl.where(low - base == i - 2, high_weight, weight),)
    # The TAPS inputs from `column` on are all in the row.
    column = tl.cast(tl.minimum(first, input_width - TAPS), tl.int64 if WIDE else tl.int32)
    column_weights = ()
    for k in tl.static_range(TAPS):
        weight = tl.where(first - column == k, weight_0, 0.0)
        weight = tl.where(first - column == k - 1, weight_1, weight)
        column_weights += (tl.where(first - column == k - 2, weight_2, weight),)

    plane_size = tl.cast(input_height, column.dtype) * input_width
    logits += image * channels * plane_size
    common = -1
    if not WITH_PROB:
        common = _common_leader(
            logits, base, tl.min(column, axis=0), tl.max(column, axis=0) + (TAPS - 1), plane_size, channels,
            input_height, input_width, INPUT_ROWS, COLUMNS,
        )  # fmt: skip
    best, label, total = (), (), ()
    for _ in tl.static_range(ROWS):
        best += (tl.zeros((COLUMNS,), tl.float32),)
        label += (tl.zeros((COLUMNS,), tl.int32) + common,)
        total += (tl.zeros((COLUMNS,), tl.float32),)
    if common < 0:
        rows = ()
        for i in tl.static_range(INPUT_ROWS):
            input_row = tl.minimum(tl.maximum(base + i, 0), input_height - 1).to(tl.int64)
            rows += (logits + input_row * input_width,)
        best, label, total, finite = _best_classes(
            rows, column, plane_size, channels, row_weights, column_weights,
            SCALE, ROWS, INPUT_ROWS, TAPS, False, WITH_PROB, COLUMNS,
        )  # fmt: skip
        if tl.max((finite != finite).to(tl.int32), axis=0) > 0:
            best, label, total, finite = _best_classes(
                rows, column, plane_size, channels, row_weights, column_weights,
                SCALE, ROWS, INPUT_ROWS, TAPS, True, WITH_PROB, COLUMNS,
            )  # fmt: skip
    for r in tl.static_range(ROWS):
        y = row_block * ROWS - OFFSET + r
        inside = (y >= 0) & (y < height) & (x < width)
        index = (image * height + y) * width + x
        tl.store(labels + index, label[r].to(labels.dtype.element_ty), inside)
        if WITH_PROB:
            top = tl.where(tl.abs(best[r]) < float("inf"), 1.0 / total[r], float("nan"))
            tl.store(probabilities + index, top, inside)


def _rows_of_programs(
    scale_factor: int, crop_height: int, height: int, same_size: bool
) -> tuple[int, int, int]:
    """Returns SCALE (the factor, 0 with a resize) and the numbers of output and input rows of a program."""
    if same_size and scale_factor <= _ROWS:
        rows = _ROWS // scale_factor * scale_factor
        return scale_factor, rows, rows // scale_factor + 1
    for rows in (_ROWS, _ROWS // 2):
        # The first and the last output row read up to three inputs each, (rows - 1) * crop / (size * factor) apart.
        input_rows = -(-(rows - 1) * crop_height // (height * scale_factor)) + 3
        if input_rows <= _MOST_INPUT_ROWS:
            return 0, rows, input_rows
    return 0, 1, 3


def upsample_argmax(
    logits: Tensor,
    scale_factor: int,
    crop_height: int,
    crop_width: int,
    height: int,
    width: int,
    return_prob: bool,
) -> tuple[Tensor, Tensor]:
    """Implements the op of csrc/library.cpp with one launch, or two if the logits are channels-last."""
    images, channels, input_height, input_width = logits.shape
    dtype = torch.uint8 if channels <= 256 else torch.int16
    labels = torch.empty((images, height, width), dtype=dtype, device=logits.device)
    shape = (images, height, width) if return_prob else (0,)
    probabilities = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if labels.numel() == 0:
        return labels, probabilities
    scale, rows, input_rows = _rows_of_programs(
        scale_factor, crop_height, height, (crop_height, crop_width) == (height, width)
    )
    grid = (images * cdiv(height + scale - scale // 2, rows) * cdiv(width, _COLUMNS),)
    launch(
        _label_kernel,
        grid,
        planar(logits),
        labels,
        probabilities,
        channels,
        input_height,
        input_width,
        scale_factor,
        crop_height,
        crop_width,
        height,
        width,
        SCALE=scale,
        ROWS=rows,
        INPUT_ROWS=input_rows,
        TAPS=min(2 if scale > 0 else 3, input_width),
        WITH_PROB=return_prob,
        WIDE=channels * input_height * input_width >= 2**31,
        COLUMNS=_COLUMNS,
        num_warps=1,
    )
    return labels, probabilities
