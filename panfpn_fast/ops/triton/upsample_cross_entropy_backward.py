"""Gradient of the cross-entropy of upsampled logits, for which the softmax is computed again.

Cells and units are those of `upsample_cross_entropy`. A thread has a cell and sums the gradients that the cell's
outputs contribute to its four corners. It gets the sums of its neighbor's corners from the next thread. Each row of the
input receives contributions from the cells above and from the cells below; these go to two separate maps, which a
second kernel adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast._layout import channels_last_only
from panfpn_fast.ops.triton._launch import cdiv, launch
from panfpn_fast.ops.triton._planar import planar, sum_to_channels_last
from panfpn_fast.ops.triton.upsample_cross_entropy import (
    LOG2_E,
    class_of,
    second_weight,
    sum_of_class_weights,
)

_CELLS = 32  # cells of a program, which is one warp
_MOST_CLASSES = 32  # classes of a program; fewer keep more of the GPU busy
_BLOCK = 4  # outputs of a cell that a thread has in registers at a time, along each axis


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
        all_weights = sum_of_class_weights(weight, channels, WEIGHTED)

    for block in range(BLOCKS * BLOCKS):
        right_weights, lower_weights = (), ()
        for q in tl.static_range(BLOCK):
            right_weight = tl.cast(second_weight(block % BLOCKS * BLOCK + q, SCALE), tl.float32)
            right_weights += (tl.where(j <= 0, 1.0, tl.where(j >= input_width, 0.0, right_weight)),)
            lower_weight = tl.cast(second_weight(block // BLOCKS * BLOCK + q, SCALE), tl.float32)
            lower_weights += (tl.where(i <= 0, 1.0, tl.where(i >= input_height, 0.0, lower_weight)),)

        labels, offsets, factors, chosen_factors, spread_factors = (), (), (), (), ()
        for p in tl.static_range(BLOCK * BLOCK):
            row = block // BLOCKS * BLOCK + p // BLOCK
            column = block % BLOCKS * BLOCK + p % BLOCK
            y = (i - 1) * SCALE + SCALE // 2 + row
            x = (j - 1) * SCALE + SCALE // 2 + column
            inside = (row < SCALE) & (column < SCALE) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            start = (image * height + y) * width
            label, counts, _wrong = class_of(target + start + x, inside, ignore_index, channels)
            labels += (label.to(tl.float32),)
            # The tensor comes first: under Triton 3.8's interpreter a constexpr times a tensor is a constexpr.
            offsets += (tl.load(log_sum_exp + start + x, counts, other=float("inf")) * -LOG2_E,)
            of_loss = tl.where(counts, 1.0, 0.0) if REDUCED else tl.load(grad + start + x, counts, other=0.0)
            of_class = of_loss
            if WEIGHTED:
                of_class *= tl.load(weight + label, label >= 0, other=0.0)
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
                corners += (value.to(tl.float32) * LOG2_E,)
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
