"""Conversion between channels-last maps and planar maps, which are contiguous as [N, C, H, W].

Kernels that loop over the classes of a pixel have neighboring pixels in neighboring threads. These threads read
neighboring addresses only if the map is planar.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton._launch import cdiv, launch

_PIXELS, _CHANNELS = 64, 64


# `pixels` is specialized although it is a size: if it is a multiple of 16, planes are read and written as vectors.
@triton.jit
def _planar_kernel(source, target, channels, pixels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Transposes [pixels, channels] to [channels, pixels]; each program transposes one tile of an image."""
    blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(pixels, PIXELS)
    program = tl.program_id(0)
    first_pixel = program % tiles * PIXELS
    first_channel = program // tiles % blocks * CHANNELS
    image = (program // (blocks * tiles)).to(tl.int64) * pixels * channels
    pixel = tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < pixels - first_pixel) & (channel < channels - first_channel)
    source += image + first_pixel.to(tl.int64) * channels + first_channel
    target += image + first_channel.to(tl.int64) * pixels + first_pixel
    tile = tl.load(source + pixel * channels + channel, inside)
    tl.store(target + channel.to(tl.int64) * pixels + pixel, tile, inside)


def planar(x: Tensor) -> Tensor:
    """Returns the feature map in NCHW order, without a copy if it already has this layout."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    images, channels, height, width = x.shape
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (images * cdiv(channels, _CHANNELS) * cdiv(height * width, _PIXELS),)
    launch(
        _planar_kernel,
        grid,
        x,
        result,
        channels,
        height * width,
        PIXELS=_PIXELS,
        CHANNELS=_CHANNELS,
        num_warps=4,
    )
    return result


@triton.jit
def _sum_to_channels_last_kernel(
    planes, second, target, channels, pixels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Adds two planar maps [channels, pixels], `second` elements apart; transposes the sum to [pixels, channels]."""
    blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(pixels, PIXELS)
    program = tl.program_id(0)
    first_pixel = program % tiles * PIXELS
    first_channel = program // tiles % blocks * CHANNELS
    image = (program // (blocks * tiles)).to(tl.int64) * pixels * channels
    pixel = tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < pixels - first_pixel) & (channel < channels - first_channel)
    planes += image + first_channel.to(tl.int64) * pixels + first_pixel
    source = planes + channel.to(tl.int64) * pixels + pixel
    tile = tl.load(source, inside) + tl.load(source + second, inside)
    target += image + first_pixel.to(tl.int64) * channels + first_channel
    tl.store(target + pixel * channels + channel, tile.to(target.dtype.element_ty), inside)


def sum_to_channels_last(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds two planar feature maps, [2, N, C, H, W], and returns the sum in channels-last order."""
    _, images, channels, height, width = planes.shape
    shape = (images, channels, height, width)
    result = torch.empty(shape, dtype=dtype, device=planes.device, memory_format=torch.channels_last)
    grid = (images * cdiv(channels, _CHANNELS) * cdiv(height * width, _PIXELS),)
    launch(
        _sum_to_channels_last_kernel,
        grid,
        planes,
        result.numel(),
        result,
        channels,
        height * width,
        PIXELS=_PIXELS,
        CHANNELS=_CHANNELS,
        num_warps=4,
    )
    return result
