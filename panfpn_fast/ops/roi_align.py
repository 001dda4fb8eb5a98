"""ROIAlign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast._layout import channels_last_only, memory_format_of
from panfpn_fast.ops import _checks, _register, reference


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Averages bilinear samples of a feature map in each bin of each box.

    Each box is divided into `output_size` bins. The value of a bin is the mean of bilinear samples that are spread
    evenly over it. With `aligned=True`, the centre of feature pixel (0, 0) is at (0.5, 0.5), so at `spatial_scale=1`
    the box (0, 0, 1, 1) is exactly that pixel. With `aligned=False`, the centre is at (0, 0), and the sides of boxes
    are at least one feature pixel long.

    Args:
        input: Feature map [N, C, H, W]; float32, float16, bfloat16, or float64 on the CPU; NCHW or channels-last.
        boxes: [K, 5] rows of (image index, x1, y1, x2, y2), or a list with one tensor [L, 4] of (x1, y1, x2, y2) for
            each of the N images; float32, float16, bfloat16 or float64.
        output_size: Number of bins (height, width), or one number for both; at least 1.
        spatial_scale: Feature pixels per unit of box coordinates, for example 1/4; finite and above 0.
        sampling_ratio: Samples per bin along each axis, at most 1024. With 0 or less, this is the size of the bin in
            feature pixels, rounded up.
        aligned: Whether the centres of pixels are at half-integer coordinates.

    Returns:
        [K, C, height, width] in the dtype and on the device of `input`; channels-last if `input` is.

    Raises:
        TypeError: If `input` is not a tensor of one of these dtypes, `boxes` is neither a tensor nor a list of tensors
            of one of these dtypes, or another argument is not of the type in the signature.
        ValueError: If `input` or `boxes` has another shape, the list `boxes` does not have N tensors, `boxes` is not on
            the device of `input`, or a number is outside its range.

    Note:
        Equals torchvision.ops.roi_align, except that float16 and bfloat16 are accumulated in float32. ROIAlign is from
        Mask R-CNN (He et al. 2017); `aligned=True` is detectron2's ROIAlignV2. The sum over the samples of a bin is
        divided by their number, as in torchvision, so that a mask on half of the samples gives exactly 0.5. A box with
        a NaN or infinite coordinate or with an image index outside the batch gives zeros. No host sync.

        The number of samples of an adaptive grid is rounded up. The CPU rounds each operation on the way there and a
        GPU fuses some, as torchvision's kernels do. The devices can therefore differ by one sample for bins of a whole
        number of pixels, unless `spatial_scale` is a power of two.

        Differentiable once with respect to `input`; boxes have no gradient. The forward pass is deterministic, and so
        is the backward pass on the CPU. On CUDA, the backward pass uses atomic additions, whose order varies. With
        `torch.use_deterministic_algorithms(True)`, each pixel instead sums its gradient in the order of the boxes.

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


@_register.register_fake("roi_align")
def _fake(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    memory_format = memory_format_of(input)
    size = (boxes.shape[0], input.shape[1], pooled_height, pooled_width)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)


@_register.register_fake("roi_align_backward")
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
    ctx.channels_last = channels_last_only(input)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (boxes,) = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    input_grad = torch.ops.panfpn_fast.roi_align_backward(
        grad, boxes, *ctx.forward, ctx.channels_last, deterministic
    )
    return input_grad, None, None, None, None, None, None


_register.register_autograd("roi_align", _backward, _setup_context)
_register.block_double_backward("roi_align")
