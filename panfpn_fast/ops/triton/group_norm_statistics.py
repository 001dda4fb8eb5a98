"""Statistics of a GroupNorm over a channels-last map: moments of tiles, then their combination in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton._launch import cdiv, channels_last, launch, next_power_of_2
from panfpn_fast.ops.triton._upsampling import vector_size

# Number of values, pixels x channels, of a tile: 64 per thread.
_TILE = 16384
_MAX_CHANNELS = 128
_WARPS = 8


@triton.jit
def over_units(values, CHANNELS: tl.constexpr, UNIT: tl.constexpr):
    """Sums values [CHANNELS] over each unit of UNIT neighboring channels; each channel gets the sum of its unit."""
    sums = tl.sum(tl.reshape(values, (CHANNELS // UNIT, UNIT)), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], (CHANNELS // UNIT, UNIT)), (CHANNELS,))


@triton.jit
def tile_moments(
    x,
    means,
    squares,
    image,
    tile,
    block,
    pixels,
    channels,
    tiles,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Computes mean and sum of squared deviations of `UNIT` neighboring channels in a tile, [N, tiles, C / UNIT]."""
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    valid = (pixel < pixels)[:, None] & inside[None, :]
    x += (image * pixels + tile * PIXELS) * channels
    offset = tl.arange(0, PIXELS)[:, None] * channels + channel[None, :]
    # Sums are of differences from one of the unit's values. These are not much larger than deviations from the mean.
    pivot = tl.load(x + channel // UNIT * UNIT, inside, 0.0).to(tl.float32)
    values = tl.load(x + offset, valid, 0.0).to(tl.float32)
    values = tl.where(valid, values - pivot[None, :], 0.0)

    count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32) * UNIT
    shift = over_units(tl.sum(values, 0), CHANNELS, UNIT) / count
    rest = tl.where(valid, values - shift[None, :], 0.0)
    square = tl.sum(tl.reshape(tl.sum(rest * rest, 0), (CHANNELS // UNIT, UNIT)), 1)
    mean = tl.sum(tl.reshape((pivot + shift), (CHANNELS // UNIT, UNIT)), 1) / UNIT

    unit = block * (CHANNELS // UNIT) + tl.arange(0, CHANNELS // UNIT)
    units = channels // UNIT
    index = (image * tiles + tile) * units + unit
    tl.store(means + index, mean, unit < units)
    tl.store(squares + index, square, unit < units)


@triton.jit(do_not_specialize=["pixels"])
def _tile_moments_kernel(
    x,
    means,
    squares,
    pixels,
    vectors,
    VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0)
    block = tl.program_id(1)
    tiles = tl.num_programs(0)
    channels = vectors * VECTOR
    tile_moments(x, means, squares, image, tile, block, pixels, channels, tiles, PIXELS, CHANNELS, UNIT)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def _combine_kernel(
    means,
    squares,
    mean,
    rstd,
    pixels,
    tiles,
    num_groups,
    units,
    eps,
    PIXELS: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Computes the statistics of one group of an image from the moments of its tiles, `units` of them in each tile."""
    image = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    first = image * tiles * num_groups * units + group * units
    parts = tiles * units
    # Means are averaged as differences from one of them, so the average has no larger rounding error than a mean.
    pivot = tl.load(means + first)
    total = tl.zeros((PARTS,), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        tile = part // units
        index = first + tile.to(tl.int64) * num_groups * units + part % units
        count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32)
        total += tl.where(part < parts, count * (tl.load(means + index, part < parts, 0.0) - pivot), 0.0)
    shift = tl.sum(total, 0) / (tl.cast(pixels, tl.float32) * units)
    total = tl.zeros((PARTS,), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        tile = part // units
        index = first + tile.to(tl.int64) * num_groups * units + part % units
        count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32) * UNIT
        rest = tl.load(means + index, part < parts, 0.0) - pivot - shift
        square = tl.load(squares + index, part < parts, 0.0)
        total += tl.where(part < parts, square + count * rest * rest, 0.0)
    variance = tl.sum(total, 0) / (tl.cast(pixels, tl.float32) * units * UNIT)
    tl.store(mean + tl.program_id(0), pivot + shift)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt_rn(variance + eps))


def combine_moments(
    means: Tensor, squares: Tensor, num_groups: int, pixels: int, tile: int, unit: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Combines the moments of the tiles of each image to the statistics of its groups.

    Args:
        means: Means of `unit` neighboring channels in a tile, float32 [N, tiles, C / unit].
        squares: Sums of the squared deviations from these means, float32 [N, tiles, C / unit].
        num_groups: Number of groups of the C channels.
        pixels: Number of pixels of an image.
        tile: Number of pixels of a tile; the last tile of an image may have fewer.
        unit: Divisor of the number of channels of a group.
        eps: Added to the variance.

    Returns:
        Mean and reciprocal standard deviation, float32 [N, num_groups].
    """
    batch, tiles, units = means.shape
    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=means.device)
    rstd = torch.empty_like(mean)
    launch(
        _combine_kernel,
        (batch * num_groups,),
        means,
        squares,
        mean,
        rstd,
        pixels,
        tiles,
        num_groups,
        units // num_groups,
        eps,
        PIXELS=tile,
        UNIT=unit,
        PARTS=1024,
        num_warps=4,
    )
    return mean, rstd


def largest_unit(channels: int) -> int:
    """Returns the largest power of two that divides the number of channels of a group and of a tile."""
    unit = 1
    while unit < _MAX_CHANNELS and channels % (2 * unit) == 0:
        unit *= 2
    return unit


def group_norm_statistics(input: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Implements the op of csrc/library.cpp with two launches.

    Each tile is read once, and its squares are of deviations from its own mean.
    """
    batch, channels, height, width = input.shape
    pixels = height * width
    if input.numel() == 0:
        mean = torch.zeros((batch, num_groups), dtype=torch.float32, device=input.device)
        return mean, torch.full_like(mean, eps**-0.5)
    x = channels_last(input)
    block = min(next_power_of_2(channels), _MAX_CHANNELS)
    tile = _TILE // block
    unit = largest_unit(channels // num_groups)
    tiles = cdiv(pixels, tile)
    means = torch.empty((batch, tiles, channels // unit), dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    launch(
        _tile_moments_kernel,
        (tiles, cdiv(channels, block), batch),
        x,
        means,
        squares,
        pixels,
        channels // vector_size(x),
        VECTOR=vector_size(x),
        PIXELS=tile,
        CHANNELS=block,
        UNIT=unit,
        num_warps=_WARPS,
    )
    return combine_moments(means, squares, num_groups, pixels, tile, unit, eps)
