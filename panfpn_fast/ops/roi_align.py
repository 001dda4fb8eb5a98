"""ROIAlign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Resamples the region of each box to a grid of fixed size.

    Each box is cut into `output_size` cells; a cell is the mean of bilinear samples spread evenly over it. With
    `aligned=True` the centre of feature pixel (0, 0) lies at (0.5, 0.5), so that at `spatial_scale=1` the box
    (0, 0, 1, 1) is exactly that pixel; with `aligned=False` it lies at (0, 0) and boxes are at least 1 x 1.

    Args:
        input: Feature map [N, C, H, W]; float32, float16, bfloat16, or float64 on the CPU. NCHW or channels-last.
        boxes: [K, 5] rows of (index in the batch, x1, y1, x2, y2), or a list of N tensors [L, 4]; any floating dtype.
        output_size: Cells along height and width, or one number for both.
        spatial_scale: Feature pixels per unit of the boxes' coordinates, for example 1/4.
        sampling_ratio: Samples along each side of a cell; 0 or less means as many as it spans pixels, rounded up;
            at most 1024.
        aligned: Whether pixel centres lie at half coordinates.

    Returns:
        [K, C, height, width] in the dtype and on the device of `input`; channels-last where `input` is.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        Equals torchvision.ops.roi_align, but accumulates float16 and bfloat16 in float32. A box that has a NaN or
        infinite coordinate or an index outside of the batch gives zeros. No host sync.

        Differentiable once, in `input`; boxes have no gradient. Forward is deterministic, and backward on the CPU. On
        CUDA backward adds with atomics, whose order varies, unless `torch.use_deterministic_algorithms(True)` is set:
        then each pixel collects its sum in the order of the boxes.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> ops.roi_align(x, [torch.tensor([[0.0, 0.0, 2.0, 2.0]])], 1, aligned=True)
        tensor([[[[2.5000]]]])
    """
    _checks.check_feature_map("input", input)
    rois = _checks.batched_boxes(boxes, input.shape[0], input)
    height, width = _checks.int_pair("output_size", output_size, 1)
    _checks.check_positive("spatial_scale", spatial_scale)
    _checks.check_sampling_ratio(sampling_ratio)
    _checks.check_bool("aligned", aligned)
    if not _load.native(input.device):
        return reference.roi_align(input, rois, (height, width), spatial_scale, sampling_ratio, aligned)
    return torch.ops.panfpn_fast.roi_align(input, rois, spatial_scale, height, width, sampling_ratio, aligned)


@_load.register_fake("roi_align")
def _fake(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    memory_format = torch.channels_last if _checks.channels_last_only(input) else torch.contiguous_format
    size = (boxes.shape[0], input.shape[1], pooled_height, pooled_width)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)


@_load.register_fake("roi_align_backward")
def _fake_backward(
    grad: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    batch: int,
    height: int,
    width: int,
    channels_last: bool,
    deterministic: bool,
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    size = (batch, grad.shape[1], height, width)
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, boxes, spatial_scale, _, _, sampling_ratio, aligned = inputs
    ctx.save_for_backward(boxes)
    batch, _, height, width = input.shape
    ctx.forward = (spatial_scale, sampling_ratio, aligned, batch, height, width)
    ctx.channels_last = _checks.channels_last_only(input)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (boxes,) = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    input_grad = torch.ops.panfpn_fast.roi_align_backward(
        grad, boxes, *ctx.forward, ctx.channels_last, deterministic
    )
    return input_grad, None, None, None, None, None, None


_load.register_autograd("roi_align", _backward, _setup_context)
_load.block_double_backward("roi_align")
