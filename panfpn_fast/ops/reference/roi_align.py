"""ROIAlign (He et al., Mask R-CNN, ICCV 2017) with the arithmetic of torchvision, one box at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from panfpn_fast._layout import channels_last_only

# With this many samples along one axis, the mean of a bin is zero to working precision, because fewer than
# 2 * (size + 2) of the samples can be on the map.
_ENDLESS_GRID = 2.0**40

# Up to this many samples per bin and axis, all samples are listed. For more, only those near the map are listed.
_LISTED_GRID = 4096


class _Axis(NamedTuple):
    """Samples of one box along one axis: P bins with S listed samples each."""

    low: Tensor  # int64 [P, S]: pixel at or before the sample
    high: Tensor  # int64 [P, S]: pixel after the sample
    low_weight: Tensor  # [P, S], zero if the sample does not count
    high_weight: Tensor  # [P, S], zero if the sample does not count


def _sample_axis(start: Tensor, bin_size: Tensor, grid: float, pooled: int, size: int) -> _Axis:
    """Locates the samples along one axis in the dtype of `start` and `bin_size` (0-d)."""
    bins = torch.arange(pooled, device=start.device)
    bin_start = start + bins.to(start.dtype) * bin_size  # [P]
    if grid <= _LISTED_GRID:
        first = torch.zeros_like(bins)  # [P]
        listed = int(grid)
    else:
        # The samples of a long grid are more than half a pixel and at most one pixel apart. The margin covers
        # the rounding of their coordinates, which grows with the length of the box.
        spacing = bin_size.double() / grid
        margin = 2 + int(pooled * grid * 2.0**-21)
        begin = torch.floor((-1.0 - bin_start.double()) / spacing) - margin  # [P]
        first = begin.clamp(0.0, grid).to(torch.int64)
        listed = 2 * (size + 2) + 2 * margin
    index = first[:, None] + torch.arange(listed, device=start.device)  # [P, S]
    position = bin_start[:, None] + (index.to(start.dtype) + 0.5) * bin_size / grid  # [P, S]
    counts = (position >= -1.0) & (position <= size) & (index < grid)
    position = torch.where(counts, position, 0.0).clamp(min=0.0)
    low = position.to(torch.int64).clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    # Beyond the centre of the last pixel, both neighbours are that pixel, so `low` gets the whole weight.
    high_weight = torch.where(low == high, 0.0, position - low.to(position.dtype))
    return _Axis(
        low, high, torch.where(counts, 1.0 - high_weight, 0.0), torch.where(counts, high_weight, 0.0)
    )


def _pool_one_box(features: Tensor, vertical: _Axis, horizontal: _Axis, samples_per_bin: float) -> Tensor:
    """Averages the bilinear samples of each bin: features [C, H, W] -> [C, P_h, P_w]."""
    low_row, high_row = features[:, vertical.low], features[:, vertical.high]  # [C, P_h, S_h, W]
    rows = low_row * vertical.low_weight[..., None] + high_row * vertical.high_weight[..., None]
    # The weights of the two axes are independent, so rows can be summed before columns are sampled.
    rows = rows.sum(2)  # [C, P_h, W]
    low_column, high_column = rows[..., horizontal.low], rows[..., horizontal.high]  # [C, P_h, P_w, S_w]
    values = low_column * horizontal.low_weight + high_column * horizontal.high_weight
    return values.sum(-1) / max(samples_per_bin, 1.0)


def boxes_to_rois(boxes: Tensor | Sequence[Tensor], like: Tensor) -> Tensor:
    """Converts both forms of `boxes` to [K, 5] rows of (image, x1, y1, x2, y2) on the device of `like`."""
    if isinstance(boxes, Tensor):
        return boxes
    rows = [torch.zeros(0, 5, device=like.device)]
    for image, image_boxes in enumerate(boxes):
        # Half precision cannot represent all image indices above 2048.
        wide = image_boxes if image_boxes.dtype == torch.float64 else image_boxes.float()
        rows.append(torch.cat([wide.new_full((len(wide), 1), image), wide], dim=1))
    return torch.cat(rows)


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Averages bilinear samples of the feature map in each bin of each box.

    Differentiable in `input`.

    Args:
        input: Feature maps [N, C, H, W].
        boxes: [K, 5] rows of (image, x1, y1, x2, y2), or one [L, 4] tensor per image.
        output_size: Number of bins (height, width), or one number for both.
        spatial_scale: Feature-map pixels per unit of box coordinates.
        sampling_ratio: Samples per bin along each axis; 0 or less means ceil(box size / number of bins).
        aligned: Shifts the box by half a pixel, so that pixel i is the interval [i, i + 1).

    Returns:
        [K, C, height, width] in the dtype of `input`.

    Note:
        The coordinates are computed in the expression order and dtype of torchvision's roi_align_kernel.cpp, because
        rounding decides the adaptive number of samples. Boxes that are not finite or whose image index is out of
        range give zeros.
    """
    pooled_h, pooled_w = (output_size, output_size) if isinstance(output_size, int) else output_size
    count, channels, height, width = input.shape
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    rois = boxes_to_rois(boxes, input).detach().to(dtype)
    features = input.to(dtype)

    offset = 0.5 if aligned else 0.0
    start = rois[:, 1:3] * spatial_scale - offset  # [K, 2] as (x, y)
    extent = (rois[:, 3:5] * spatial_scale - offset) - start  # [K, 2]
    if not aligned:
        extent = extent.clamp(min=1.0)
    bin_size = extent / extent.new_tensor([pooled_w, pooled_h])
    grid = torch.full_like(extent, sampling_ratio) if sampling_ratio > 0 else torch.ceil(bin_size)
    usable = torch.isfinite(rois).all(1) & torch.isfinite(bin_size).all(1)
    usable &= (rois[:, 0] >= 0) & (rois[:, 0] < count)
    usable &= (grid > 0).all(1) & (grid < _ENDLESS_GRID).all(1)
    if height == 0 or width == 0:
        usable = torch.zeros_like(usable)

    # The empty slice keeps the result in the autograd graph of `input` even if no box is pooled.
    pooled = [features[:0].reshape(0, channels, pooled_h, pooled_w)]
    for k, (box_usable, image, (grid_x, grid_y)) in enumerate(
        zip(usable.tolist(), rois[:, 0].tolist(), grid.tolist(), strict=True)
    ):
        if not box_usable:
            pooled.append(features.new_zeros(1, channels, pooled_h, pooled_w))
            continue
        horizontal = _sample_axis(start[k, 0], bin_size[k, 0], grid_x, pooled_w, width)
        vertical = _sample_axis(start[k, 1], bin_size[k, 1], grid_y, pooled_h, height)
        pooled.append(_pool_one_box(features[int(image)], vertical, horizontal, grid_x * grid_y)[None])
    output = torch.cat(pooled).to(input.dtype)
    return output.contiguous(memory_format=torch.channels_last) if channels_last_only(input) else output
