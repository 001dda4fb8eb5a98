"""What the replacements in detectron2 and in mmdetection have in common."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Labels from here on are no stuff for ops.panoptic_merge.
MAX_LABELS = 4096

# What our ops raise for arguments that they do not take, before they compute anything: the original then does as it
# always did. ImportError is a GPU without Triton.
REFUSED = (TypeError, ValueError, ImportError)


def is_own(value: Any, package: str, name: str) -> bool:
    """Whether an object is of the framework's own class of this name, and of no subclass, which may do otherwise."""
    return type(value).__name__ == name and type(value).__module__.split(".")[0] == package


def drop_negative_areas(rois: Tensor) -> Tensor:
    """Makes rows of (index, x1, y1, x2, y2) with an area below 0 NaN, which our op pools as zeros.

    Both frameworks find no level for such a box, since the root of its area is NaN, and leave its zeros as they were.
    """
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    return rois.masked_fill((area < 0)[:, None], math.nan)


def pastes_alike(masks: Tensor, threshold: float) -> bool:
    """Whether both frameworks' pasting sets the pixels that ours does.

    On the CPU they compute only a window around each box. What a large mask spills over the window's edge is below a
    half, so that it takes a lower threshold, or none, to see that.
    """
    return masks.is_cuda or threshold >= 0.5


def by_score(scores: Tensor) -> Tensor:
    """The order in which both frameworks merge instances: equal scores come as their unstable sort has them."""
    return torch.argsort(-scores)


def whole(threshold: float) -> int:
    """The integer that divides areas as `threshold` does: what is below one is below the other.

    Raises:
        ValueError: It is not finite.
    """
    if not math.isfinite(threshold):
        raise ValueError(f"threshold: expected a finite number, got {threshold}")
    return math.ceil(threshold)
