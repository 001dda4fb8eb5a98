"""GroupNorm, ReLU and a 1x1 convolution: the activations go from registers to the tensor cores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton._group_norm import activate, scale_and_shift
from panfpn_fast.ops.triton._launch import cdiv, channels_last, empty_channels_last, launch, next_power_of_2
from panfpn_fast.ops.triton._upsampling import between, elements, load_ends, vector_size

_WARPS = 8
_CELLS = 32
_SAME, _HALF = 1, 2  # the size of the residual relative to the output


@triton.jit
def _load_matrix(matrix, output, outputs, channel, channels):
    valid = (output < outputs)[:, None] & (channel < channels)[None, :]
    return tl.load(matrix + (output.to(tl.int64)[:, None] * channels + channel[None, :]), valid, 0.0)


@triton.jit
def _step_elements(map, step, row, height, first, cell, width, channel, channels, HALF: tl.constexpr):
    """Pointers to the pixels of one of the four steps of `_project_kernel`, and a mask of the elements that exist."""
    if HALF:
        y = 2 * row + 1 + step // 2
        return elements(map, y, height, 2 * first + 1 + step % 2, 2 * cell, width, channel, channels)
    return elements(map, row, 1, first + step * cell.shape[0], cell, height * width, channel, channels)


@triton.jit
def _multiply(tile, values, scale, shift, product, PRECISION: tl.constexpr):
    """Adds the product of a tile of the matrix [OUTPUTS, CHANNELS] and the activations of values [CELLS, CHANNELS]."""
    activations = activate(values, scale, shift).to(tile.dtype)
    return tl.dot(tile, tl.trans(activations), product, input_precision=PRECISION)


@triton.jit
def _multiply_blocks(
    x,
    step,
    row,
    height,
    first,
    cell,
    width,
    channels,
    mean,
    rstd,
    weight,
    bias,
    image,
    num_groups,
    matrix,
    output,
    outputs,
    CHANNELS: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes the product for the pixels of a step, one block of channels after the other."""
    product = tl.zeros((output.shape[0], cell.shape[0]), tl.float32)
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        pointers, valid = _step_elements(x, step, row, height, first, cell, width, channel, channels, HALF)
        values = tl.load(pointers, valid, 0.0)
        tile = _load_matrix(matrix, output, outputs, channel, channels)
        scale, shift = scale_and_shift(mean, rstd, weight, bias, image, channel, channels, num_groups)
        product = _multiply(tile, values, scale, shift, product, PRECISION)
    return product


@triton.jit(do_not_specialize=["height", "width"])
def _project_kernel(
    x,
    mean,
    rstd,
    weight,
    bias,
    matrix,
    matrix_bias,
    residual,
    out,
    height,
    width,
    vectors,
    num_groups,
    output_vectors,
    blocks,
    VECTOR: tl.constexpr,
    OUTPUT_VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Computes four steps of CELLS pixels each.

    If the residual has half the size, the four steps are the four outputs of each of its cells. So its pixels are read
    once for all four.

    The transposed activations are the second operand of the product, because Triton normalizes a second operand in the
    layout in which it was loaded. It would convert a first operand to the layout of the tensor cores before, where each
    thread holds many channels and needs the scale and the shift of each.
    """
    half: tl.constexpr = RESIDUAL == 2
    channels = vectors * VECTOR
    outputs = output_vectors * OUTPUT_VECTOR
    pixels = height * width
    image = (tl.program_id(2) // blocks).to(tl.int64)
    output = tl.program_id(2) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1)
    first = tl.program_id(0) * (4 * CELLS)
    cell = tl.arange(0, CELLS)
    if half:
        row -= 1
        first = tl.program_id(0) * CELLS - 1
    x += image * pixels * channels
    out += image * pixels * outputs

    if ONE_BLOCK:
        channel = tl.arange(0, CHANNELS)
        tile = _load_matrix(matrix, output, outputs, channel, channels)
        scale, shift = scale_and_shift(mean, rstd, weight, bias, image, channel, channels, num_groups)
    residual += image * (pixels // (4 if half else 1)) * outputs
    if half:
        upper = load_ends(residual, row, height // 2, first, cell, width // 2, output, outputs, 2)
        lower = load_ends(residual, row + 1, height // 2, first, cell, width // 2, output, outputs, 2)
    for step in range(4):
        if ONE_BLOCK:
            product = tl.zeros((OUTPUTS, CELLS), tl.float32)
            pointers, valid = _step_elements(
                x, step, row, height, first, cell, width, channel, channels, half
            )
            product = _multiply(tile, tl.load(pointers, valid, 0.0), scale, shift, product, PRECISION)
        else:
            product = _multiply_blocks(
                x,
                step,
                row,
                height,
                first,
                cell,
                width,
                channels,
                mean,
                rstd,
                weight,
                bias,
                image,
                num_groups,
                matrix,
                output,
                outputs,
                CHANNELS,
                half,
                PRECISION,
            )
        result = tl.trans(product)
        if HAS_BIAS:
            result += tl.load(matrix_bias + output, output < outputs, 0.0).to(tl.float32)[None, :]
        if half:
            left = between(upper[0].to(tl.float32), lower[0].to(tl.float32), step // 2, 2)
            right = between(upper[1].to(tl.float32), lower[1].to(tl.float32), step // 2, 2)
            result += between(left, right, step % 2, 2)
        elif RESIDUAL == 1:
            pointers, valid = _step_elements(
                residual, step, row, height, first, cell, width, output, outputs, half
            )
            result += tl.load(pointers, valid, 0.0).to(tl.float32)
        out_pointers, valid = _step_elements(
            out, step, row, height, first, cell, width, output, outputs, half
        )
        tl.store(out_pointers, result.to(out.dtype.element_ty), valid)


def precision(input: Tensor, *_: Any) -> str:
    """Returns the precision of the product, "tf32" or "ieee"; for float32 as set for torch's own matrix products."""
    if input.dtype != torch.float32:
        return "ieee"
    # `allow_tf32` sets this too, but reading it raises an error after both have been used.
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
    """Implements the op of csrc/library.cpp with one launch.

    Activations are rounded to the dtype of the input for the product.
    """
    batch, channels, height, width = input.shape
    outputs = proj_weight.shape[0]
    out = empty_channels_last((batch, outputs, height, width), input)
    if out.numel() == 0:
        return out
    half = residual is not None and residual.shape[2] != height
    # Larger tiles would spill if they are read block by block.
    small = input.element_size() == 4 or channels > 128
    widest = 16 if input.element_size() == 4 else 64 if small else 128
    block = max(min(next_power_of_2(channels), widest), 16)  # tensor cores sum over at least 16 channels
    output_block = 64 if small or outputs <= 64 else 128  # wgmma needs at least 64
    blocks = cdiv(outputs, output_block)
    columns, rows = (
        (cdiv(width // 2 + 1, _CELLS), height // 2 + 1) if half else (cdiv(height * width, 4 * _CELLS), 1)
    )
    grid = (columns, rows, batch * blocks)
    launch(
        _project_kernel,
        grid,
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
        blocks,
        VECTOR=vector_size(input),
        OUTPUT_VECTOR=vector_size(out),
        HAS_BIAS=proj_bias is not None,
        RESIDUAL=_HALF if half else 0 if residual is None else _SAME,
        PRECISION=precision(input),
        CELLS=_CELLS,
        CHANNELS=block,
        OUTPUTS=output_block,
        ONE_BLOCK=channels <= block,
        num_warps=_WARPS,
        num_stages=3 if channels <= block else 2,
    )
    return out
