"""3x3 convolution as an implicit matrix product whose epilogue computes the statistics of the following GroupNorm.

A program computes a tile of the output: BLOCK_M consecutive pixels of one image, in raster order, times BLOCK_N
channels. It sums over 9 taps times the input's channels. The input of a tap is the tile's own input moved by a constant
number of pixels. So its addresses are the tile's addresses plus one scalar, and padding is a mask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton import _conv_choice as conv_choice
from panfpn_fast.ops.triton._counters import counters, is_last
from panfpn_fast.ops.triton._launch import cdiv, channels_last, empty_channels_last, launch, next_power_of_2
from panfpn_fast.ops.triton.group_norm_statistics import (
    combination,
    combine_moments,
    group_norm_statistics,
    largest_unit,
    merged,
    store_moments,
    tile_moments,
)

_BLOCK_K_BYTES = 128
"""Size of the input channels of one step: a cache line, which is also the widest swizzle of shared memory."""

_TRACED_PIXELS = 1 << 14
"""Assumed number of pixels if torch.compile keeps the size symbolic."""


@dataclass(frozen=True)
class Configuration:
    """Configuration of the kernel: pixels and channels of a tile, warps, and steps of the sum in flight at once."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Its name among the implementations to choose from."""
        return f"{self.block_m}x{self.block_n}-{self.warps}-{self.stages}"

    @property
    def part(self) -> int:
        """Number of pixels whose statistics are computed at once: so many that each thread has 64 values."""
        return min(self.block_m, 64 * 32 * self.warps // self.block_n)

    def count_tiles(self, pixels: int, out_channels: int) -> int:
        """Returns the number of tiles of an output."""
        return cdiv(pixels, self.block_m) * cdiv(out_channels, self.block_n)


# From the largest tile to the smallest. A large tile reads less from the L2 cache per product (in half precision 85
# FLOP per byte with 256 x 128, 64 with 128 x 128). Small tiles occupy the whole GPU even if the map is small. Two
# programs with 4 warps and a tile of 128 x 128 share a multiprocessor on Hopper: the sum of one hides the epilogue of
# the other.
_LARGE = (  # compute capability 9 and 10: wgmma and tcgen05, 227 KB of shared memory
    Configuration(128, 256, 8, 3),
    Configuration(256, 128, 8, 3),
    Configuration(128, 128, 4, 3),
    Configuration(64, 128, 4, 4),
    Configuration(128, 64, 4, 4),
    Configuration(64, 64, 4, 4),
)
_LARGE_TF32 = (  # with the tiles above threads would spill, because each thread holds whole rows of tensor memory
    Configuration(128, 128, 8, 3),
    Configuration(64, 128, 4, 4),
    Configuration(128, 64, 4, 4),
    Configuration(64, 64, 8, 4),
)
_SMALL = (  # mma, 99 KB of shared memory
    Configuration(128, 128, 8, 4),
    Configuration(64, 128, 4, 4),
    Configuration(128, 64, 4, 4),
    Configuration(64, 64, 4, 4),
)
_FLOAT32 = (Configuration(64, 64, 4, 3),)  # without tensor cores
_CONFIGURATIONS = {c.name: c for c in (*_LARGE, *_LARGE_TF32, *_SMALL, *_FLOAT32)}


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU; the defaults, for a traced call without a GPU, are those of an H100 or H200."""

    name: str | None = None
    major: int = 9
    multiprocessors: int = 132


@functools.lru_cache
def gpu_of(index: int | None) -> Gpu:
    """Returns the properties of the CUDA device with an index; None means the current device."""
    if torch.cuda.device_count() == 0:
        return Gpu()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return Gpu(properties.name, properties.major, properties.multi_processor_count)


def configurations(precision: str, major: int, out_channels: int) -> tuple[Configuration, ...]:
    """Returns the configurations for a precision, compute capability and number of channels, largest tile first."""
    if precision == "float32":
        return _FLOAT32
    tiles = {9: _LARGE, 10: _LARGE_TF32 if precision == "tf32" else _LARGE}.get(major, _SMALL)
    widest = 64 if out_channels <= 64 else 128 if out_channels <= 128 else 256
    narrowest = min(widest, 128)
    return tuple(t for t in tiles if narrowest <= t.block_n <= widest or t.block_m == t.block_n == 64)


def rank(problem: conv_choice.Problem, gpu: Gpu) -> tuple[str, ...]:
    """Returns the implementations worth measuring; the first is the one to take without a measurement.

    On tensor cores the first is ours, which saves a pass over the result, if both numbers of channels are multiples of
    16. Otherwise, and in float32 without tf32, it is cuDNN's. Our configuration is the largest tile that occupies at
    least three quarters of the multiprocessors; the next larger and the next smaller are worth measuring too.
    """
    tensor_cores = problem.precision != "float32"
    if gpu.major < 8 or (tensor_cores and (problem.in_channels % 16 > 0 or problem.out_channels % 16 > 0)):
        return (conv_choice.CUDNN,)
    tiles = configurations(problem.precision, gpu.major, problem.out_channels)
    pixels = _TRACED_PIXELS if problem.pixels is None else problem.pixels
    busy = [t.count_tiles(pixels, problem.out_channels) * 4 >= gpu.multiprocessors * 3 for t in tiles]
    best = busy.index(True) if any(busy) else len(tiles) - 1
    names = [tiles[best].name, *(t.name for t in tiles[max(best - 1, 0) : best + 2] if t is not tiles[best])]
    return (*names, conv_choice.CUDNN) if tensor_cores else (conv_choice.CUDNN, *names)


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    # As set for torch's own convolutions. `allow_tf32` sets this too, but reading it raises an error after both have
    # been used.
    allowed = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if allowed == "tf32" else "float32"


@triton.jit(do_not_specialize=["height", "width", "tiles", "column_tiles"])
def _conv_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    means_ptr,
    squares_ptr,
    mean_ptr,
    rstd_ptr,
    counters_ptr,
    height,
    width,
    out_channels,
    tiles,
    column_tiles,
    num_groups,
    eps,
    IN_CHANNELS: tl.constexpr,
    PART: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
):
    # Programs with the same pixels are consecutive, so that their input is read from memory once.
    program = tl.program_id(0)
    column_tile = program % column_tiles
    tile = program // column_tiles % tiles
    image = tl.cast(program // column_tiles // tiles, tl.int64)

    area = tl.cast(height, tl.int64) * width
    start = tl.cast(tile, tl.int64) * BLOCK_M
    pixel = tl.arange(0, BLOCK_M)
    inside = pixel < area - start
    unwrapped = tl.cast(start % width, tl.int32) + pixel
    row = tl.cast(start // width, tl.int32) + unwrapped // width
    col = unwrapped % width

    # Bit 3 * dy + dx of a pixel: whether its neighbor at (row + dy - 1, col + dx - 1) is in the image.
    bits = (col > 0).to(tl.int32) + 2 + tl.where(col < width - 1, 4, 0)
    taps = tl.where(row > 0, bits, 0) + (bits << 3) + tl.where(row < height - 1, bits << 6, 0)
    taps = tl.where(inside, taps, 0)

    # Addresses have 64 bits up to the tile. Offsets within it have 32 bits, which take fewer registers.
    channel = tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_N)
    first_column = column_tile * BLOCK_N
    columns = out_channels - first_column
    x_ptr += (image * area + start) * IN_CHANNELS
    x_tile = pixel[:, None] * IN_CHANNELS + channel[None, :]
    w_ptr += tl.cast(first_column, tl.int64) * (9 * IN_CHANNELS)
    w_row = tl.minimum(column, columns - 1)  # nothing is stored for missing columns
    w_tile = w_row[:, None] * (9 * IN_CHANNELS) + channel[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # The taps of a block of channels are consecutive steps: neighboring taps read nearly the same cache lines, which
    # the modifier .ca keeps in the L1 cache. Triton ignores it before 3.9 and reads each tap from the L2 cache.
    for step in range(9 * tl.cdiv(IN_CHANNELS, BLOCK_K)):
        first = step // 9 * BLOCK_K
        tap = step % 9
        x_tap = x_ptr + (((tap // 3 - 1) * tl.cast(width, tl.int64) + (tap % 3 - 1)) * IN_CHANNELS + first)
        w_tap = w_ptr + (tap * IN_CHANNELS + first)
        x_mask = ((taps >> tap) & 1)[:, None] != 0
        if IN_CHANNELS % BLOCK_K == 0:
            x = tl.load(x_tap + x_tile, mask=x_mask, other=0.0, cache_modifier=".ca")
            w = tl.load(w_tap + w_tile)
        else:
            w_mask = (channel < IN_CHANNELS - first)[None, :]
            x = tl.load(x_tap + x_tile, mask=x_mask & w_mask, other=0.0, cache_modifier=".ca")
            w = tl.load(w_tap + w_tile, mask=w_mask, other=0.0)
        sums = tl.dot(x, tl.trans(w), sums, input_precision=PRECISION)

    y_corner = y_ptr + (image * area + start) * out_channels + first_column
    y_tile = pixel[:, None] * out_channels + column[None, :]
    y = sums.to(y_ptr.dtype.element_ty)
    tl.store(y_corner + y_tile, y, mask=inside[:, None] & (column < columns)[None, :])

    # The statistics are of the rounded, stored values, because these will be normalized. They are read back from the
    # cache: a load distributes them over the threads in runs along the channels, so most of a column's sum stays within
    # a thread. In the layout of the product nearly all of it would cross threads. The tile is read in parts because it
    # does not fit into the registers as a whole.
    tl.debug_barrier()
    count = 0.0
    mean = tl.zeros([BLOCK_N // UNIT], tl.float32)
    square = tl.zeros([BLOCK_N // UNIT], tl.float32)
    PARTS: tl.constexpr = BLOCK_M // PART
    for part in range(tile * PARTS, tl.minimum((tile + 1) * PARTS, tl.cdiv(area, PART)).to(tl.int32)):
        of_part = tile_moments(y_ptr, image, part, column_tile, area, out_channels, PART, BLOCK_N, UNIT)
        count, mean, square = merged(count, mean, square, of_part[0], of_part[1], of_part[2], UNIT)
    units = out_channels // UNIT
    store_moments(mean, square, means_ptr, squares_ptr, image, tile, tiles, column_tile, units, BLOCK_N, UNIT)
    if is_last(counters_ptr + image, tiles * column_tiles):
        combine_moments(
            means_ptr, squares_ptr, mean_ptr, rstd_ptr, image, area, tiles, units, num_groups, eps,
            BLOCK_M, UNIT, TILES, UNITS, GROUPS, GROUP_UNITS,
        )  # fmt: skip


def _triton_implementation(
    name: str, x: Tensor, conv_weight: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tile = _CONFIGURATIONS[name]
    x, conv_weight = channels_last(x), channels_last(conv_weight)
    batch, _, height, width = x.shape
    out_channels, in_channels = (int(size) for size in conv_weight.shape[:2])
    unit = min(largest_unit(out_channels // num_groups), tile.block_n)
    tiles = cdiv(height * width, tile.block_m)
    column_tiles = cdiv(out_channels, tile.block_n)
    y = empty_channels_last((batch, out_channels, height, width), x)
    if y.numel() == 0:
        return y, *group_norm_statistics(y, num_groups, eps)
    units = out_channels // unit
    means = torch.empty((batch, tiles, units), dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    launch(
        _conv_kernel,
        (batch * tiles * column_tiles,),
        x,
        conv_weight,
        y,
        means,
        squares,
        mean,
        rstd,
        counters(x, batch),
        height,
        width,
        out_channels,
        tiles,
        column_tiles,
        num_groups,
        eps,
        IN_CHANNELS=in_channels,
        PART=tile.part,
        UNIT=unit,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=min(_BLOCK_K_BYTES // x.element_size(), max(next_power_of_2(in_channels), 16)),
        PRECISION="tf32" if _precision(x.dtype) == "tf32" else "ieee",
        **combination(units, num_groups, tile.warps),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y, mean, rstd


def run(
    name: str, x: Tensor, conv_weight: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the named implementation: one of our configurations, or cuDNN's convolution and a pass over its result."""
    if name != conv_choice.CUDNN:
        return _triton_implementation(name, x, conv_weight, num_groups, eps)
    y = torch.ops.aten.convolution(
        channels_last(x), channels_last(conv_weight), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    )
    y = channels_last(y)
    return y, *group_norm_statistics(y, num_groups, eps)


def _problem(x: Tensor, conv_weight: Tensor) -> tuple[conv_choice.Problem, tuple[str, ...]]:
    """Returns the convolution as a problem, and the implementations that can compute it."""
    batch, in_channels, height, width = x.shape
    pixels = batch * height * width
    gpu = gpu_of(x.device.index)
    problem = conv_choice.Problem(
        gpu=gpu.name,
        precision=_precision(x.dtype),
        pixels=conv_choice.size_class(pixels) if isinstance(pixels, int) else None,
        in_channels=int(in_channels),
        out_channels=int(conv_weight.shape[0]),
    )
    return problem, rank(problem, gpu)


def settings(x: Tensor, *_: Any) -> tuple[Any, ...]:
    """Returns the settings that decide which implementation runs, and in which precision."""
    # Autocast would apply to cuDNN's convolution inside of the op.
    return _precision(x.dtype), torch.is_autocast_enabled("cuda"), conv_choice.generation


def conv3x3_statistics(
    x: Tensor, conv_weight: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements the op of csrc/library.cpp; y is channels-last. See `panfpn_fast.ops._conv_statistics`."""
    torch._check(
        conv_weight.shape[1] == x.shape[1],
        lambda: f"weight: expected {x.shape[1]} input channels like the input, got {conv_weight.shape[1]}",
    )
    torch._check(
        conv_weight.shape[2:] == (3, 3),
        lambda: f"weight: expected shape [C_out, C_in, 3, 3], got {list(conv_weight.shape)}",
    )
    torch._check(
        conv_weight.dtype == x.dtype,
        lambda: f"weight: expected the input's dtype {x.dtype}, got {conv_weight.dtype}",
    )
    problem, names = _problem(x, conv_weight)
    name = conv_choice.choose(problem, names)
    return run(name, x, conv_weight, num_groups, eps)
