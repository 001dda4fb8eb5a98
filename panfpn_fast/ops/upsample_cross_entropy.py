"""Cross-entropy of bilinearly upsampled logits, which are never made in full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference

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
    """Cross-entropy between bilinearly upsampled logits and a label map.

    Centres of pixels coincide (align_corners=False): with `scale_factor=4` output pixel 0 lies at -0.375 of the input
    and reads input 0 alone, output pixel 2 lies at 0.125 and reads inputs 0 and 1 with weights 0.875 and 0.125.

    Args:
        logits: [N, C, H, W]; float32, float16, bfloat16, or float64 on the CPU. NCHW or channels-last.
        target: [N, H * scale_factor, W * scale_factor] classes from 0 to C - 1; uint8, int16, int32 or int64.
        scale_factor: How many times larger the targets are than the logits, 1 to 1024.
        ignore_index: Value in `target` of pixels that do not count; may lie outside of the classes.
        weight: Factor of each class, [C], floating dtype; None means 1.
        label_smoothing: Share of the targets' distribution that is spread evenly over the classes, 0 to 1.
        reduction: "mean" is the weighted mean over the pixels that count (NaN where there are none), "sum" their sum,
            "none" the loss of each pixel, 0 where it does not count.

    Returns:
        The loss, float32 (float64 for float64 logits), on the device of `logits`: a scalar, or the shape of `target`
        for "none".

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.
        RuntimeError: A target is neither a class nor `ignore_index` (on the CPU; on CUDA the loss is NaN instead,
            because to raise would take a host sync).

    Note:
        Equals F.cross_entropy(F.interpolate(logits, scale_factor=scale_factor, mode="bilinear"), target, ...) in
        float32, whatever the dtype of `logits`; detectron2's and mmdetection's semantic heads train with that. The
        upsampled logits never exist: forward keeps one number for each pixel, and backward computes the softmax again.

        Differentiable once, in `logits`. Deterministic, forward and backward; on the CPU the result does not depend
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
            f"target: expected shape {list(size)}, that of logits upsampled by {scale_factor}, got {list(target.shape)}"
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
    ops = _load.semantic_ops(logits.device)
    if ops is None:
        return reference.upsample_cross_entropy(
            logits, target, scale_factor, ignore_index, weight, label_smoothing, reduction
        )
    loss: Tensor = ops.upsample_cross_entropy(
        logits, target, weight, scale_factor, ignore_index, label_smoothing, reduction
    )[0]
    return loss


@_load.register_fake("upsample_cross_entropy")
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


@_load.register_fake("upsample_cross_entropy_backward")
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
    memory_format = torch.channels_last if _checks.channels_last_only(logits) else torch.contiguous_format
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=memory_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, weight, *ctx.settings = inputs
    _, log_sum_exp, total_weight = output
    ctx.mark_non_differentiable(log_sum_exp, total_weight)
    ctx.set_materialize_grads(False)  # or those two would get zeros
    ctx.save_for_backward(logits, target, weight, log_sum_exp, total_weight)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    logits, target, weight, log_sum_exp, total_weight = ctx.saved_tensors
    ops = _load.semantic_ops(grad.device)
    logits_grad = ops.upsample_cross_entropy_backward(
        grad, logits, target, weight, log_sum_exp, total_weight, *ctx.settings
    )
    return logits_grad, None, None, None, None, None, None


_load.register_autograd("upsample_cross_entropy", _backward, _setup_context)
_load.block_double_backward("upsample_cross_entropy")
