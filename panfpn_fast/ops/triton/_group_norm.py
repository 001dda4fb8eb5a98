"""GroupNorm and ReLU inside of kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_and_shift(mean, rstd, weight, bias, image, channel, channels, num_groups):
    """Scale and shift of each channel of an image: GroupNorm as x * scale + shift, one fused multiply-add."""
    inside = channel < channels
    group = image * num_groups + channel // (channels // num_groups)
    scale = tl.load(weight + channel, inside, 0.0).to(tl.float32) * tl.load(rstd + group, inside, 0.0)
    shift = tl.load(bias + channel, inside, 0.0).to(tl.float32) - tl.load(mean + group, inside, 0.0) * scale
    return scale, shift


@triton.jit
def activate(x, scale, shift):
    """ReLU of the normalized x. Like torch's ReLU it propagates NaN."""
    value = x.to(tl.float32) * scale[None, :] + shift[None, :]
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
