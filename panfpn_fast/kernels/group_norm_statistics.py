"""GroupNorm's statistics of a channels-last map: moments of tiles, then their combination in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.kernels._cells import vector_size
from panfpn_fast.kernels._launch import channels_last, next_power_of_2, triton_op, wrap_triton

# Pixels x channels of a tile: 64 values per thread.
_TILE = 16384
_MAX_CHANNELS = 128
_WARPS = 8


@triton.jit
def over_units(values, CHANNELS: tl.constexpr, UNIT: tl.constexpr):
    """Each channel's value summed over the channels of its unit."""
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
    """Mean and sum of squared deviations of `UNIT` neighbouring channels in a tile of pixels, [N, tiles, C / UNIT]."""
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    valid = (pixel < pixels)[:, None] & inside[None, :]
    x += (image * pixels + tile * PIXELS) * channels
    offset = tl.arange(0, PIXELS)[:, None] * channels + channel[None, :]
    # One of a unit's values, so that what is summed is not much larger than the deviations from the mean.
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
    place = (image * tiles + tile) * units + unit
    tl.store(means + place, mean, unit < units)
    tl.store(squares + place, square, unit < units)


@triton.jit
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


@triton.jit
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
    """Statistics of one group of an image from the moments of its tiles, with `units` of them in each tile."""
    image = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    first = image * tiles * num_groups * units + group * units
    parts = tiles * units
    # Means are averaged as differences from one of them, which leaves no more rounding than a mean has itself.
    pivot = tl.load(means + first)
    total = tl.zeros((PARTS,), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        tile = part // units
        place = first + tile.to(tl.int64) * num_groups * units + part % units
        count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32)
        total += tl.where(part < parts, count * (tl.load(means + place, part < parts, 0.0) - pivot), 0.0)
    shift = tl.sum(total, 0) / (tl.cast(pixels, tl.float32) * units)
    total = tl.zeros((PARTS,), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        tile = part // units
        place = first + tile.to(tl.int64) * num_groups * units + part % units
        count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32) * UNIT
        rest = tl.load(means + place, part < parts, 0.0) - pivot - shift
        square = tl.load(squares + place, part < parts, 0.0)
        total += tl.where(part < parts, square + count * rest * rest, 0.0)
    variance = tl.sum(total, 0) / (tl.cast(pixels, tl.float32) * units * UNIT)
    tl.store(mean + tl.program_id(0), pivot + shift)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt_rn(variance + eps))


def combine_moments(
    means: Tensor, squares: Tensor, num_groups: int, pixels: int, tile: int, unit: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Combines the moments of tiles of each image into the statistics of its groups.

    Args:
        means: [N, tiles, C / unit] in float32: the mean of `unit` neighbouring channels in a tile.
        squares: The same of their squared deviations from it, summed.
        num_groups: Of the C channels.
        pixels: Of an image.
        tile: Pixels of a tile; the last of an image may have fewer.
        unit: Divides the channels of a group.
        eps: Added to the variance.

    Returns:
        Mean and reciprocal standard deviation, [N, num_groups] in float32.
    """
    batch, tiles, units = means.shape
    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=means.device)
    rstd = torch.empty_like(mean)
    wrap_triton(_combine_kernel)[(batch * num_groups,)](
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
    """The largest power of two, within a tile, that divides the channels of a group."""
    unit = 1
    while unit < _MAX_CHANNELS and channels % (2 * unit) == 0:
        unit *= 2
    return unit


def group_norm_statistics(input: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """See csrc/library.cpp. Two launches: each tile is read once, and its sums are of deviations from its mean."""
    batch, channels, height, width = input.shape
    pixels = height * width
    if input.numel() == 0:
        mean = torch.zeros((batch, num_groups), dtype=torch.float32, device=input.device)
        return mean, torch.full_like(mean, eps**-0.5)
    x = channels_last(input)
    block = min(next_power_of_2(channels), _MAX_CHANNELS)
    tile = min(next_power_of_2(pixels), _TILE // block)
    unit = largest_unit(channels // num_groups)
    tiles = triton.cdiv(pixels, tile)
    means = torch.empty((batch, tiles, channels // unit), dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    wrap_triton(_tile_moments_kernel)[(tiles, triton.cdiv(channels, block), batch)](
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


triton_op(group_norm_statistics)
