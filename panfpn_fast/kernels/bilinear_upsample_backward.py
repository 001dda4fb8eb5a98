"""The adjoint of bilinear upsampling: each pixel gathers from the outputs that read it.

As in group_norm_relu_upsample, the s outputs between two neighbouring pixels along an axis form a cell. A pixel is read
by the outputs of the cell that it begins, as their low end, and of the one before, as their high end; the outputs before
the first pixel and behind the last read that one alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.kernels._group_norm import tile_place, vector_size
from panfpn_fast.kernels._launch import (
    channels_last,
    empty_channels_last,
    next_power_of_2,
    triton_op,
    wrap_triton,
)

_WARPS = 4
_MAX_CHANNELS = 128


@triton.jit
def _low_weight(cell, size, phase, FACTOR: tl.constexpr):
    """With what weight an output of a cell reads the cell's low end."""
    weight = (2 * (FACTOR // 2 + phase) + 1 - FACTOR) / (2 * FACTOR)
    return tl.where(cell + 1 < size, 1.0 - weight, 1.0)


@triton.jit
def _high_weight(cell, phase, FACTOR: tl.constexpr):
    weight = (2 * (FACTOR // 2 + phase) + 1 - FACTOR) / (2 * FACTOR)
    return tl.where(cell >= 0, weight, 1.0)


@triton.jit
def _load(grad, y, height, x, width, channel, channels):
    offset = (y.to(tl.int64) * width + x.to(tl.int64)[:, None]) * channels + channel[None, :]
    valid = ((x >= 0) & (x < width))[:, None] & (channel < channels)[None, :] & (y >= 0) & (y < height)
    return tl.load(grad + offset, valid, 0.0).to(tl.float32)


@triton.jit
def _gather_line(grad, y, height, column, width, channel, channels, FACTOR: tl.constexpr):
    """What the pixels at `column` gather along one row of outputs."""
    unroll: tl.constexpr = FACTOR if FACTOR <= 4 else 1
    total = tl.zeros((column.shape[0], channel.shape[0]), tl.float32)
    first = column * FACTOR + FACTOR // 2  # output of the cell that the pixel begins
    for phase in tl.range(FACTOR, loop_unroll_factor=unroll):
        value = _load(grad, y, height * FACTOR, first + phase, width * FACTOR, channel, channels)
        total += _low_weight(column, width, phase, FACTOR)[:, None] * value
    for phase in tl.range(
        FACTOR % 2, FACTOR, loop_unroll_factor=unroll
    ):  # an odd factor's first is the low end
        value = _load(grad, y, height * FACTOR, first - FACTOR + phase, width * FACTOR, channel, channels)
        total += _high_weight(column - 1, phase, FACTOR)[:, None] * value
    return total


@triton.jit
def gather(grad, row, height, column, width, channel, channels, FACTOR: tl.constexpr, ROWS: tl.constexpr):
    """What the pixels (row, column) to (row + ROWS - 1, column) gather from an image: a tuple of one tile per row.

    Pixels beyond the image's border gather something without meaning.
    """
    rows = ()
    carried = tl.zeros((column.shape[0], channel.shape[0]), tl.float32)
    for i in tl.static_range(0 if FACTOR == 1 else -1, ROWS):
        cell = row + i
        low = carried
        high = tl.zeros((column.shape[0], channel.shape[0]), tl.float32)
        for phase in range(FACTOR):
            y = cell * FACTOR + FACTOR // 2 + phase
            line = _gather_line(grad, y, height, column, width, channel, channels, FACTOR)
            low += _low_weight(cell, height, phase, FACTOR) * line
            if FACTOR > 1:
                high += _high_weight(cell, phase, FACTOR) * line
        if i >= 0:
            rows += (low,)
        carried = high
    return rows


@triton.jit
def _gather_kernel(
    grad,
    out,
    height,
    width,
    vectors,
    blocks,
    VECTOR: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = vectors * VECTOR
    image, row, column, channel = tile_place(blocks, ROWS, COLUMNS, CHANNELS)
    grad += image * height * width * channels * (FACTOR * FACTOR)
    out += image * height * width * channels
    rows = gather(grad, row, height, column, width, channel, channels, FACTOR, ROWS)
    for i in tl.static_range(ROWS):
        place = ((row + i).to(tl.int64) * width + column.to(tl.int64)[:, None]) * channels + channel[None, :]
        valid = (column < width)[:, None] & (channel < channels)[None, :] & (row + i < height)
        tl.store(out + place, rows[i].to(out.dtype.element_ty), valid)


def gather_tiles(grad: Tensor, scale_factor: int) -> tuple[int, int, int]:
    """Rows, columns and channels of the pixels that one program gathers."""
    block = min(next_power_of_2(grad.shape[1]), _MAX_CHANNELS)
    return max(1, 8 // scale_factor), _WARPS * 32 * vector_size(grad) // block, block


def bilinear_upsample_backward(grad: Tensor, scale_factor: int) -> Tensor:
    """See csrc/library.cpp. One launch; the result is channels-last."""
    batch, channels, height, width = grad.shape
    height, width = height // scale_factor, width // scale_factor
    out = empty_channels_last((batch, channels, height, width), grad)
    if out.numel() == 0:
        return out
    rows, columns, block = gather_tiles(grad, scale_factor)
    blocks = triton.cdiv(channels, block)
    grid = (triton.cdiv(width, columns), triton.cdiv(height, rows), batch * blocks)
    wrap_triton(_gather_kernel)[grid](
        channels_last(grad),
        out,
        height,
        width,
        channels // vector_size(grad),
        blocks,
        VECTOR=vector_size(grad),
        FACTOR=scale_factor,
        ROWS=rows,
        COLUMNS=columns,
        CHANNELS=block,
        num_warps=_WARPS,
    )
    return out


triton_op(bilinear_upsample_backward)
