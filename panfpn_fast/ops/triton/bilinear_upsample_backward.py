"""The adjoint of bilinear upsampling: each pixel gathers from the outputs that read it.

These are the outputs of two cells: the cell whose low end the pixel is, and the cell before, whose high end it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton._launch import cdiv, channels_last, empty_channels_last, launch, next_power_of_2
from panfpn_fast.ops.triton._upsampling import (
    elements,
    high_weight,
    low_weight,
    tile_of_program,
    vector_size,
)

_WARPS = 4
_MAX_CHANNELS = 128


@triton.jit
def _load_phase(grad, y, height, first, column, width, channel, channels, phase, FACTOR: tl.constexpr):
    """Loads the outputs at a phase of the cells from column `first` on."""
    first = first * FACTOR + (FACTOR // 2 + phase)
    pointers, valid = elements(
        grad, y, height * FACTOR, first, column * FACTOR, width * FACTOR, channel, channels
    )
    return tl.load(pointers, valid, 0.0).to(tl.float32)


@triton.jit
def _gather_line(grad, y, height, first, column, width, channel, channels, FACTOR: tl.constexpr):
    """Gathers for the pixels from column `first` on along one row of outputs."""
    unroll: tl.constexpr = FACTOR if FACTOR <= 4 else 1
    total = tl.zeros((column.shape[0], channel.shape[0]), tl.float32)
    for phase in tl.range(FACTOR, loop_unroll_factor=unroll):
        value = _load_phase(grad, y, height, first, column, width, channel, channels, phase, FACTOR)
        total += low_weight(first + column, width, phase, FACTOR)[:, None] * value
    # With an odd factor, the first output of a cell is a copy of its low end and does not read the high end.
    for phase in tl.range(FACTOR % 2, FACTOR, loop_unroll_factor=unroll):
        value = _load_phase(grad, y, height, first - 1, column, width, channel, channels, phase, FACTOR)
        total += high_weight(first - 1 + column, phase, FACTOR)[:, None] * value
    return total


@triton.jit
def gather(
    grad, row, height, first, column, width, channel, channels, FACTOR: tl.constexpr, ROWS: tl.constexpr
):
    """Gathers for the pixels (row, first + column) to (row + ROWS - 1, first + column): a tuple of one tile per row.

    The values of pixels outside of the image are meaningless.
    """
    rows = ()
    carried = tl.zeros((column.shape[0], channel.shape[0]), tl.float32)
    for i in tl.static_range(0 if FACTOR == 1 else -1, ROWS):
        cell = row + i
        low = carried
        high = tl.zeros((column.shape[0], channel.shape[0]), tl.float32)
        for phase in range(FACTOR):
            y = cell * FACTOR + FACTOR // 2 + phase
            line = _gather_line(grad, y, height, first, column, width, channel, channels, FACTOR)
            low += low_weight(cell, height, phase, FACTOR) * line
            if FACTOR > 1:
                high += high_weight(cell, phase, FACTOR) * line
        if i >= 0:
            rows += (low,)
        carried = high
    return rows


@triton.jit(do_not_specialize=["height", "width"])
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
    image, row, first, channel = tile_of_program(blocks, ROWS, COLUMNS, CHANNELS)
    column = tl.arange(0, COLUMNS)
    grad += image * height * width * channels * (FACTOR * FACTOR)
    out += image * height * width * channels
    rows = gather(grad, row, height, first, column, width, channel, channels, FACTOR, ROWS)
    for i in tl.static_range(ROWS):
        pointers, valid = elements(out, row + i, height, first, column, width, channel, channels)
        tl.store(pointers, rows[i].to(out.dtype.element_ty), valid)


def gather_tiles(grad: Tensor, scale_factor: int) -> tuple[int, int, int]:
    """Returns the number of rows, columns and channels of the tile that one program gathers."""
    block = min(next_power_of_2(grad.shape[1]), _MAX_CHANNELS)
    columns = _WARPS * 32 * vector_size(grad) // block
    if scale_factor > 4:  # loops over the phases are then not unrolled, and would spill with more columns
        columns = max(1, columns // 2)
    return max(1, 8 // scale_factor), columns, block


def bilinear_upsample_backward(grad: Tensor, scale_factor: int) -> Tensor:
    """Implements the op of csrc/library.cpp with one launch; the result is channels-last."""
    batch, channels, height, width = grad.shape
    scale_factor = int(scale_factor)  # a traced factor becomes a constant of the graph
    height, width = height // scale_factor, width // scale_factor
    out = empty_channels_last((batch, channels, height, width), grad)
    if out.numel() == 0:
        return out
    rows, columns, block = gather_tiles(grad, scale_factor)
    blocks = cdiv(channels, block)
    grid = (cdiv(width, columns), cdiv(height, rows), batch * blocks)
    launch(
        _gather_kernel,
        grid,
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
