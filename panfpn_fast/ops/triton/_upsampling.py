"""Bilinear upsampling by a whole factor with align_corners=False, and tiles of channels-last maps.

Along one axis, the FACTOR outputs between the centers of two neighboring pixels form a cell. A cell has the index of
its first pixel; cell -1 is before pixel 0. All outputs of a cell interpolate between the same two pixels, its ends. An
end outside of the image is replaced by the other end. The phase of an output is its position in its cell, 0 to
FACTOR - 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def weights(phase, FACTOR: tl.constexpr):
    """Weights of the low and the high end of a cell in its output at a phase."""
    high = (2 * (FACTOR // 2 + phase) + 1 - FACTOR) / (2 * FACTOR)
    return 1.0 - high, high


@triton.jit
def between(low, high, phase, FACTOR: tl.constexpr):
    """Output of a cell at a phase, interpolated between its ends."""
    if FACTOR == 1:
        return low
    low_weight, high_weight = weights(phase, FACTOR)
    return low_weight * low + high_weight * high


@triton.jit
def low_weight(cell, size, phase, FACTOR: tl.constexpr):
    """Weight of the low end of a cell in its output at a phase; 1 if there is no high end."""
    weight, _high_weight = weights(phase, FACTOR)
    return tl.where(cell + 1 < size, weight, 1.0)


@triton.jit
def high_weight(cell, phase, FACTOR: tl.constexpr):
    """Weight of the high end of a cell in its output at a phase; 1 if there is no low end."""
    _low_weight, weight = weights(phase, FACTOR)
    return tl.where(cell >= 0, weight, 1.0)


def vector_size(x: Tensor) -> int:
    """Number of channels that a thread may load at once: up to 16 bytes, and a divisor of the number of channels.

    Kernels receive the number of such vectors instead of the number of channels. From it Triton infers the alignment.
    """
    size = 16 // x.element_size()
    while x.shape[1] % size != 0:
        size //= 2
    return size


@triton.jit
def tile_of_program(blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Image, first row, first column and channels of a program of a grid (tiles in x, tiles in y, images * blocks).

    The grid has three axes instead of one because the first load waits for each division.
    """
    image = (tl.program_id(2) // blocks).to(tl.int64)
    channel = tl.program_id(2) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return image, tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS, channel


@triton.jit
def elements(map, y, height, first, column, width, channel, channels):
    """Pointers to the pixels (y, first + column) of a channels-last image, and a mask of the elements that exist.

    Addresses have 64 bits up to the first column. Offsets from there have 32 bits, which take fewer registers.
    """
    corner = map + (y.to(tl.int64) * width + first) * channels
    x = first + column
    valid = ((x >= 0) & (x < width))[:, None] & (channel < channels)[None, :] & (y >= 0) & (y < height)
    return corner + (column[:, None] * channels + channel[None, :]), valid


@triton.jit
def load_ends(map, row, height, first, column, width, channel, channels, FACTOR: tl.constexpr):
    """Loads the ends of the cells from column `first` on in one row; clamps cells outside of the image."""
    row = tl.minimum(tl.maximum(row, 0), height - 1)
    corner = map + (row.to(tl.int64) * width + first) * channels
    inside = (channel < channels)[None, :]
    left = tl.minimum(tl.maximum(first + column, 0), width - 1) - first
    ends = (tl.load(corner + (left[:, None] * channels + channel[None, :]), inside, 0.0),)
    if FACTOR > 1:
        right = tl.minimum(first + column + 1, width - 1) - first
        ends += (tl.load(corner + (right[:, None] * channels + channel[None, :]), inside, 0.0),)
    return ends
