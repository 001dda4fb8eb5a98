"""Statistics of a GroupNorm over a channels-last map: moments of tiles, then their combination in a fixed order.

The last program of an image combines the moments of its tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton._counters import counters, is_last
from panfpn_fast.ops.triton._launch import cdiv, channels_last, launch, next_power_of_2
from panfpn_fast.ops.triton._upsampling import vector_size

# Number of values, pixels x channels, of a tile: 64 per thread.
_TILE = 16384
_MAX_CHANNELS = 128
_WARPS = 8
# Moments that a thread loads at once when it combines tiles.
_AT_ONCE = 8


@triton.jit
def over_units(values, CHANNELS: tl.constexpr, UNIT: tl.constexpr):
    """Sums values [CHANNELS] over each unit of UNIT neighboring channels; each channel gets the sum of its unit."""
    sums = tl.sum(tl.reshape(values, (CHANNELS // UNIT, UNIT)), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], (CHANNELS // UNIT, UNIT)), (CHANNELS,))


@triton.jit
def tile_moments(
    x,
    image,
    tile,
    block,
    pixels,
    channels,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Returns the moments of a tile for each unit of `UNIT` neighboring channels.

    These are the number of pixels, and the means and the sums of squared deviations from them, [CHANNELS / UNIT].
    """
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

    count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32)
    shift = over_units(tl.sum(values, 0), CHANNELS, UNIT) / (count * UNIT)
    rest = tl.where(valid, values - shift[None, :], 0.0)
    square = tl.sum(tl.reshape(tl.sum(rest * rest, 0), (CHANNELS // UNIT, UNIT)), 1)
    mean = tl.sum(tl.reshape((pivot + shift), (CHANNELS // UNIT, UNIT)), 1) / UNIT
    return count, mean, square


@triton.jit
def merged(count, mean, square, other_count, other_mean, other_square, UNIT: tl.constexpr):
    """Merges the moments of two sets of pixels; the first may be empty."""
    total = count + other_count
    delta = other_mean - mean
    share = other_count / total
    return total, mean + delta * share, square + other_square + delta * delta * (count * share * UNIT)


@triton.jit
def store_moments(
    mean, square, means, squares, image, tile, tiles, block, units, CHANNELS: tl.constexpr, UNIT: tl.constexpr
):
    """Stores the moments of a tile in [N, tiles, units]."""
    unit = block * (CHANNELS // UNIT) + tl.arange(0, CHANNELS // UNIT)
    index = (image * tiles + tile) * units + unit
    tl.store(means + index, mean, unit < units)
    tl.store(squares + index, square, unit < units)


@triton.jit
def combine_moments(
    means,
    squares,
    mean,
    rstd,
    image,
    pixels,
    tiles,
    units,
    num_groups,
    eps,
    PIXELS: tl.constexpr,
    UNIT: tl.constexpr,
    TILES: tl.constexpr,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
):
    """Computes the statistics of the groups of an image from the moments of its tiles, by one program.

    It first combines the tiles of each unit, TILES at a time; the result takes the place of the first tile. Then it
    combines the units of each group.
    """
    means += image * tiles * units
    squares += image * tiles * units
    size = tl.cast(pixels, tl.float32)
    rest_size = (pixels - tl.cast(tiles - 1, tl.int64) * PIXELS).to(tl.float32)  # of the last tile
    for begin in range(0, units, UNITS):
        unit = begin + tl.arange(0, UNITS)
        # Means are added as differences from the mean of the first tiles, which is near the mean of all.
        tile = tl.arange(0, TILES)
        valid = (tile < tiles)[:, None] & (unit < units)[None, :]
        count = tl.where(tile < tiles - 1, PIXELS * 1.0, rest_size)
        first = tl.load(means + (tile[:, None] * units + unit[None, :]), valid, 0.0)
        pivot = tl.sum(count[:, None] * first, 0) / tl.minimum(size, TILES * PIXELS * 1.0)
        total = tl.zeros((TILES, UNITS), tl.float32)
        square = tl.zeros((TILES, UNITS), tl.float32)
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            valid = (tile < tiles)[:, None] & (unit < units)[None, :]
            count = tl.where(tile < tiles - 1, PIXELS * 1.0, rest_size)
            index = tile[:, None] * units + unit[None, :]
            rest = tl.where(valid, tl.load(means + index, valid, 0.0) - pivot[None, :], 0.0)
            product = count[:, None] * rest
            total += product
            square += tl.load(squares + index, valid, 0.0) + product * rest * UNIT
        shift = tl.sum(total, 0) / size
        of_unit = tl.sum(square, 0) - shift * shift * size * UNIT
        tl.debug_barrier()  # the first tile has been loaded
        tl.store(means + unit, pivot + shift, unit < units)
        tl.store(squares + unit, of_unit, unit < units)

    tl.debug_barrier()
    per_group = units // num_groups
    for begin in range(0, num_groups, GROUPS):
        group = begin + tl.arange(0, GROUPS)
        unit = tl.arange(0, GROUP_UNITS)
        valid = (group < num_groups)[:, None] & (unit < per_group)[None, :]
        index = (group * per_group)[:, None] + unit[None, :]
        pivot = tl.load(means + group * per_group, group < num_groups, 0.0)
        rest = tl.where(valid, tl.load(means + index, valid, 0.0) - pivot[:, None], 0.0)
        shift = tl.sum(rest, 1) / per_group
        rest = tl.where(valid, rest - shift[:, None], 0.0)
        square = tl.sum(tl.load(squares + index, valid, 0.0) + rest * rest * (size * UNIT), 1)
        variance = tl.maximum(square / (size * per_group * UNIT), 0.0, propagate_nan=tl.PropagateNan.ALL)
        destination = image * num_groups + group
        tl.store(mean + destination, pivot + shift, group < num_groups)
        tl.store(rstd + destination, 1.0 / tl.sqrt_rn(variance + eps), group < num_groups)


@triton.jit(do_not_specialize=["pixels", "units"])
def _statistics_kernel(
    x,
    means,
    squares,
    mean,
    rstd,
    counters,
    pixels,
    vectors,
    units,
    num_groups,
    eps,
    VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
    TILES: tl.constexpr,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
):
    """Computes the moments of a tile; the last program of an image computes its statistics."""
    image = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0)
    block = tl.program_id(1)
    tiles = tl.num_programs(0)
    _count, of_tile, square = tile_moments(
        x, image, tile, block, pixels, vectors * VECTOR, PIXELS, CHANNELS, UNIT
    )
    store_moments(of_tile, square, means, squares, image, tile, tiles, block, units, CHANNELS, UNIT)
    if is_last(counters + image, tiles * tl.num_programs(1)):
        combine_moments(
            means, squares, mean, rstd, image, pixels, tiles, units, num_groups, eps,
            PIXELS, UNIT, TILES, UNITS, GROUPS, GROUP_UNITS,
        )  # fmt: skip


def combination(units: int, num_groups: int, warps: int) -> dict[str, int]:
    """Returns the compile-time sizes with which a program of so many warps combines moments, see `combine_moments`."""
    block = min(next_power_of_2(units), _MAX_CHANNELS)
    of_group = next_power_of_2(units // num_groups)
    return {
        "TILES": _AT_ONCE * warps * 32 // block,
        "UNITS": block,
        "GROUPS": min(next_power_of_2(num_groups), max(_AT_ONCE * warps * 32 // of_group, 1)),
        "GROUP_UNITS": of_group,
    }


def largest_unit(channels: int) -> int:
    """Returns the largest power of two that divides the number of channels of a group and of a tile."""
    unit = 1
    while unit < _MAX_CHANNELS and channels % (2 * unit) == 0:
        unit *= 2
    return unit


def group_norm_statistics(input: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Implements the op of csrc/library.cpp with one launch.

    Each tile is read once, and its squares are of deviations from its own mean.
    """
    batch, channels, height, width = input.shape
    pixels = height * width
    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=input.device)
    rstd = torch.empty_like(mean)
    if input.numel() == 0:
        return torch.zeros_like(mean), torch.full_like(mean, eps**-0.5)
    x = channels_last(input)
    block = min(next_power_of_2(channels), _MAX_CHANNELS)
    tile = _TILE // block
    unit = largest_unit(channels // num_groups)
    units = channels // unit
    tiles = cdiv(pixels, tile)
    means = torch.empty((batch, tiles, units), dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    launch(
        _statistics_kernel,
        (tiles, cdiv(channels, block), batch),
        x,
        means,
        squares,
        mean,
        rstd,
        counters(x, batch),
        pixels,
        channels // vector_size(x),
        units,
        num_groups,
        eps,
        VECTOR=vector_size(x),
        PIXELS=tile,
        CHANNELS=block,
        UNIT=unit,
        **combination(units, num_groups, _WARPS),
        num_warps=_WARPS,
    )
    return mean, rstd
