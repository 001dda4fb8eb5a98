"""The last stage of the semantic head: convolution, GroupNorm, ReLU and the predictor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference
from panfpn_fast.ops._conv_statistics import check_conv, conv3x3_statistics
from panfpn_fast.ops.group_norm_relu_upsample import check_groups, check_parameters


def conv_gn_relu_project(
    x: Tensor,
    conv_weight: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolves 3x3, normalises groups of channels, applies ReLU and a 1x1 convolution, and adds.

    The first convolution has padding 1, stride 1 and no bias. A residual half as high and wide is upsampled
    bilinearly as it is added, with align_corners=False: column 1 of the sum gets what lies at 0.25 between the
    residual's columns 0 and 1.

    Args:
        x: Feature map [N, C_in, H, W]; float32, float16, bfloat16, or float64 on the CPU. Channels-last is fastest.
        conv_weight: [C_out, C_in, 3, 3] in the dtype of `x`; under autocast in any dtype.
        gn_weight: [C_out], multiplies the normalised channels; in float32 or the dtype of `x`.
        gn_bias: [C_out], is added to them; in the dtype of `gn_weight`.
        num_groups: Divides C_out.
        weight: [K, C_out], the 1x1 convolution's; in the dtype of `x`, under autocast in any dtype.
        bias: [K], its bias, in the dtype of `weight`, or None.
        eps: Added to the variance; above 0.
        residual: [N, K, H, W] or [N, K, H / 2, W / 2] in the dtype of `x`, under autocast in any dtype; or None.

    Returns:
        [N, K, H, W] on the device of `x` and in its dtype, under autocast in autocast's; channels-last, which is how
        the ops that upsample it read it best.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        Equals F.conv2d(F.relu(F.group_norm(F.conv2d(x, conv_weight, padding=1), num_groups, gn_weight, gn_bias,
        eps)), weight[:, :, None, None], bias) + residual. The activations never reach memory, and with float16 and
        bfloat16 they are not rounded. No host sync.

        A predictor after an upsampling, or after a sum of maps, gives the same logits before it, because bilinear
        weights sum to one. So the logits of a coarse level can be the residual of the next finer one.

        Differentiable once, in `x`, the parameters and `residual`; backward computes the activations again.
        Deterministic but for what F.conv2d does on the CPU.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> x, conv_weight, weight = torch.randn(1, 8, 4, 6), torch.randn(16, 8, 3, 3), torch.randn(5, 16)
        >>> coarse = torch.randn(1, 5, 2, 3)
        >>> gn = torch.ones(16), torch.zeros(16), 4
        >>> ops.conv_gn_relu_project(x, conv_weight, *gn, weight, residual=coarse).shape
        torch.Size([1, 5, 4, 6])
    """
    check_conv(x, conv_weight)
    channels = conv_weight.shape[0]
    check_parameters("gn_weight", gn_weight, "gn_bias", gn_bias, x, channels)
    check_groups(num_groups, channels, eps)
    _check_predictor(weight, bias, conv_weight)
    if residual is not None:
        _check_residual(residual, x, weight)
    ops = _load.semantic_ops(x.device)
    if ops is None:
        return reference.conv_gn_relu_project(
            x, conv_weight, gn_weight, gn_bias, num_groups, weight, bias, eps, residual
        )
    y, mean, rstd = conv3x3_statistics(x, conv_weight, num_groups, eps)
    logits: Tensor = ops.group_norm_relu_project(
        y,
        mean,
        rstd,
        gn_weight,
        gn_bias,
        weight.to(y.dtype),
        None if bias is None else bias.to(y.dtype),
        None if residual is None else residual.to(y.dtype),
    )
    return logits


def _dtypes_beside(x: Tensor) -> tuple[torch.dtype, ...]:
    """What autocast brings to one dtype with `x`; without it that of `x` alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return tuple(dtype for dtype in _checks.FLOATING if dtype != torch.float64)
    return (x.dtype,)


def _check_predictor(weight: Any, bias: Any, conv_weight: Tensor) -> None:
    _checks.check_tensor("weight", weight, _dtypes_beside(conv_weight), "[K, C_out]", (2,))
    channels = conv_weight.shape[0]
    if weight.shape[1] != channels or weight.shape[0] < 1:
        raise ValueError(f"weight: expected shape [K, {channels}], got {list(weight.shape)}")
    _checks.check_device("weight", weight, conv_weight.device, "x")
    if bias is not None:
        _checks.check_tensor("bias", bias, (weight.dtype,), "[K]", (1,))
        _checks.check_rows("bias", bias, weight.shape[0], "weight's rows")
        _checks.check_device("bias", bias, conv_weight.device, "x")


def _check_residual(residual: Any, x: Tensor, weight: Tensor) -> None:
    shape = "[N, K, H, W] or [N, K, H / 2, W / 2]"
    _checks.check_tensor("residual", residual, _dtypes_beside(x), shape, (4,))
    batch, outputs, height, width = residual.shape
    same = height == x.shape[2] and width == x.shape[3]
    half = 2 * height == x.shape[2] and 2 * width == x.shape[3]
    if batch != x.shape[0] or outputs != weight.shape[0] or not (same or half):
        wanted = [x.shape[0], weight.shape[0], *x.shape[2:]]
        raise ValueError(
            f"residual: expected shape {wanted} or half that height and width, got {list(residual.shape)}"
        )
    _checks.check_device("residual", residual, x.device, "x")


@_load.register_fake("group_norm_relu_project")
def _fake(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    batch, _, height, width = input.shape
    size = (batch, proj_weight.shape[0], height, width)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, residual = inputs
    ctx.save_for_backward(*tensors)
    ctx.half = residual is not None and residual.shape[2] != output.shape[2]


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] as a matrix [N * H * W, C]: a view where it lies channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, mean, rstd, weight, bias, proj_weight = ctx.saved_tensors
    ops = _load.semantic_ops(grad.device)
    input_grad = weight_grad = bias_grad = proj_weight_grad = proj_bias_grad = residual_grad = None
    batch, channels, height, width = input.shape
    rows = _pixels(grad)  # [N * H * W, K]
    if ctx.needs_input_grad[5]:
        activations = ops.group_norm_relu_upsample(input, mean, rstd, weight, bias, 1, None)
        proj_weight_grad = rows.t() @ _pixels(activations)
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        of_activations = (rows @ proj_weight).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        input_grad, weight_grad, bias_grad = ops.group_norm_relu_upsample_backward(
            of_activations, input, mean, rstd, weight, bias, 1
        )
    if ctx.needs_input_grad[6]:
        proj_bias_grad = rows.sum(0)
    if ctx.needs_input_grad[7]:
        residual_grad = ops.bilinear_upsample_backward(grad, 2) if ctx.half else grad
    return input_grad, None, None, weight_grad, bias_grad, proj_weight_grad, proj_bias_grad, residual_grad


_load.register_autograd("group_norm_relu_project", _backward, _setup_context)
