"""GroupNorm, ReLU, bilinear upsampling and addition in one pass, and their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton._group_norm import activate, scale_and_shift
from panfpn_fast.ops.triton._launch import cdiv, channels_last, empty_channels_last, launch, next_power_of_2
from panfpn_fast.ops.triton._upsampling import between, elements, load_ends, tile_of_program, vector_size
from panfpn_fast.ops.triton.bilinear_upsample_backward import gather, gather_tiles

_WARPS = 4
_MAX_CHANNELS = 128


@triton.jit
def _activate_ends(ends, scale, shift, FACTOR: tl.constexpr):
    activations = (activate(ends[0], scale, shift),)
    if FACTOR > 1:
        activations += (activate(ends[1], scale, shift),)
    return activations


@triton.jit
def _load_line(map, y, height, first, column, width, channel, channels, FACTOR: tl.constexpr):
    """Loads one tile for each phase of an output row; the tile of phase 0 begins at column `first`."""
    tiles = ()
    for phase in tl.static_range(FACTOR):
        pointers, valid = elements(map, y, height, first + phase, column, width, channel, channels)
        tiles += (tl.load(pointers, valid, 0.0),)
    return tiles


@triton.jit(do_not_specialize=["height", "width"])
def _forward_kernel(
    x,
    mean,
    rstd,
    weight,
    bias,
    residual,
    out,
    height,
    width,
    vectors,
    num_groups,
    blocks,
    VECTOR: tl.constexpr,
    FACTOR: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Computes the outputs of ROWS x COLUMNS cells.

    No load should wait for the store of an earlier output. So all pixels are loaded first, and the residual AHEAD
    output rows before it is needed. AHEAD = 0 is for factors with too many outputs to unroll the loops over them and
    to keep their residuals in registers.
    """
    before: tl.constexpr = 1 if FACTOR > 1 else 0  # number of cells before the first pixel
    channels = vectors * VECTOR
    image, row, first, channel = tile_of_program(blocks, ROWS, COLUMNS, CHANNELS)
    column = tl.arange(0, COLUMNS)
    row -= before
    first -= before
    x += image * height * width * channels
    ends = ()
    for i in tl.static_range(ROWS + before):
        ends += (load_ends(x, row + i, height, first, column, width, channel, channels, FACTOR),)
    scale, shift = scale_and_shift(mean, rstd, weight, bias, image, channel, channels, num_groups)

    row = row * FACTOR + FACTOR // 2
    first = first * FACTOR + FACTOR // 2
    column *= FACTOR
    height *= FACTOR
    width *= FACTOR
    residual += image * height * width * channels
    out += image * height * width * channels
    added = ()
    if HAS_RESIDUAL:
        for i in tl.static_range(AHEAD):
            added += (_load_line(residual, row + i, height, first, column, width, channel, channels, FACTOR),)
    upper = _activate_ends(ends[0], scale, shift, FACTOR)
    for i in tl.static_range(ROWS):
        lower = _activate_ends(ends[i + before], scale, shift, FACTOR)
        if FACTOR == 1:
            upper = lower
        if AHEAD == 0:
            for phase_y in range(FACTOR):
                y = row + i * FACTOR + phase_y
                left = between(upper[0], lower[0], phase_y, FACTOR)
                right = between(upper[1], lower[1], phase_y, FACTOR)
                for phase in range(FACTOR):
                    value = between(left, right, phase, FACTOR)
                    x_out = first + phase
                    if HAS_RESIDUAL:
                        pointers, valid = elements(
                            residual, y, height, x_out, column, width, channel, channels
                        )
                        value += tl.load(pointers, valid, 0.0).to(tl.float32)
                    pointers, valid = elements(out, y, height, x_out, column, width, channel, channels)
                    tl.store(pointers, value.to(out.dtype.element_ty), valid)
        else:
            for phase_y in tl.static_range(FACTOR):
                y = row + i * FACTOR + phase_y
                if HAS_RESIDUAL and i * FACTOR + phase_y + AHEAD < ROWS * FACTOR:
                    line = y + AHEAD
                    line = _load_line(residual, line, height, first, column, width, channel, channels, FACTOR)
                    added += (line,)
                left = between(upper[0], lower[0], phase_y, FACTOR)
                right = between(upper[before], lower[before], phase_y, FACTOR)
                for phase in tl.static_range(FACTOR):
                    value = between(left, right, phase, FACTOR)
                    if HAS_RESIDUAL:
                        value += added[i * FACTOR + phase_y][phase].to(tl.float32)
                    pointers, valid = elements(
                        out, y, height, first + phase, column, width, channel, channels
                    )
                    tl.store(pointers, value.to(out.dtype.element_ty), valid)
        upper = lower


def group_norm_relu_upsample(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_factor: int,
    residual: Tensor | None,
) -> Tensor:
    """Implements the op of csrc/library.cpp with one launch; the output is channels-last."""
    batch, channels, height, width = input.shape
    scale_factor = int(scale_factor)  # a traced factor becomes a constant of the graph
    out = empty_channels_last((batch, channels, height * scale_factor, width * scale_factor), input)
    if out.numel() == 0:
        return out
    block = min(next_power_of_2(channels), _MAX_CHANNELS)
    columns = _WARPS * 32 * vector_size(input) // block
    rows = max(1, (8 if residual is None else 4) // scale_factor)
    ahead = {1: 2, 2: 2, 3: 1}.get(scale_factor, 0)
    before = 1 if scale_factor > 1 else 0
    blocks = cdiv(channels, block)
    grid = (cdiv(width + before, columns), cdiv(height + before, rows), batch * blocks)
    launch(
        _forward_kernel,
        grid,
        channels_last(input),
        mean.contiguous(),
        rstd.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        out if residual is None else channels_last(residual),
        out,
        height,
        width,
        channels // vector_size(input),
        mean.shape[1],
        blocks,
        VECTOR=vector_size(input),
        FACTOR=scale_factor,
        HAS_RESIDUAL=residual is not None,
        ROWS=rows,
        COLUMNS=columns,
        CHANNELS=block,
        AHEAD=ahead,
        num_warps=_WARPS,
    )
    return out


@triton.jit
def _masked_gradient(grad, x, scale, shift):
    """Returns the gradient of the ReLU's input. Where the input is NaN, the gradient passes, as in torch's ReLU."""
    return tl.where(x * scale[None, :] + shift[None, :] <= 0.0, 0.0, grad)


@triton.jit(do_not_specialize=["height", "width"])
def _gather_kernel(
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    gathered,
    partials,
    height,
    width,
    vectors,
    num_groups,
    blocks,
    VECTOR: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Computes the gradients of the normalized pixels of a tile, and two sums of them, [N, tiles, 2, C].

    The first sum is of the gradients, the second of their products with the deviation from the mean. With a factor of
    1 there is nothing to gather, so the gradients are not stored.
    """
    channels = vectors * VECTOR
    image, row, first, channel = tile_of_program(blocks, ROWS, COLUMNS, CHANNELS)
    column = tl.arange(0, COLUMNS)
    inside = channel < channels
    x += image * height * width * channels
    gathered += image * height * width * channels
    grad += image * height * width * channels * (FACTOR * FACTOR)
    values = ()
    for i in tl.static_range(ROWS):
        pointers, valid = elements(x, row + i, height, first, column, width, channel, channels)
        values += (tl.load(pointers, valid, 0.0),)
    scale, shift = scale_and_shift(mean, rstd, weight, bias, image, channel, channels, num_groups)
    centre = tl.load(mean + image * num_groups + channel // (channels // num_groups), inside, 0.0)
    rows = gather(grad, row, height, first, column, width, channel, channels, FACTOR, ROWS)
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    product = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for i in tl.static_range(ROWS):
        value = values[i].to(tl.float32)
        pointers, valid = elements(gathered, row + i, height, first, column, width, channel, channels)
        passed = tl.where(valid, _masked_gradient(rows[i], value, scale, shift), 0.0)
        if FACTOR > 1:
            tl.store(pointers, passed.to(gathered.dtype.element_ty), valid)
        total += passed
        product += passed * (value - centre[None, :])
    tile = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials + 2 * tile * channels + channel, tl.sum(total, 0), inside)
    tl.store(partials + (2 * tile + 1) * channels + channel, tl.sum(product, 0), inside)


@triton.jit(do_not_specialize=["tiles", "pixels"])
def _combine_kernel(
    partials,
    rstd,
    weight,
    sums,
    means,
    tiles,
    channels,
    num_groups,
    pixels,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums over the tiles of an image, and computes the means over a group that the input's gradient needs.

    The sums [N, 2, C] are the image's shares of the gradients of bias and weight. The means are [N, num_groups, 2].
    """
    image = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    size = channels // num_groups
    factor = tl.load(rstd + tl.program_id(0))
    mean = 0.0
    mean_product = 0.0
    for begin in range(0, size, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        inside = channel < size
        channel += group * size
        total = tl.zeros((TILES, CHANNELS), tl.float32)
        product = tl.zeros((TILES, CHANNELS), tl.float32)
        for first in range(0, tiles, TILES):
            tile = first + tl.arange(0, TILES)
            index = 2 * (image * tiles + tile)[:, None] * channels + channel[None, :]
            valid = (tile < tiles)[:, None] & inside[None, :]
            total += tl.load(partials + index, valid, 0.0)
            product += tl.load(partials + channels + index, valid, 0.0)
        channel_total = tl.sum(total, 0)
        channel_product = tl.sum(product, 0) * factor
        tl.store(sums + 2 * image * channels + channel, channel_total, inside)
        tl.store(sums + (2 * image + 1) * channels + channel, channel_product, inside)
        of_channel = tl.load(weight + channel, inside, 0.0).to(tl.float32)
        mean += tl.sum(of_channel * channel_total, 0)
        mean_product += tl.sum(of_channel * channel_product, 0)
    count = pixels.to(tl.float32) * size
    tl.store(means + 2 * tl.program_id(0), mean / count)
    tl.store(means + 2 * tl.program_id(0) + 1, mean_product / count)


@triton.jit(do_not_specialize=["batch", "pixels"])
def _input_gradient_kernel(
    gathered,
    x,
    mean,
    rstd,
    weight,
    bias,
    sums,
    means,
    out,
    weight_grad,
    bias_grad,
    batch,
    pixels,
    vectors,
    num_groups,
    VECTOR: tl.constexpr,
    FACTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Computes the input's gradient; the first programs also sum the gradients of weight and bias over images."""
    channels = vectors * VECTOR
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    first = tl.program_id(0) * PIXELS
    pixel = tl.arange(0, PIXELS)
    corner = (image * pixels + first) * channels
    offset = pixel[:, None] * channels + channel[None, :]
    valid = (first + pixel < pixels)[:, None] & inside[None, :]
    passed = tl.load(gathered + corner + offset, valid, 0.0).to(tl.float32)
    value = tl.load(x + corner + offset, valid, 0.0).to(tl.float32)
    if FACTOR == 1:
        scale, shift = scale_and_shift(mean, rstd, weight, bias, image, channel, channels, num_groups)
        passed = _masked_gradient(passed, value, scale, shift)

    group = image * num_groups + channel // (channels // num_groups)
    centre = tl.load(mean + group, inside, 0.0)
    factor = tl.load(rstd + group, inside, 0.0)
    # factor * (weight * passed - mean - normalized * mean_product), with the terms of each channel combined
    own = factor * tl.load(weight + channel, inside, 0.0).to(tl.float32)
    constant = factor * tl.load(means + 2 * group, inside, 0.0)
    slope = factor * factor * tl.load(means + 2 * group + 1, inside, 0.0)
    result = passed * own[None, :] - constant[None, :] - (value - centre[None, :]) * slope[None, :]
    tl.store(out + corner + offset, result.to(out.dtype.element_ty), valid)

    if (tl.program_id(0) == 0) & (tl.program_id(2) == 0):
        total = tl.zeros((CHANNELS,), tl.float32)
        product = tl.zeros((CHANNELS,), tl.float32)
        for n in range(batch):
            total += tl.load(sums + 2 * n * channels + channel, inside, 0.0)
            product += tl.load(sums + (2 * n + 1) * channels + channel, inside, 0.0)
        tl.store(bias_grad + channel, total.to(bias_grad.dtype.element_ty), inside)
        tl.store(weight_grad + channel, product.to(weight_grad.dtype.element_ty), inside)


def group_norm_relu_upsample_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_factor: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements the op of csrc/library.cpp with three launches.

    The first computes the adjoint of upsampling and ReLU with the sums of each tile, the second combines these sums in
    a fixed order, the third computes the adjoint of the normalization. The first stores the gathered gradient in the
    memory of the result, in the input's dtype, as torch's own ops would. All sums are of float32 values before that
    rounding.
    """
    batch, channels, height, width = input.shape
    num_groups = mean.shape[1]
    scale_factor = int(scale_factor)  # a traced factor becomes a constant of the graph
    out = empty_channels_last((batch, channels, height, width), input)
    if out.numel() == 0:
        return out, torch.zeros_like(weight), torch.zeros_like(bias)
    x, grad = channels_last(input), channels_last(grad)
    mean, rstd, weight, bias = mean.contiguous(), rstd.contiguous(), weight.contiguous(), bias.contiguous()
    vector = vector_size(input)
    rows, columns, block = gather_tiles(grad, scale_factor)
    blocks = cdiv(channels, block)
    tiles_y, tiles_x = cdiv(height, rows), cdiv(width, columns)
    partials = torch.empty((batch, tiles_y * tiles_x, 2, channels), dtype=torch.float32, device=input.device)
    launch(
        _gather_kernel,
        (tiles_x, tiles_y, batch * blocks),
        grad,
        x,
        mean,
        rstd,
        weight,
        bias,
        out,
        partials,
        height,
        width,
        channels // vector,
        num_groups,
        blocks,
        VECTOR=vector,
        FACTOR=scale_factor,
        ROWS=rows,
        COLUMNS=columns,
        CHANNELS=block,
        num_warps=_WARPS,
    )
    sums = torch.empty((batch, 2, channels), dtype=torch.float32, device=input.device)
    means = torch.empty((batch, num_groups, 2), dtype=torch.float32, device=input.device)
    group_block = min(next_power_of_2(channels // num_groups), _MAX_CHANNELS)
    launch(
        _combine_kernel,
        (batch * num_groups,),
        partials,
        rstd,
        weight,
        sums,
        means,
        tiles_y * tiles_x,
        channels,
        num_groups,
        height * width,
        TILES=2048 // group_block,
        CHANNELS=group_block,
        num_warps=_WARPS,
    )
    weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(bias)
    pixels = 2 * _WARPS * 32 * vector // block
    launch(
        _input_gradient_kernel,
        (cdiv(height * width, pixels), blocks, batch),
        grad if scale_factor == 1 else out,
        x,
        mean,
        rstd,
        weight,
        bias,
        sums,
        means,
        out,
        weight_grad,
        bias_grad,
        batch,
        height * width,
        channels // vector,
        num_groups,
        VECTOR=vector,
        FACTOR=scale_factor,
        PIXELS=pixels,
        CHANNELS=block,
        num_warps=_WARPS,
    )
    return out, weight_grad, bias_grad
