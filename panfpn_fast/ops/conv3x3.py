"""3x3 convolution with bias, residual and ReLU; on the CPU by Winograd's algorithm where it is faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast._layout import memory_format_of
from panfpn_fast.ops import _checks, _register, reference
from panfpn_fast.ops._winograd import is_transformed, takes_winograd

# With fewer pixels, torch's gradient of the weights is faster.
_LEAST_PIXELS_FOR_WEIGHT = 1024


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """Applies a 3x3 convolution with stride 1 and padding 1, adds a residual and applies ReLU.

    Args:
        x: Feature map [N, C, H, W]; float32, float16, bfloat16, or float64 on the CPU. NCHW or channels-last.
        weight: [K, C, 3, 3] in the dtype of `x`; under autocast in any dtype but float64.
        bias: [K] in the dtype of `weight`, or None.
        relu: Whether to apply ReLU at the end.
        residual: [N, K, H, W], added before the ReLU, in the dtype of `x`; under autocast in any dtype but float64; or
            None.
        prepared: The result of `winograd.prepare(weight)` with either `tile`, or None. It saves the time to transform
            the weights in each call. It is not used if gradients are required.

    Returns:
        [N, K, H, W] on the device of `x`, in its dtype or, under autocast, in autocast's.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, or H or W is 0. N may be 0.
        ImportError: If the implementation for the device cannot be loaded.

    Note:
        Equals F.relu(F.conv2d(x, weight, bias, padding=1) + residual). No host sync.

        On the CPU, float32, float16 and bfloat16 with at least 16 channels in and out use Winograd's algorithm.
        `prepared` decides the size of the tiles. Without it, N * H * W decides: from 1024 pixels on, tiles have 4x4
        outputs and take a quarter of the multiplications; from 256 on, they have 2x2 outputs, because the weights are
        faster to transform; for fewer pixels, torch's convolution is used. The arithmetic is in float32, and each
        result is rounded once to the dtype. It has the layout of `x`; bias, residual and ReLU cost no further pass over
        memory. docs/numerics.md states the rounding errors. A tile reads one more pixel on each side, and a value that
        is not finite can make all outputs of each tile that reads it NaN. `winograd(False)` or PANFPN_WINOGRAD=0
        selects torch's convolution.

        float64, CUDA, processors without AVX2, and 16-bit dtypes on processors with AMX for them use torch's
        convolution, then an addition and ReLU. So do calls under autocast, forward-mode AD and torch.func.

        Differentiable in all tensors but `prepared`. With Winograd's algorithm, the gradient of `x` uses it too, and in
        float32 that of `weight`. Deterministic for any number of threads; on CUDA as deterministic as cuDNN.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> x, weight = torch.randn(1, 16, 40, 60), torch.randn(32, 16, 3, 3)
        >>> ops.conv3x3(x, weight, bias=torch.zeros(32), relu=True).shape
        torch.Size([1, 32, 40, 60])
        >>> prepared = ops.winograd.prepare(weight)  # once, for many calls
        >>> ops.conv3x3(x, weight, prepared=prepared).shape
        torch.Size([1, 32, 40, 60])
    """
    check_convolution(x, weight, "weight")
    _check_epilogue(x, weight, bias, relu, residual)
    _load.native(x.device, in_triton=True)
    check_prepared(prepared, weight)
    if takes_prepared(x, weight, prepared, bias, residual):
        output: Tensor = torch.ops.panfpn_fast.conv3x3_prepared(
            x, prepared, weight.shape[0], bias, relu, residual
        )
        return output
    if takes_winograd(x, weight):
        found: Tensor = torch.ops.panfpn_fast.conv3x3(x, weight, bias, relu, residual)
        return found
    return reference.conv3x3(x, weight, bias, relu, residual)


def check_convolution(x: Any, weight: Any, name: str) -> None:
    """Checks the input and the weights of a 3x3 convolution; `name` is the argument with the weights."""
    _checks.check_feature_map("x", x)
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x: expected shape [N, C, H, W] with H and W of at least 1, got {list(x.shape)}")
    # Under autocast both are cast to its dtype; otherwise the dtypes must be equal.
    _checks.check_tensor(name, weight, dtypes_beside(x), "[K, C, 3, 3]", (4,))
    if weight.shape[1] != x.shape[1] or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"{name}: expected shape [K, {x.shape[1]}, 3, 3] for x's {x.shape[1]} channels, got {list(weight.shape)}"
        )
    _checks.check_device(name, weight, x.device, "x")


def autocasts(x: Tensor) -> bool:
    """Whether autocast applies to a convolution of x. Autocast rejects the meta device."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def dtypes_beside(x: Tensor) -> tuple[torch.dtype, ...]:
    """Returns the dtypes allowed beside `x`: those that autocast casts if it is on, otherwise the dtype of `x`."""
    if autocasts(x):
        return tuple(dtype for dtype in _checks.FLOATING if dtype != torch.float64)
    return (x.dtype,)


def _check_epilogue(x: Tensor, weight: Tensor, bias: Any, relu: Any, residual: Any) -> None:
    _checks.check_bool("relu", relu)
    if bias is not None:
        _checks.check_tensor("bias", bias, (weight.dtype,), "[K]", (1,))
        _checks.check_rows("bias", bias, weight.shape[0], "weight's rows")
        _checks.check_device("bias", bias, x.device, "x")
    if residual is not None:
        _checks.check_tensor("residual", residual, dtypes_beside(x), "[N, K, H, W]", (4,))
        wanted = (x.shape[0], weight.shape[0], *x.shape[2:])
        if residual.shape != wanted:
            raise ValueError(f"residual: expected shape {list(wanted)}, got {list(residual.shape)}")
        _checks.check_device("residual", residual, x.device, "x")


def check_prepared(prepared: Any, weight: Tensor) -> None:
    """Checks that transformed weights, if given, fit the weights [K, C, 3, 3]."""
    if prepared is None:
        return
    shape = "[16 or 36, C, K rounded up to a multiple of 16]"
    _checks.check_tensor("prepared", prepared, (torch.float32,), shape, (3,))
    padded = (weight.shape[0] + 15) // 16 * 16
    if prepared.shape[0] not in (16, 36) or prepared.shape[1:] != (weight.shape[1], padded):
        raise ValueError(
            f"prepared: expected winograd.prepare(weight) of shape [16 or 36, {weight.shape[1]}, {padded}], got "
            f"{list(prepared.shape)}"
        )
    _checks.check_device("prepared", prepared, weight.device, "weight")


def takes_prepared(x: Tensor, weight: Tensor, prepared: Tensor | None, *others: Tensor | None) -> bool:
    """Whether a convolution uses the transformed weights: if there are any, and no gradients are needed."""
    if prepared is None or not takes_winograd(x, weight, prepared=True):
        return False
    tensors = (x, weight, *others)
    return not torch.is_grad_enabled() or not any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def conv3x3_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool], winograd: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Computes the gradients of a 3x3 convolution with padding 1 in its input and its weight.

    Args:
        grad: Gradient of the output, [N, K, H, W].
        x: [N, C, H, W].
        weight: [K, C, 3, 3].
        needed: Whether each of the two gradients is needed; the function returns None for the others.
        winograd: Whether to use Winograd's algorithm.
    """
    x_grad = weight_grad = None
    for_weight = winograd and x.dtype == torch.float32 and x.numel() // x.shape[1] >= _LEAST_PIXELS_FOR_WEIGHT
    from_torch = [needed[0] and not winograd, needed[1] and not for_weight, False]
    if any(from_torch):
        ones = [1, 1]
        x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, ones, ones, ones, False, [0, 0], 1, from_torch
        )
    if needed[0] and winograd:
        # The transposed convolution is a convolution with rotated weights.
        rotated = weight.flip(2, 3).transpose(0, 1)
        x_grad = torch.ops.panfpn_fast.conv3x3(grad, rotated, None, False, None)
    if needed[1] and for_weight:
        weight_grad = torch.ops.panfpn_fast.conv3x3_weight_gradient(grad, x)
        weight_grad = weight_grad.contiguous(memory_format=memory_format_of(weight))
    return x_grad, weight_grad


def _like_input(input: Tensor, outputs: Any) -> Tensor:
    size = (input.shape[0], outputs, *input.shape[2:])
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


@_register.register_fake("conv3x3")
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, residual: Tensor | None) -> Tensor:
    return _like_input(input, weight.shape[0])


@_register.register_fake("conv3x3_prepared")
def _fake_prepared(
    input: Tensor, prepared: Tensor, outputs: int, bias: Tensor | None, relu: bool, residual: Tensor | None
) -> Tensor:
    return _like_input(input, outputs)


@_register.register_fake("conv3x3_weight_gradient")
def _fake_weight_gradient(grad: Tensor, input: Tensor) -> Tensor:
    size = (grad.shape[1], input.shape[1], 3, 3)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, relu, _ = inputs
    ctx.save_for_backward(input, weight, output if relu else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    needed = ctx.needs_input_grad
    grads = conv3x3_gradients(grad, input, weight, needed[:2], winograd=not is_transformed())
    return *grads, grad.sum((0, 2, 3)) if needed[2] else None, None, grad if needed[4] else None


_register.register_autograd("conv3x3", _backward, _setup_context)


def _setup_weight_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weight_gradient_backward(ctx: Any, grad_of_weight: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient of the weights is linear in `grad` and in `input`; its adjoints are convolutions.
    grad, input = ctx.saved_tensors
    convolve = torch.ops.panfpn_fast.conv3x3
    rotated = grad_of_weight.flip(2, 3).transpose(0, 1)
    return (
        convolve(input, grad_of_weight, None, False, None) if ctx.needs_input_grad[0] else None,
        convolve(grad, rotated, None, False, None) if ctx.needs_input_grad[1] else None,
    )


_register.register_autograd("conv3x3_weight_gradient", _weight_gradient_backward, _setup_weight_gradient)
