"""An annotated image, and what a network learns from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
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


class Runs(NamedTuple):
    """A map as runs of equal values along its rows, of which there are far fewer than pixels.

    Attributes:
        value: [R], of each run.
        start: int64 [R], its first pixel, counted row by row.
        length: int64 [R].
    """

    value: npt.NDArray[Any]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]

    def map_of(self, value: npt.NDArray[Any], shape: tuple[int, int]) -> npt.NDArray[Any]:
        """The map with another value for each run."""
        return np.repeat(value, self.length).reshape(shape)


def runs_of(values: npt.NDArray[Any]) -> Runs:
    """Finds the runs of a map [H, W]; none is longer than a row."""
    begins = np.ones(values.shape, dtype=bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=begins[:, 1:])
    start = np.flatnonzero(begins)
    return Runs(values.ravel()[start], start, np.diff(start, append=values.size))


def _boxes_of(runs: Runs, width: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    areas = np.zeros(count + 1, np.int64)
    np.add.at(areas, runs.value, runs.length)
    y, x = np.divmod(runs.start, max(width, 1))
    boxes = np.zeros((4, count + 1), np.int64)
    boxes[:2] = np.iinfo(np.int64).max
    for edge, ends, extreme in zip(
        boxes, (x, y, x + runs.length, y + 1), (np.minimum, np.minimum, np.maximum, np.maximum), strict=True
    ):
        extreme.at(edge, runs.value, ends)
    return boxes.T[1:], areas[1:]


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
    boxes, areas = _boxes_of(runs_of(segments.numpy()), segments.shape[1], count)
    return torch.from_numpy(np.ascontiguousarray(boxes)), torch.from_numpy(areas)


def _semantic_labels(sample: Sample) -> npt.NDArray[np.uint8]:
    """The semantic label of void and then of each segment."""
    label = np.full(len(sample.label) + 1, IGNORE, np.uint8)
    label[1:] = torch.where(sample.isthing, 0, sample.label).numpy()
    return label


def semantic_map(sample: Sample) -> Tensor:
    """The label of each pixel, uint8 [H, W]: 0 = a thing or a crowd of them, 1.. = stuff, 255 = void."""
    runs = runs_of(sample.segments.numpy())
    return torch.from_numpy(runs.map_of(_semantic_labels(sample)[runs.value], sample.size))


def make_target(sample: Sample) -> Target:
    """Turns an annotated image into what the losses compare with.

    Crowd regions and segments without a pixel are no instances. A crowd region of things is the semantic label 0, as
    in detectron2.
    """
    count = len(sample.label)
    runs = runs_of(sample.segments.numpy())
    boxes, areas = _boxes_of(runs, sample.size[1], count)
    chosen = np.flatnonzero((sample.isthing & ~sample.crowd).numpy() & (areas > 0))
    number = np.zeros(count + 1, np.int32)
    number[chosen + 1] = np.arange(1, len(chosen) + 1)
    return Target(
        torch.from_numpy(boxes[chosen].astype(np.float32)),
        sample.label[torch.from_numpy(chosen)],
        torch.from_numpy(runs.map_of(number[runs.value], sample.size)),
        torch.from_numpy(runs.map_of(_semantic_labels(sample)[runs.value], sample.size)),
    )
