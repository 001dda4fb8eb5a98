"""The last stage of the semantic head: convolution, GroupNorm, ReLU and the predictor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register, reference
from panfpn_fast.ops._conv_statistics import conv3x3_statistics
from panfpn_fast.ops.conv3x3 import check_convolution, check_prepared, dtypes_beside
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
    prepared: Tensor | None = None,
) -> Tensor:
    """Applies a 3x3 convolution, GroupNorm, ReLU and a 1x1 convolution, and adds a residual.

    The 3x3 convolution has padding 1, stride 1 and no bias. A residual with half the height and width is upsampled
    bilinearly with align_corners=False: column 1 of the result gets the residual at 0.25 between its columns 0 and 1.

    Args:
        x: Feature map [N, C_in, H, W]; float32, float16, bfloat16, or float64 on the CPU. Channels-last is fastest.
        conv_weight: Weight of the 3x3 convolution, [C_out, C_in, 3, 3], in the dtype of `x`; under autocast in any
            dtype but float64.
        gn_weight: Scale of the normalized channels, [C_out], in float32 or the dtype of `x`.
        gn_bias: Shift of the normalized channels, [C_out], in the dtype of `gn_weight`.
        num_groups: Number of groups; a divisor of C_out.
        weight: Weight of the 1x1 convolution, [K, C_out], in the dtype of `x`; under autocast in any dtype but float64.
        bias: Bias of the 1x1 convolution, [K], in the dtype of `weight`, or None.
        eps: Added to the variance; above 0.
        residual: [N, K, H, W] or [N, K, H / 2, W / 2] in the dtype of `x`, under autocast in any dtype but float64; or
            None.
        prepared: The result of `winograd.prepare(conv_weight)`, or None; see `conv3x3`.

    Returns:
        [N, K, H, W] on the device of `x`, in its dtype or, under autocast, in autocast's; channels-last.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or value.
        ImportError: If the implementation for the device cannot be loaded.

    Note:
        Equals F.conv2d(F.relu(F.group_norm(F.conv2d(x, conv_weight, padding=1), num_groups, gn_weight, gn_bias,
        eps)), weight[:, :, None, None], bias) + residual. The activations are not written to memory. No host sync.

        Because bilinear weights sum to one, a predictor gives the same logits before and after an upsampling, and
        before and after a sum of maps. So the logits of a coarse level can be the residual of the next finer level.

        Differentiable once, in `x`, the parameters and `residual`; backward recomputes the activations. GroupNorm and
        the 1x1 convolution are deterministic; their backward is as deterministic as torch's matrix products. The 3x3
        convolution is as deterministic as torch's: on CUDA, cuDNN may use atomics for the gradient of `conv_weight`
        unless `torch.backends.cudnn.deterministic` is set. On CUDA the implementation of the 3x3 convolution
        depends on the GPU and on `panfpn_fast.tune`; implementations differ in rounding.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> x, conv_weight, weight = torch.randn(1, 8, 4, 6), torch.randn(16, 8, 3, 3), torch.randn(5, 16)
        >>> coarse = torch.randn(1, 5, 2, 3)
        >>> gn = torch.ones(16), torch.zeros(16), 4
        >>> ops.conv_gn_relu_project(x, conv_weight, *gn, weight, residual=coarse).shape
        torch.Size([1, 5, 4, 6])
    """
    check_convolution(x, conv_weight, "conv_weight")
    check_prepared(prepared, conv_weight)
    channels = conv_weight.shape[0]
    check_parameters("gn_weight", gn_weight, "gn_bias", gn_bias, x, channels)
    check_groups(num_groups, channels, eps)
    _check_predictor(weight, bias, conv_weight)
    if residual is not None:
        _check_residual(residual, x, weight)
    if not _load.native(x.device, in_triton=True):
        return reference.conv_gn_relu_project(
            x, conv_weight, gn_weight, gn_bias, num_groups, weight, bias, eps, residual
        )
    y, mean, rstd = conv3x3_statistics(x, conv_weight, num_groups, eps, prepared)
    logits: Tensor = torch.ops.panfpn_fast.group_norm_relu_project(
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


def _check_predictor(weight: Any, bias: Any, conv_weight: Tensor) -> None:
    _checks.check_tensor("weight", weight, dtypes_beside(conv_weight), "[K, C_out]", (2,))
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
    _checks.check_tensor("residual", residual, dtypes_beside(x), shape, (4,))
    batch, outputs, height, width = residual.shape
    same = height == x.shape[2] and width == x.shape[3]
    half = 2 * height == x.shape[2] and 2 * width == x.shape[3]
    if batch != x.shape[0] or outputs != weight.shape[0] or not (same or half):
        wanted = [x.shape[0], weight.shape[0], *x.shape[2:]]
        raise ValueError(
            f"residual: expected shape {wanted} or half that height and width, got {list(residual.shape)}"
        )
    _checks.check_device("residual", residual, x.device, "x")


@_register.register_fake("group_norm_relu_project")
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
    """Reshapes [N, C, H, W] to a matrix [N * H * W, C]; a view if the map is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, mean, rstd, weight, bias, proj_weight = ctx.saved_tensors
    ops = torch.ops.panfpn_fast
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


_register.register_autograd("group_norm_relu_project", _backward, _setup_context)
_register.implement_in_triton("group_norm_relu_project")
