"""Named tuples for the inputs and outputs of the network."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from panfpn_fast.ops._segments import PanopticSegments


class PanopticOutput(NamedTuple):
    """The prediction for one image, at the output size [H, W]."""

    panoptic: Tensor
    """Segment id of each pixel, int32 [H, W]; 0 is void."""
    segments: PanopticSegments
    """Table of the segments that the ids refer to."""
    boxes: Tensor
    """Boxes [N, 4] in pixels of the output, by descending score."""
    scores: Tensor
    """Probabilities [N]."""
    classes: Tensor
    """Thing classes, int64 [N], contiguous from 0."""
    mask_probs: Tensor
    """Mask probabilities [N, 28, 28] inside each box."""
    semantic: Tensor
    """Labels, uint8 [H, W] (int16 above 255 stuff classes): 0 is "other" (all things), stuff starts at 1."""


class InstanceOutput(NamedTuple):
    """The detections in one image, at the output size; fields are as in `PanopticOutput`."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    mask_probs: Tensor


class ImageBatch(NamedTuple):
    """Normalised images, padded on the right and bottom to a common size."""

    images: Tensor  # [N, 3, H, W]
    sizes: list[tuple[int, int]]  # height and width of each image without padding
