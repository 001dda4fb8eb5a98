"""GroupNorm, ReLU and bilinear upsampling in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast._layout import triton_memory_format_of
from panfpn_fast.ops import _checks, _register, reference


def group_norm_relu_upsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    scale_factor: int = 2,
    residual: Tensor | None = None,
) -> Tensor:
    """Applies GroupNorm and ReLU, upsamples bilinearly, and adds a residual.

    The upsampling uses align_corners=False: with `scale_factor=2`, output column 1 is at 0.25 between input columns 0
    and 1, and output column 0 is a copy of input column 0.

    Args:
        x: Feature map [N, C, H, W]; float32, float16, bfloat16, or float64 on the CPU. NCHW or channels-last.
        weight: Scale of the normalized channels, [C], in float32 or the dtype of `x`.
        bias: Shift of the normalized channels, [C], in the dtype of `weight`.
        num_groups: Number of groups; a divisor of C. Neighboring channels form a group, which has one mean and variance
            per image.
        eps: Added to the variance; above 0.
        scale_factor: Output pixels per input pixel along each axis, from 1 to 65,536.
        residual: [N, C, scale_factor * H, scale_factor * W] in the dtype of `x`, added after the upsampling, or None.

    Returns:
        [N, C, scale_factor * H, scale_factor * W] in the dtype and on the device of `x`. Channels-last on CUDA; on the
        CPU channels-last if `x` is.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or value.
        ImportError: If the implementation for the device cannot be loaded.

    Note:
        Equals F.interpolate(F.relu(F.group_norm(x, num_groups, weight, bias, eps)), scale_factor=scale_factor,
        mode="bilinear") + residual (Wu and He, Group Normalization, ECCV 2018), but float16 and bfloat16 are computed
        in float32 and rounded once, and autocast has no effect. A NaN makes its whole group NaN. No host sync.

        Differentiable once, in `x`, `weight`, `bias` and `residual`. Forward and backward are deterministic: gradients
        are summed in a fixed order, on the CPU for any number of threads.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> x = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2)
        >>> ops.group_norm_relu_upsample(x, torch.ones(1), torch.zeros(1), num_groups=1)
        tensor([[[[0.0000, 0.2500, 0.7500, 1.0000],
                  [0.0000, 0.2500, 0.7500, 1.0000]]]])
    """
    _checks.check_feature_map("x", x)
    check_parameters("weight", weight, "bias", bias, x, x.shape[1])
    check_groups(num_groups, x.shape[1], eps)
    _checks.check_scale_factor(scale_factor)
    if residual is not None:
        _check_residual(residual, x, scale_factor)
    if not _load.native(x.device, in_triton=True):
        return reference.group_norm_relu_upsample(x, weight, bias, num_groups, eps, scale_factor, residual)
    # The second op also computes the part of the gradient that goes through the statistics: they are constants here.
    ops = torch.ops.panfpn_fast
    mean, rstd = ops.group_norm_statistics(x.detach(), num_groups, eps)
    output: Tensor = ops.group_norm_relu_upsample(x, mean, rstd, weight, bias, scale_factor, residual)
    return output


def check_parameters(
    weight_name: str, weight: Any, bias_name: str, bias: Any, x: Tensor, channels: int
) -> None:
    """Checks weight and bias of a GroupNorm for a map with the dtype and device of `x` and a number of channels."""
    dtypes = tuple(dict.fromkeys((torch.float32, x.dtype)))
    for name, value in ((weight_name, weight), (bias_name, bias)):
        _checks.check_tensor(name, value, dtypes, "[C]", (1,))
        _checks.check_rows(name, value, channels, "the channels")
        _checks.check_device(name, value, x.device, "x")
    if bias.dtype != weight.dtype:
        raise TypeError(f"{bias_name}: expected the dtype of {weight_name}, {weight.dtype}, got {bias.dtype}")


def check_groups(num_groups: Any, channels: int, eps: Any) -> None:
    """Checks the settings of a GroupNorm."""
    _checks.check_int("num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the {channels} channels, got {num_groups}")
    _checks.check_positive("eps", eps)


def _check_residual(residual: Any, x: Tensor, scale_factor: int) -> None:
    _checks.check_tensor("residual", residual, (x.dtype,), "[N, C, scale_factor * H, scale_factor * W]", (4,))
    batch, channels, height, width = x.shape
    shape = (batch, channels, scale_factor * height, scale_factor * width)
    if residual.shape != shape:
        raise ValueError(f"residual: expected shape {list(shape)}, got {list(residual.shape)}")
    _checks.check_device("residual", residual, x.device, "x")


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


@_register.register_fake("group_norm_statistics")
def _fake_statistics(input: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    mean = input.new_empty((input.shape[0], num_groups), dtype=_statistics_dtype(input))
    return mean, torch.empty_like(mean)


@_register.register_fake("group_norm_relu_upsample")
def _fake(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_factor: int,
    residual: Tensor | None,
) -> Tensor:
    memory_format = triton_memory_format_of(input)
    batch, channels, height, width = input.shape
    size = (batch, channels, height * scale_factor, width * scale_factor)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)


@_register.register_fake("group_norm_relu_upsample_backward")
def _fake_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_factor: int,
) -> tuple[Tensor, Tensor, Tensor]:
    memory_format = triton_memory_format_of(input)
    input_grad = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format)
    return input_grad, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@_register.register_fake("bilinear_upsample_backward")
def _fake_upsample_backward(grad: Tensor, scale_factor: int) -> Tensor:
    memory_format = triton_memory_format_of(grad)
    batch, channels, height, width = grad.shape
    size = (batch, channels, height // scale_factor, width // scale_factor)
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale_factor, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, mean, rstd, weight, bias = ctx.saved_tensors
    input_grad = weight_grad = bias_grad = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        input_grad, weight_grad, bias_grad = torch.ops.panfpn_fast.group_norm_relu_upsample_backward(
            grad, input, mean, rstd, weight, bias, ctx.scale_factor
        )
    residual_grad = grad if ctx.needs_input_grad[6] else None
    return input_grad, None, None, weight_grad, bias_grad, None, residual_grad


_register.register_autograd("group_norm_relu_upsample", _backward, _setup_context)
_register.block_double_backward("group_norm_relu_upsample")
_register.implement_in_triton(
    "group_norm_statistics",
    "group_norm_relu_upsample",
    "group_norm_relu_upsample_backward",
    "bilinear_upsample_backward",
)
