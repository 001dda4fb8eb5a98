"""Cross-entropy of bilinearly upsampled logits, which are never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast._layout import memory_format_of
from panfpn_fast.ops import _checks, _register, reference

_REDUCTIONS = ("mean", "sum", "none")
_LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)
_MAX_SCALE = 1024


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    scale_factor: int,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Computes the cross-entropy between bilinearly upsampled logits and a label map.

    The upsampling uses align_corners=False: with `scale_factor=4`, output pixel 0 is at -0.375 in the input and reads
    only input 0; output pixel 2 is at 0.125 and reads inputs 0 and 1 with weights 0.875 and 0.125.

    Args:
        logits: [N, C, H, W]; float32, float16, bfloat16, or float64 on the CPU. NCHW or channels-last.
        target: Classes from 0 to C - 1, [N, H * scale_factor, W * scale_factor]; uint8, int16, int32 or int64.
        scale_factor: Target pixels per logit along each axis, from 1 to 1024.
        ignore_index: Value in `target` of pixels that do not count; usually not a class. With more than 255 classes the
            default is a class, so pass another value, such as -1.
        weight: Factor of each class, [C], in a floating dtype; None means 1.
        label_smoothing: Share of the target distribution that is spread evenly over the classes, from 0 to 1.
        reduction: "mean" is the weighted mean over the pixels that count (NaN if there are none), "sum" is their sum,
            "none" is the loss of each pixel, 0 for pixels that do not count.

    Returns:
        The loss, float32 (float64 for float64 logits), on the device of `logits`; a scalar, or for "none" with the
        shape of `target`.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or value.
        RuntimeError: If a target on the CPU is neither a class nor `ignore_index`. On CUDA the loss is NaN instead,
            because raising an error would need a host sync.
        ImportError: If the implementation for the device cannot be loaded.

    Note:
        Equals F.cross_entropy(F.interpolate(logits, scale_factor=scale_factor, mode="bilinear"), target, ...) in
        float32 for any dtype of `logits`, which is the loss of the semantic heads of detectron2 and mmdetection. The
        upsampled logits are never stored: forward keeps one number per pixel, and backward recomputes the softmax.

        Differentiable once, in `logits`. Forward and backward are deterministic; on the CPU the result does not depend
        on the number of threads. No host sync.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]])
        >>> ops.upsample_cross_entropy(logits, torch.tensor([[[0, 0, 255, 1], [0, 0, 1, 1]]]), 2)
        tensor(0.2068)
    """
    _checks.check_feature_map("logits", logits)
    _checks.check_tensor("target", target, _LABELS, "[N, H, W]", (3,))
    _checks.check_device("target", target, logits.device, "logits")
    _checks.check_int("scale_factor", scale_factor, _MAX_SCALE)
    if scale_factor < 1:
        raise ValueError(f"scale_factor: expected an integer of at least 1, got {scale_factor}")
    count, classes, height, width = logits.shape
    if classes == 0:
        raise ValueError("logits: expected at least one class, got none")
    size = (count, height * scale_factor, width * scale_factor)
    if target.shape != size:
        raise ValueError(
            f"target: expected shape {list(size)}, the logits upsampled by {scale_factor}, got {list(target.shape)}"
        )
    _checks.check_int("ignore_index", ignore_index)
    if weight is not None:
        _checks.check_tensor("weight", weight, _checks.FLOATING, "[C]", (1,))
        _checks.check_rows("weight", weight, classes, "the classes")
        _checks.check_device("weight", weight, logits.device, "logits")
        weight = weight.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    _checks.check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if not _load.native(logits.device, in_triton=True):
        return reference.upsample_cross_entropy(
            logits, target, scale_factor, ignore_index, weight, label_smoothing, reduction
        )
    loss: Tensor = torch.ops.panfpn_fast.upsample_cross_entropy(
        logits, target, weight, scale_factor, ignore_index, label_smoothing, reduction
    )[0]
    return loss


@_register.register_fake("upsample_cross_entropy")
def _fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale_factor: int,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_sum_exp = logits.new_empty(target.shape, dtype=dtype)
    total_weight = logits.new_empty((), dtype=dtype)
    loss = torch.empty_like(log_sum_exp if reduction == "none" else total_weight)
    return loss, log_sum_exp, total_weight


@_register.register_fake("upsample_cross_entropy_backward")
def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    total_weight: Tensor,
    scale_factor: int,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    memory_format = memory_format_of(logits)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=memory_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, weight, *ctx.settings = inputs
    _, log_sum_exp, total_weight = output
    ctx.mark_non_differentiable(log_sum_exp, total_weight)
    ctx.set_materialize_grads(False)  # otherwise the gradients of these two would be zeros
    ctx.save_for_backward(logits, target, weight, log_sum_exp, total_weight)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    logits, target, weight, log_sum_exp, total_weight = ctx.saved_tensors
    logits_grad = torch.ops.panfpn_fast.upsample_cross_entropy_backward(
        grad, logits, target, weight, log_sum_exp, total_weight, *ctx.settings
    )
    return logits_grad, None, None, None, None, None, None


_register.register_autograd("upsample_cross_entropy", _backward, _setup_context)
_register.block_double_backward("upsample_cross_entropy")
_register.implement_in_triton("upsample_cross_entropy", "upsample_cross_entropy_backward")
