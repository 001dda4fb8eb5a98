"""3x3 convolution as an implicit matrix product whose epilogue yields the statistics of the GroupNorm behind it.

A program makes a tile of the output: BLOCK_M consecutive pixels of one image, in raster order, times BLOCK_N channels.
It sums over 9 taps times the input's channels; a tap is the input's tile moved by a constant number of pixels, so that
its addresses are those of the tile plus one scalar, and padding is a mask.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.kernels import conv_choice
from panfpn_fast.kernels._launch import (
    channels_last,
    empty_channels_last,
    next_power_of_2,
    triton_op,
    wrap_triton,
)
from panfpn_fast.kernels.group_norm_statistics import combine_moments, largest_unit, tile_moments

_BLOCK_K_BYTES = 128
"""Input channels of one step, in bytes: a cache line, which is also the widest swizzle of shared memory."""

_TRACED_PIXELS = 1 << 14
"""What a size counts as that torch.compile keeps open."""


@dataclass(frozen=True)
class Configuration:
    """How the kernel is cut: a tile's pixels and channels, warps, and steps of the sum under way at once."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """What the choice between implementations calls it."""
        return f"{self.block_m}x{self.block_n}-{self.warps}-{self.stages}"

    @property
    def part(self) -> int:
        """Pixels of a tile whose statistics are found at once: as many as make 64 values for each thread."""
        return min(self.block_m, 64 * 32 * self.warps // self.block_n)

    def count_tiles(self, pixels: int, out_channels: int) -> int:
        """Tiles of an output of so many pixels."""
        return triton.cdiv(pixels, self.block_m) * triton.cdiv(out_channels, self.block_n)


# From the largest tile to the smallest. A large tile reads less from the L2 cache for each product (256 x 128 in half
# precision: 85 FLOP a byte, 128 x 128: 64); small ones occupy the whole GPU where the map is small. On Hopper two
# programs with 4 warps and a tile of 128 x 128 share a multiprocessor: one's epilogue hides behind the other's sum.
_LARGE = (  # compute capability 9 and 10: wgmma and tcgen05, 227 KB of shared memory
    Configuration(128, 256, 8, 3),
    Configuration(256, 128, 8, 3),
    Configuration(128, 128, 4, 3),
    Configuration(64, 128, 4, 4),
    Configuration(128, 64, 4, 4),
    Configuration(64, 64, 4, 4),
)
_LARGE_TF32 = (  # where a thread of the others would spill: tensor memory comes in rows, each of them in one thread
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
class _Gpu:
    """What of a GPU matters here; by default, where none is there to ask (a traced call), an H100's or H200's."""

    name: str | None = None
    major: int = 9
    multiprocessors: int = 132


@functools.lru_cache
def _gpu(index: int | None) -> _Gpu:
    if torch.cuda.device_count() == 0:
        return _Gpu()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return _Gpu(properties.name, properties.major, properties.multi_processor_count)


def configurations(precision: str, major: int, out_channels: int) -> tuple[Configuration, ...]:
    """The configurations for a precision, a compute capability and a number of channels, largest tile first."""
    if precision == "float32":
        return _FLOAT32
    tiles = {9: _LARGE, 10: _LARGE_TF32 if precision == "tf32" else _LARGE}.get(major, _SMALL)
    widest = 64 if out_channels <= 64 else 128 if out_channels <= 128 else 256
    narrowest = min(widest, 128)
    return tuple(t for t in tiles if narrowest <= t.block_n <= widest or t.block_m == t.block_n == 64)


def rank(problem: conv_choice.Problem, gpu: _Gpu) -> tuple[str, ...]:
    """Implementations worth measuring, the one to take without a measurement first.

    On tensor cores that is ours, as it saves a pass over the result, if both numbers of channels are multiples of 16;
    else, and in float32 without tf32, cuDNN's. Of our configurations it is the largest tile that occupies at least
    three quarters of the multiprocessors; the next larger and smaller are worth measuring too.
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
    # As torch's own convolutions; `allow_tf32` sets this too, but cannot be read once the two have been mixed.
    allowed = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if allowed == "tf32" else "float32"


@triton.jit(do_not_specialize=["height", "width", "tiles", "column_tiles", "parts"])
def _conv_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    means_ptr,
    squares_ptr,
    height,
    width,
    out_channels,
    tiles,
    column_tiles,
    parts,
    IN_CHANNELS: tl.constexpr,
    PART: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The tiles of the same pixels follow each other, so that their input is read from memory once. What is 1 may be a
    # constant, without methods: scalars are converted by tl.cast.
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

    # Bit 3 * dy + dx of a pixel: whether its neighbour at (row + dy - 1, col + dx - 1) is in the image.
    bits = (col > 0).to(tl.int32) + 2 + tl.where(col < width - 1, 4, 0)
    taps = tl.where(row > 0, bits, 0) + (bits << 3) + tl.where(row < height - 1, bits << 6, 0)
    taps = tl.where(inside, taps, 0)

    # Addresses are 64 bits wide up to the tile, and 32 bits, which take fewer registers, within it.
    channel = tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_N)
    first_column = column_tile * BLOCK_N
    columns = out_channels - first_column
    x_ptr += (image * area + start) * IN_CHANNELS
    x_tile = pixel[:, None] * IN_CHANNELS + channel[None, :]
    w_ptr += tl.cast(first_column, tl.int64) * (9 * IN_CHANNELS)
    w_row = tl.minimum(column, columns - 1)  # of columns that are not there nothing is stored
    w_tile = w_row[:, None] * (9 * IN_CHANNELS) + channel[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # The taps of a block of channels follow each other: neighbouring ones read nearly the same cache lines, which the
    # modifier .ca keeps in the L1 cache.
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

    # The statistics are those of the values as rounded and stored, which is what will be normalised. They are read
    # back from the cache because a load spreads them over the threads in runs along the channels: most of a column's
    # sum then stays within a thread, while in the layout of the product nearly all of it would cross threads. And
    # they are read part by part, since the whole tile takes more registers than there are.
    tl.debug_barrier()
    for part in range(tile * (BLOCK_M // PART), tl.minimum((tile + 1) * (BLOCK_M // PART), parts)):
        tile_moments(
            y_ptr,
            means_ptr,
            squares_ptr,
            image,
            part,
            column_tile,
            area,
            out_channels,
            parts,
            PART,
            BLOCK_N,
            UNIT,
        )


def _triton_implementation(
    name: str, x: Tensor, conv_weight: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tile = _CONFIGURATIONS[name]
    x, conv_weight = channels_last(x), channels_last(conv_weight)
    batch, _, height, width = x.shape
    out_channels, in_channels = (int(size) for size in conv_weight.shape[:2])
    unit = min(largest_unit(out_channels // num_groups), tile.block_n)
    tiles = triton.cdiv(height * width, tile.block_m)
    parts = triton.cdiv(height * width, tile.part)
    column_tiles = triton.cdiv(out_channels, tile.block_n)
    y = empty_channels_last((batch, out_channels, height, width), x)
    if y.numel() == 0:
        mean, rstd = torch.ops.panfpn_fast_triton.group_norm_statistics(y, num_groups, eps)
        return y, mean, rstd
    means = torch.empty((batch, parts, out_channels // unit), dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    wrap_triton(_conv_kernel)[(batch * tiles * column_tiles,)](
        x,
        conv_weight,
        y,
        means,
        squares,
        height,
        width,
        out_channels,
        tiles,
        column_tiles,
        parts,
        IN_CHANNELS=in_channels,
        PART=tile.part,
        UNIT=unit,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=min(_BLOCK_K_BYTES // x.element_size(), max(next_power_of_2(in_channels), 16)),
        PRECISION="tf32" if _precision(x.dtype) == "tf32" else "ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    mean, rstd = combine_moments(means, squares, num_groups, height * width, tile.part, unit, eps)
    return y, mean, rstd


def run(
    name: str, x: Tensor, conv_weight: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the named implementation: a configuration of ours, or cuDNN's convolution and a pass over its result."""
    if name != conv_choice.CUDNN:
        return _triton_implementation(name, x, conv_weight, num_groups, eps)
    y = torch.ops.aten.convolution(
        channels_last(x), channels_last(conv_weight), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    )
    y = channels_last(y)
    mean, rstd = torch.ops.panfpn_fast_triton.group_norm_statistics(y, num_groups, eps)
    return y, mean, rstd


def _problem(x: Tensor, conv_weight: Tensor) -> tuple[conv_choice.Problem, tuple[str, ...]]:
    """What is to be computed, and the implementations for it."""
    batch, in_channels, height, width = x.shape
    pixels = batch * height * width
    gpu = _gpu(x.device.index)
    problem = conv_choice.Problem(
        gpu=gpu.name,
        precision=_precision(x.dtype),
        pixels=conv_choice.size_class(pixels) if isinstance(pixels, int) else None,
        in_channels=int(in_channels),
        out_channels=int(conv_weight.shape[0]),
    )
    return problem, rank(problem, gpu)


def _may_measure(x: Tensor) -> bool:
    # Subclasses are what a traced call sees. Where runs should repeat, another process might measure otherwise.
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.is_cuda
        and not torch.cuda.is_current_stream_capturing()
        and not torch.are_deterministic_algorithms_enabled()
    )


def measure(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[conv_choice.Problem, dict[str, float]]:
    """Measures all implementations for N, H, W, C_in, C_out on random values, in milliseconds."""
    batch, height, width, in_channels, out_channels = shape
    x = channels_last(torch.randn(batch, in_channels, height, width, device=device).to(dtype))
    conv_weight = channels_last(torch.randn(out_channels, in_channels, 3, 3, device=device).to(dtype))
    problem, names = _problem(x, conv_weight)
    groups = math.gcd(out_channels, 32)
    calls = [functools.partial(run, name, x, conv_weight, groups, 1e-5) for name in names]
    with torch.cuda.device(device), torch.no_grad():
        return problem, dict(zip(names, conv_choice.time_on_gpu(calls), strict=True))


def conv3x3_statistics(
    x: Tensor, conv_weight: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The host function of panfpn_fast_triton::conv3x3_statistics; see panfpn_fast.ops._conv_statistics."""
    torch._check(conv_weight.shape[1] == x.shape[1], lambda: "conv_weight is for another number of channels")
    torch._check(conv_weight.shape[2:] == (3, 3), lambda: "conv_weight is not of a 3x3 convolution")
    torch._check(conv_weight.dtype == x.dtype, lambda: "conv_weight has another dtype than x")
    problem, names = _problem(x, conv_weight)
    run_named = functools.partial(run, x=x, conv_weight=conv_weight, num_groups=num_groups, eps=eps)
    name = conv_choice.choose(problem, names, run_named if _may_measure(x) else None)
    return run(name, x, conv_weight, num_groups, eps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, conv_weight = ctx.saved_tensors
    needed = [*ctx.needs_input_grad[:2], False]
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, x, conv_weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needed
    )
    return x_grad, weight_grad, None, None


triton_op(conv3x3_statistics).register_autograd(_backward, setup_context=_setup_context)
