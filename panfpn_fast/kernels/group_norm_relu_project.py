"""GroupNorm, ReLU and a 1x1 convolution: the activations go from registers to the tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.kernels._group_norm import relu, scale_and_shift, vector_size
from panfpn_fast.kernels._launch import (
    channels_last,
    empty_channels_last,
    next_power_of_2,
    triton_op,
    wrap_triton,
)
from panfpn_fast.ops.conv_gn_relu_project import _backward, _setup_context

_NONE, _SAME, _HALF = range(3)  # size of the residual


@triton.jit
def _half_taps(y, height):
    """Where output y of an upsampling by 2 reads a map of half the height: low, high, and the weight of high."""
    low = (y + 1) // 2 - 1
    weight = tl.where(y % 2 == 0, 0.75, 0.25)
    return tl.maximum(low, 0), tl.minimum(low + 1, height // 2 - 1), weight


@triton.jit
def _load_half(residual, pixel, height, width, output, outputs):
    """The residual of half the size, upsampled to some pixels; for those beyond the last something without meaning."""
    pixel = tl.minimum(pixel, height * width - 1)
    top, bottom, weight_y = _half_taps(pixel // width, height)
    left, right, weight_x = _half_taps(pixel % width, width)
    inside = (output < outputs)[None, :]
    upper = residual + (top.to(tl.int64) * (width // 2) * outputs)[:, None] + output[None, :]
    lower = residual + (bottom.to(tl.int64) * (width // 2) * outputs)[:, None] + output[None, :]
    left = (left.to(tl.int64) * outputs)[:, None]
    right = (right.to(tl.int64) * outputs)[:, None]
    upper_left = tl.load(upper + left, inside, 0.0).to(tl.float32)
    upper_right = tl.load(upper + right, inside, 0.0).to(tl.float32)
    lower_left = tl.load(lower + left, inside, 0.0).to(tl.float32)
    lower_right = tl.load(lower + right, inside, 0.0).to(tl.float32)
    weight_x = weight_x[:, None]
    weight_y = weight_y[:, None]
    above = (1.0 - weight_x) * upper_left + weight_x * upper_right
    below = (1.0 - weight_x) * lower_left + weight_x * lower_right
    return (1.0 - weight_y) * above + weight_y * below


@triton.jit
def _project_kernel(
    x,
    mean,
    rstd,
    weight,
    bias,
    matrix,
    output_bias,
    residual,
    out,
    height,
    width,
    vectors,
    num_groups,
    output_vectors,
    VECTOR: tl.constexpr,
    OUTPUT_VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    channels = vectors * VECTOR
    outputs = output_vectors * OUTPUT_VECTOR
    pixels = height * width
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    x += image * pixels * channels
    product = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = channel < channels
        offset = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        values = tl.load(x + offset, (pixel < pixels)[:, None] & inside[None, :], 0.0).to(tl.float32)
        offset = output.to(tl.int64)[None, :] * channels + channel[:, None]
        columns = tl.load(matrix + offset, inside[:, None] & (output < outputs)[None, :], 0.0)
        scale, shift = scale_and_shift(mean, rstd, weight, bias, image, channel, channels, num_groups)
        values = relu(values * scale[None, :] + shift[None, :]).to(columns.dtype)
        product = tl.dot(values, columns, product, input_precision=PRECISION)
    if HAS_BIAS:
        product += tl.load(output_bias + output, output < outputs, 0.0).to(tl.float32)[None, :]
    offset = (image * pixels + pixel)[:, None] * outputs + output[None, :]
    valid = (pixel < pixels)[:, None] & (output < outputs)[None, :]
    if RESIDUAL == 1:
        product += tl.load(residual + offset, valid, 0.0).to(tl.float32)
    if RESIDUAL == 2:
        residual += image * (pixels // 4) * outputs
        product += _load_half(residual, pixel, height, width, output, outputs)
    tl.store(out + offset, product.to(out.dtype.element_ty), valid)


def _precision() -> str:
    # As torch's own matrix products; `allow_tf32` sets this too, but cannot be read once the two have been mixed.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def group_norm_relu_project(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """See csrc/library.cpp. One launch; activations are rounded to the dtype of the input for the product."""
    batch, channels, height, width = input.shape
    outputs = proj_weight.shape[0]
    out = empty_channels_last((batch, outputs, height, width), input)
    if out.numel() == 0:
        return out
    size = _NONE if residual is None else _SAME if residual.shape[2] == height else _HALF
    pixels, block, output_block, warps = (
        128,
        min(next_power_of_2(channels), 128),
        min(next_power_of_2(outputs), 128),
        4,
    )
    wrap_triton(_project_kernel)[
        (triton.cdiv(height * width, pixels), triton.cdiv(outputs, output_block), batch)
    ](
        channels_last(input),
        mean.contiguous(),
        rstd.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        proj_weight.contiguous(),
        out if proj_bias is None else proj_bias.contiguous(),
        out if residual is None else channels_last(residual),
        out,
        height,
        width,
        channels // vector_size(input),
        mean.shape[1],
        outputs // vector_size(out),
        VECTOR=vector_size(input),
        OUTPUT_VECTOR=vector_size(out),
        HAS_BIAS=proj_bias is not None,
        RESIDUAL=size,
        PRECISION=_precision(),
        PIXELS=pixels,
        CHANNELS=block,
        OUTPUTS=output_block,
        num_warps=warps,
        num_stages=1,
    )
    return out


triton_op(group_norm_relu_project).register_autograd(_backward, setup_context=_setup_context)
