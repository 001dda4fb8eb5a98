"""ROIAlign (He et al., Mask R-CNN, ICCV 2017) with torchvision's arithmetic, one box at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The mean of a bin with this many samples along one axis is zero to working precision: fewer than
# 2 * (size + 2) of them can fall on the map.
_ENDLESS_GRID = 2.0**40

# Grids up to this length are listed in full; of longer ones only the samples near the map are listed.
_LISTED_GRID = 4096


class _Axis(NamedTuple):
    """Samples of one box along one axis, for P bins of S listed samples."""

    low: Tensor  # int64 [P, S]: pixel at or before the sample
    high: Tensor  # int64 [P, S]: pixel after it
    low_weight: Tensor  # [P, S], zero where the sample does not count
    high_weight: Tensor  # [P, S], zero where the sample does not count


def _sample_axis(start: Tensor, bin_size: Tensor, grid: float, pooled: int, size: int) -> _Axis:
    """Places the samples of one axis; computes in the dtype of `start` and `bin_size` (0-d)."""
    bins = torch.arange(pooled, device=start.device)
    bin_start = start + bins.to(start.dtype) * bin_size  # [P]
    if grid <= _LISTED_GRID:
        first = torch.zeros_like(bins)  # [P]
        listed = int(grid)
    else:
        # Samples of a long grid are at most one pixel apart and more than half a pixel. The margin covers the
        # rounding of their coordinates, which grows with the length of the box.
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
    # Past the last pixel's centre both neighbours are that pixel, so its weight is one.
    high_weight = torch.where(low == high, 0.0, position - low.to(position.dtype))
    return _Axis(
        low, high, torch.where(counts, 1.0 - high_weight, 0.0), torch.where(counts, high_weight, 0.0)
    )


def _pool_one_box(features: Tensor, vertical: _Axis, horizontal: _Axis, samples_per_bin: float) -> Tensor:
    """Means of the bilinear samples: features [C, H, W] -> [C, P_h, P_w]."""
    low_row, high_row = features[:, vertical.low], features[:, vertical.high]  # [C, P_h, S_h, W]
    rows = low_row * vertical.low_weight[..., None] + high_row * vertical.high_weight[..., None]
    # Summed before the columns are sampled: the weights of the two axes are independent.
    rows = rows.sum(2)  # [C, P_h, W]
    low_column, high_column = rows[..., horizontal.low], rows[..., horizontal.high]  # [C, P_h, P_w, S_w]
    values = low_column * horizontal.low_weight + high_column * horizontal.high_weight
    return values.sum(-1) / max(samples_per_bin, 1.0)


def boxes_to_rois(boxes: Tensor | Sequence[Tensor], like: Tensor) -> Tensor:
    """Brings both forms of `boxes` to [K, 5] rows of (image, x1, y1, x2, y2) on the device of `like`."""
    if isinstance(boxes, Tensor):
        return boxes
    rows = [torch.zeros(0, 5, device=like.device)]
    for image, image_boxes in enumerate(boxes):
        # Half precision cannot count images beyond 2048.
        wide = image_boxes if image_boxes.dtype == torch.float64 else image_boxes.float()
        rows.append(torch.cat([wide.new_full((len(wide), 1), image), wide], dim=1))
    return torch.cat(rows)


def is_channels_last_only(tensor: Tensor) -> bool:
    """Whether strides are channels-last and nothing else; the output of a pooling op then is, too."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


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
        boxes: [K, 5] rows of (image, x1, y1, x2, y2), or one [L, 4] tensor for each image.
        output_size: Bins (height, width), or one number for both.
        spatial_scale: Feature-map pixels per unit of box coordinates.
        sampling_ratio: Samples along each side of a bin; not positive means ceil(box size / bins).
        aligned: Shifts the box by half a pixel, so that pixel i is the interval [i, i + 1).

    Returns:
        [K, C, height, width] in the dtype of `input`.

    Note:
        Expression order and dtype of the coordinates are those of torchvision's roi_align_kernel.cpp, because
        rounding decides the adaptive number of samples. Boxes that are not finite or belong to no image give
        zeros.
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

    # The empty slice keeps the result in the graph of the input even where no box is pooled.
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
    return output.contiguous(memory_format=torch.channels_last) if is_channels_last_only(input) else output
