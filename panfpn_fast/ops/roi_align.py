"""ROIAlign."""

from __future__ import annotations

from collections.abc import Sequence

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
        sampling_ratio: Samples along each side of a cell; 0 or less means as many as it spans pixels, rounded up.
        aligned: Whether pixel centres lie at half coordinates.

    Returns:
        [K, C, height, width] in the dtype and on the device of `input`; channels-last where `input` is.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        Equals torchvision.ops.roi_align, but accumulates float16 and bfloat16 in float32. A box that has a NaN or
        infinite coordinate or an index outside of the batch gives zeros. Deterministic; no host sync; forward only.

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
    _checks.check_int("sampling_ratio", sampling_ratio)
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


_load.register_forward_only("roi_align")
