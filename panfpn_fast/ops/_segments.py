"""The segment table that `panoptic_merge` and `panoptic_merge_padded` return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PanopticSegments(NamedTuple):
    """The S segments of a panoptic map, things before stuff.

    Attributes:
        id: Value of the segment in the map, 1..S, int32 [S].
        isthing: Whether the segment is a thing, bool [S].
        label: Value from `classes` for things and from `semantic` for stuff, int64 [S].
        score: Score of the instance, 0 for stuff, float32 [S].
        area: Number of pixels of the segment in the map, int64 [S].
        instance: Index into `masks` for things, -1 for stuff, int64 [S].
    """

    id: Tensor
    isthing: Tensor
    label: Tensor
    score: Tensor
    area: Tensor
    instance: Tensor
