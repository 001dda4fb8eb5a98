"""ROIAlign over a feature pyramid: the size of a box chooses its level (Lin et al., FPN, eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from panfpn_fast._layout import channels_last_only
from panfpn_fast.ops.reference.roi_align import boxes_to_rois, roi_align


def assign_levels(
    rois: Tensor,
    spatial_scales: Sequence[float],
    canonical_box_size: float = 224,
    canonical_level: int = 4,
    level_epsilon: float = 1e-8,
) -> Tensor:
    """Returns the pyramid level of each box by the rule of detectron2's poolers.py.

    Args:
        rois: [K, 5] rows of (image, x1, y1, x2, y2).
        spatial_scales: Feature-map pixels per unit of box coordinates for each level, descending.
        canonical_box_size: Side of the box that belongs to `canonical_level`.
        canonical_level: Level k has the scale 2**-k.
        level_epsilon: Added inside the logarithm.

    Returns:
        Indices into `spatial_scales`, int64 [K]. Boxes whose area is NaN or negative belong to the first level.
    """
    lowest = round(-math.log2(spatial_scales[0]))
    highest = round(-math.log2(spatial_scales[-1]))
    x1, y1, x2, y2 = rois[:, 1:5].float().unbind(1)
    size = torch.sqrt((x2 - x1) * (y2 - y1))
    level = torch.floor(canonical_level + torch.log2(size / canonical_box_size + level_epsilon))
    level = torch.where(torch.isnan(level), float(lowest), level)
    return level.clamp(lowest, highest).to(torch.int64) - lowest


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    canonical_box_size: float = 224,
    canonical_level: int = 4,
    level_epsilon: float = 1e-8,
) -> Tensor:
    """Pools each box from its pyramid level with `roi_align`.

    Differentiable in `features`.

    Args:
        features: Feature maps [N, C, H_l, W_l], from fine to coarse.
        boxes: [K, 5] rows of (image, x1, y1, x2, y2), or one [L, 4] tensor per image.
        output_size: Number of bins (height, width), or one number for both.
        spatial_scales: Feature-map pixels per unit of box coordinates for each level. They are consecutive powers of
            two.
        sampling_ratio: Samples per bin along each axis; 0 or less means ceil(box size / number of bins).
        aligned: Shifts the box by half a pixel, so that pixel i is the interval [i, i + 1).
        canonical_box_size: Side of the box that belongs to `canonical_level`.
        canonical_level: Level k has the scale 2**-k.
        level_epsilon: Added inside the logarithm; 1e-8 is detectron2's.

    Returns:
        [K, C, height, width] in the dtype of the features.
    """
    rois = boxes_to_rois(boxes, features[0])
    levels = assign_levels(rois, spatial_scales, canonical_box_size, canonical_level, level_epsilon)
    pooled = []
    rows = []
    for level, (level_features, scale) in enumerate(zip(features, spatial_scales, strict=True)):
        members = torch.nonzero(levels == level)[:, 0]
        pooled.append(roi_align(level_features, rois[members], output_size, scale, sampling_ratio, aligned))
        rows.append(members)
    output = torch.cat(pooled)[torch.argsort(torch.cat(rows))]
    channels_last = all(channels_last_only(level_features) for level_features in features)
    return output.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
