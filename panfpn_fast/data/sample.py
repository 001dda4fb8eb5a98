"""An annotated image, and what a network learns from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = 255
"""The semantic label of void pixels, which no loss counts."""


@dataclass
class Sample:
    """One annotated image; transforms change the two maps and leave the table alone.

    Attributes:
        image: uint8 [3, H, W], RGB.
        segments: int32 [H, W]; 0 is void, k + 1 is row k of the table.
        isthing: bool [S], the table: whether each segment is a thing.
        label: int64 [S], its class among things (0..), or its semantic label among stuff (1..).
        crowd: bool [S], a region of things that were not told apart.
        area: int64 [S], each segment's pixels by the data set's own count, before any transform.
        image_id: The data set's own.
        file_name: For messages.
    """

    image: Tensor
    segments: Tensor
    isthing: Tensor
    label: Tensor
    crowd: Tensor
    area: Tensor
    image_id: int | str
    file_name: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[1], self.image.shape[2]


class Target(NamedTuple):
    """What the losses compare with.

    Attributes:
        boxes: float32 [N, 4] around each instance: x2 is the last column plus 1.
        classes: int64 [N].
        instances: int32 [H, W]; n + 1 is instance n, 0 everything else.
        semantic: uint8 [H, W]; 0 = a thing, 1.. = stuff, 255 = void.
    """

    boxes: Tensor
    classes: Tensor
    instances: Tensor
    semantic: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Target:
        """Copies the tensors to a device."""
        return Target(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


def segment_boxes(segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Boxes and areas of the segments in a map.

    Args:
        segments: Integer [H, W]; k + 1 is segment k.
        count: How many segments there are.

    Returns:
        int64 [count, 4] boxes x1, y1, x2, y2 and int64 [count] areas; a segment without a pixel has the area 0 and a
        meaningless box.

    Example:
        >>> boxes, areas = segment_boxes(torch.tensor([[0, 1, 1], [0, 0, 1]]), 1)
        >>> boxes.tolist(), areas.tolist()
        ([[1, 0, 3, 2]], [3])
    """
    height, width = segments.shape
    label = segments.long()
    areas = torch.bincount(label.flatten(), minlength=count + 1)[1:]
    # In every row, and in every column, which segments there are: [H, S + 1] and [W, S + 1].
    in_row = torch.zeros(height, count + 1, dtype=torch.bool).scatter_(1, label, True)
    in_column = torch.zeros(width, count + 1, dtype=torch.bool).scatter_(1, label.T, True)
    edges = []
    for present, size in ((in_column, width), (in_row, height)):
        number = torch.arange(size)[:, None]
        first = torch.where(present, number, size).amin(0) if size else number.new_zeros(count + 1)
        last = torch.where(present, number, -1).amax(0) if size else number.new_zeros(count + 1)
        edges.append((first[1:], last[1:] + 1))
    (x1, x2), (y1, y2) = edges
    return torch.stack((x1, y1, x2, y2), dim=1), areas


def semantic_map(sample: Sample) -> Tensor:
    """The label of each pixel, uint8 [H, W]: 0 = a thing or a crowd of them, 1.. = stuff, 255 = void."""
    label = torch.full((len(sample.label) + 1,), IGNORE, dtype=torch.uint8)
    label[1:] = torch.where(sample.isthing, 0, sample.label).to(torch.uint8)
    return label[sample.segments.long()]


def make_target(sample: Sample) -> Target:
    """Turns an annotated image into what the losses compare with.

    Crowd regions and segments without a pixel are no instances. A crowd region of things is the semantic label 0, as
    in detectron2.
    """
    count = len(sample.label)
    boxes, areas = segment_boxes(sample.segments, count)
    chosen = torch.nonzero(sample.isthing & ~sample.crowd & (areas > 0))[:, 0]
    number = torch.zeros(count + 1, dtype=torch.int32)
    number[chosen + 1] = torch.arange(1, len(chosen) + 1, dtype=torch.int32)
    instances = number[sample.segments.long()]
    return Target(boxes[chosen].float(), sample.label[chosen], instances, semantic_map(sample))
