"""Tiles of channels-last maps, and of the cells of an upsampling.

The s outputs that lie between two neighbouring pixels, along one axis, form a cell, numbered as the first of them. Cell
-1 lies before the first pixel. All outputs of a cell read the same two pixels, its ends; where one of them does not
exist, the other twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def vector_size(x: Tensor) -> int:
    """Channels that a thread may load at once: up to 16 bytes, as far as they divide a pixel's.

    Kernels are given the channels as a number of such vectors, which is how Triton learns of the alignment.
    """
    size = 16 // x.element_size()
    while x.shape[1] % size != 0:
        size //= 2
    return size


@triton.jit
def tile_place(blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Image, first row, first column and channels of a program of a grid (tiles in x, tiles in y, images * blocks).

    Three axes and not one, because the first load waits for each division.
    """
    image = (tl.program_id(2) // blocks).to(tl.int64)
    channel = tl.program_id(2) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return image, tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS, channel


@triton.jit
def elements(map, y, height, first, column, width, channel, channels):
    """Pointers to the pixels (y, first + column) of a channels-last image, and which of their elements exist.

    Addresses have 64 bits up to the first column and 32, which take fewer registers, from there on.
    """
    corner = map + (y.to(tl.int64) * width + first) * channels
    x = first + column
    valid = ((x >= 0) & (x < width))[:, None] & (channel < channels)[None, :] & (y >= 0) & (y < height)
    return corner + (column[:, None] * channels + channel[None, :]), valid


@triton.jit
def load_ends(map, row, height, first, column, width, channel, channels, FACTOR: tl.constexpr):
    """The ends of the cells from column `first` on in one row of pixels; of cells beyond the border, of the last."""
    row = tl.minimum(tl.maximum(row, 0), height - 1)
    corner = map + (row.to(tl.int64) * width + first) * channels
    inside = (channel < channels)[None, :]
    left = tl.minimum(tl.maximum(first + column, 0), width - 1) - first
    ends = (tl.load(corner + (left[:, None] * channels + channel[None, :]), inside, 0.0),)
    if FACTOR > 1:
        right = tl.minimum(first + column + 1, width - 1) - first
        ends += (tl.load(corner + (right[:, None] * channels + channel[None, :]), inside, 0.0),)
    return ends


@triton.jit
def between(low, high, phase, FACTOR: tl.constexpr):
    """The output of a cell at a phase, from its ends."""
    if FACTOR == 1:
        return low
    weight = (2 * (FACTOR // 2 + phase) + 1 - FACTOR) / (2 * FACTOR)
    return (1.0 - weight) * low + weight * high


@triton.jit
def low_weight(cell, size, phase, FACTOR: tl.constexpr):
    """With what weight an output of a cell reads the cell's low end."""
    weight = (2 * (FACTOR // 2 + phase) + 1 - FACTOR) / (2 * FACTOR)
    return tl.where(cell + 1 < size, 1.0 - weight, 1.0)


@triton.jit
def high_weight(cell, phase, FACTOR: tl.constexpr):
    """With what weight an output of a cell reads the cell's high end."""
    weight = (2 * (FACTOR // 2 + phase) + 1 - FACTOR) / (2 * FACTOR)
    return tl.where(cell >= 0, weight, 1.0)
