"""What the kernels of GroupNorm share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_place(blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Image, first row, columns and channels of a program of a grid (tiles in x, tiles in y, images * blocks).

    Three axes and not one, because the first load waits for each division.
    """
    image = (tl.program_id(2) // blocks).to(tl.int64)
    row = tl.program_id(1) * ROWS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.program_id(2) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return image, row, column, channel


@triton.jit
def scale_and_shift(mean, rstd, weight, bias, image, channel, channels, num_groups):
    """GroupNorm of an image's channels as x * scale + shift: one fused multiply-add."""
    inside = channel < channels
    group = image * num_groups + channel // (channels // num_groups)
    scale = tl.load(weight + channel, inside, 0.0).to(tl.float32) * tl.load(rstd + group, inside, 0.0)
    shift = tl.load(bias + channel, inside, 0.0).to(tl.float32) - tl.load(mean + group, inside, 0.0) * scale
    return scale, shift


@triton.jit
def relu(x):
    """As torch's: NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


def vector_size(x: Tensor) -> int:
    """Channels that a thread may load at once: up to 16 bytes, as far as they divide a pixel's.

    Kernels are given the channels as a number of such vectors, which is how Triton learns of the alignment.
    """
    size = 16 // x.element_size()
    while x.shape[1] % size != 0:
        size //= 2
    return size
