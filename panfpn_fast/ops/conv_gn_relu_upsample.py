"""A stage of the semantic head: convolution, GroupNorm, ReLU and bilinear upsampling."""

from __future__ import annotations

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference
from panfpn_fast.ops._conv_statistics import conv3x3_statistics
from panfpn_fast.ops.conv3x3 import check_convolution, check_prepared
from panfpn_fast.ops.group_norm_relu_upsample import check_groups, check_parameters


def conv_gn_relu_upsample(
    x: Tensor,
    conv_weight: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    scale_factor: int = 2,
    prepared: Tensor | None = None,
) -> Tensor:
    """Applies a 3x3 convolution, GroupNorm and ReLU, and upsamples bilinearly.

    The convolution has padding 1, stride 1 and no bias. The upsampling uses align_corners=False: with
    `scale_factor=2`, output column 1 is at 0.25 between input columns 0 and 1.

    Args:
        x: Feature map [N, C_in, H, W]; float32, float16, bfloat16, or float64 on the CPU. Channels-last is fastest.
        conv_weight: Weight of the convolution, [C_out, C_in, 3, 3], in the dtype of `x`; under autocast in any dtype
            but float64.
        gn_weight: Scale of the normalized channels, [C_out], in float32 or the dtype of `x`.
        gn_bias: Shift of the normalized channels, [C_out], in the dtype of `gn_weight`.
        num_groups: Number of groups; a divisor of C_out.
        eps: Added to the variance; above 0.
        scale_factor: Output pixels per input pixel along each axis, from 1 to 65,536.
        prepared: The result of `winograd.prepare(conv_weight)`, or None; see `conv3x3`.

    Returns:
        [N, C_out, scale_factor * H, scale_factor * W] on the device of `x`, in its dtype or, under autocast, in
        autocast's. Channels-last on CUDA; on the CPU channels-last if the result of the convolution is.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or value.
        ImportError: If the implementation for the device cannot be loaded.

    Note:
        Equals `group_norm_relu_upsample(F.conv2d(x, conv_weight, padding=1), gn_weight, gn_bias, num_groups, eps,
        scale_factor)`. On CUDA the epilogue of the convolution may compute the statistics. No host sync.

        Differentiable once, in `x` and the three parameters. GroupNorm and the upsampling are deterministic, forward
        and backward. The convolution is as deterministic as torch's: on CUDA, cuDNN may use atomics for the gradient of
        `conv_weight` unless `torch.backends.cudnn.deterministic` is set. On CUDA the implementation of the convolution
        depends on the GPU and on `panfpn_fast.tune`; implementations differ in rounding.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> x, conv_weight = torch.randn(1, 8, 5, 7), torch.randn(16, 8, 3, 3)
        >>> ops.conv_gn_relu_upsample(x, conv_weight, torch.ones(16), torch.zeros(16), num_groups=4).shape
        torch.Size([1, 16, 10, 14])
    """
    check_convolution(x, conv_weight, "conv_weight")
    check_prepared(prepared, conv_weight)
    channels = conv_weight.shape[0]
    check_parameters("gn_weight", gn_weight, "gn_bias", gn_bias, x, channels)
    check_groups(num_groups, channels, eps)
    _checks.check_scale_factor(scale_factor)
    if not _load.native(x.device, in_triton=True):
        return reference.conv_gn_relu_upsample(
            x, conv_weight, gn_weight, gn_bias, num_groups, eps, scale_factor
        )
    y, mean, rstd = conv3x3_statistics(x, conv_weight, num_groups, eps, prepared)
    output: Tensor = torch.ops.panfpn_fast.group_norm_relu_upsample(
        y, mean, rstd, gn_weight, gn_bias, scale_factor, None
    )
    return output
