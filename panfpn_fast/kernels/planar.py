"""Logits with the classes apart: [N, C, H, W], contiguous.

What loops over the classes of a pixel has pixels in its threads. It reads neighbours of one class at once only where
these lie side by side, which in channels-last they do not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.kernels._launch import wrap_triton

_PIXELS, _CHANNELS = 64, 64


@triton.jit
def _planar_kernel(source, target, channels, pixels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Transposes [pixels, channels] to [channels, pixels], one tile of an image in each program."""
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
    """The feature map as NCHW: itself where it is, else a copy."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    images, channels, height, width = x.shape
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (images * triton.cdiv(channels, _CHANNELS) * triton.cdiv(height * width, _PIXELS),)
    wrap_triton(_planar_kernel)[grid](
        x, result, channels, height * width, PIXELS=_PIXELS, CHANNELS=_CHANNELS, num_warps=4
    )
    return result


@triton.jit
def _sum_to_channels_last_kernel(
    planes, second, target, channels, pixels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Adds [channels, pixels] and that `second` numbers further on, and transposes to [pixels, channels]."""
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
    """The sum of two planar feature maps, [2, N, C, H, W], channels-last."""
    _, images, channels, height, width = planes.shape
    shape = (images, channels, height, width)
    result = torch.empty(shape, dtype=dtype, device=planes.device, memory_format=torch.channels_last)
    grid = (images * triton.cdiv(channels, _CHANNELS) * triton.cdiv(height * width, _PIXELS),)
    wrap_triton(_sum_to_channels_last_kernel)[grid](
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
