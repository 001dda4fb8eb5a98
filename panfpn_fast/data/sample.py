"""Annotated images and the training targets made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from panfpn_fast.data.categories import Categories, Category

IGNORE = -1
"""Semantic label of void pixels, which the losses ignore; never a class, however many classes there are."""

_SEMANTIC = np.int16  # holds the at most 4095 stuff classes of a `Categories` object


@dataclass
class Sample:
    """One annotated image. Transforms change the two maps and the boxes, and keep the table of segments.

    Attributes:
        image: uint8 [3, H, W], RGB.
        segments: int32 [H, W]; 0 is void, k + 1 is row k of the table.
        isthing: bool [S]; whether each segment is a thing. First column of the table.
        label: int64 [S]; class among the things (from 0) or semantic label among the stuff (from 1).
        crowd: bool [S]; whether each segment is a region of several things that are not annotated separately.
        area: int64 or float64 [S]; number of pixels of each segment according to the dataset, before all transforms.
        image_id: Id of the image in the dataset.
        file_name: Name of the image in messages.
        boxes: float64 [S, 4]; x1, y1, x2, y2 of each segment; None if the boxes are those of the segments in the map.
    """

    image: Tensor
    segments: Tensor
    isthing: Tensor
    label: Tensor
    crowd: Tensor
    area: Tensor
    image_id: int | str
    file_name: str
    boxes: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[1], self.image.shape[2]

    def classes(self, categories: Categories) -> list[Category]:
        """Returns the class of each row of the table."""
        return [
            categories.things[label] if isthing else categories.stuff[label - 1]
            for isthing, label in zip(self.isthing.tolist(), self.label.tolist(), strict=True)
        ]


class Target(NamedTuple):
    """Training target of one image.

    Attributes:
        boxes: float32 [N, 4]; x1, y1, x2, y2 of each instance, where x2 of a box around a mask is the last column plus
            1.
        classes: int64 [N]; class among the things, from 0.
        instances: int16 [H, W], or int32 above 32767 instances; n + 1 is instance n, and 0 is everything else.
        semantic: int16 [H, W]; 0 is a thing, 1.. is stuff, -1 is void.
    """

    boxes: Tensor
    classes: Tensor
    instances: Tensor
    semantic: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Target:
        """Copies the tensors to a device."""
        return Target(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class Runs(NamedTuple):
    """A map as runs of equal values along its rows. There are far fewer runs than pixels.

    Attributes:
        value: [R]; value of each run.
        start: int64 [R]; index of the first pixel of each run, counted row by row.
        length: int64 [R]; number of pixels of each run.
    """

    value: npt.NDArray[Any]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]

    def map_of(self, value: npt.NDArray[Any], shape: tuple[int, int]) -> npt.NDArray[Any]:
        """Returns the map that has the given value in each run."""
        return np.repeat(value, self.length).reshape(shape)


def runs_of(values: npt.NDArray[Any]) -> Runs:
    """Finds the runs of a map [H, W]. A run ends at the end of its row."""
    begins = np.ones(values.shape, dtype=bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=begins[:, 1:])
    start = np.flatnonzero(begins)
    return Runs(values.ravel()[start], start, np.diff(start, append=values.size))


def boxes_of(runs: Runs, width: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Computes the boxes and areas of the segments in a map from its runs; see `segment_boxes`."""
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
    """Computes the boxes and areas of the segments in a map.

    Args:
        segments: Integer [H, W]; k + 1 is segment k.
        count: Number of segments.

    Returns:
        Boxes x1, y1, x2, y2 as int64 [count, 4], and areas as int64 [count]. A segment without pixels has the area 0
        and an arbitrary box.

    Example:
        >>> boxes, areas = segment_boxes(torch.tensor([[0, 1, 1], [0, 0, 1]]), 1)
        >>> boxes.tolist(), areas.tolist()
        ([[1, 0, 3, 2]], [3])
    """
    boxes, areas = boxes_of(runs_of(segments.numpy()), segments.shape[1], count)
    return torch.from_numpy(np.ascontiguousarray(boxes)), torch.from_numpy(areas)


def _semantic_labels(sample: Sample) -> npt.NDArray[np.int16]:
    """Returns the semantic labels of void and of each segment."""
    label = np.full(len(sample.label) + 1, IGNORE, _SEMANTIC)
    label[1:] = torch.where(sample.isthing, 0, sample.label).numpy()
    return label


def semantic_map(sample: Sample) -> Tensor:
    """Returns the label of each pixel, int16 [H, W]: 0 is a thing or a crowd region, 1.. is stuff, -1 is void."""
    runs = runs_of(sample.segments.numpy())
    return torch.from_numpy(runs.map_of(_semantic_labels(sample)[runs.value], sample.size))


def make_target(sample: Sample) -> Target:
    """Makes the training target of an annotated image.

    Crowd regions and segments without pixels are not instances. A crowd region of things has the semantic label 0, as
    in detectron2. The boxes are those of the sample or, if it has none, those of the segments in its map.
    """
    count = len(sample.label)
    runs = runs_of(sample.segments.numpy())
    boxes, areas = boxes_of(runs, sample.size[1], count)
    if sample.boxes is not None:
        boxes = sample.boxes.numpy()
    chosen = np.flatnonzero((sample.isthing & ~sample.crowd).numpy() & (areas > 0))
    # Maps are sent between processes, so they are as narrow as possible.
    number = np.zeros(count + 1, np.int16 if len(chosen) <= np.iinfo(np.int16).max else np.int32)
    number[chosen + 1] = np.arange(1, len(chosen) + 1)
    return Target(
        torch.from_numpy(boxes[chosen].astype(np.float32)),
        sample.label[torch.from_numpy(chosen)],
        torch.from_numpy(runs.map_of(number[runs.value], sample.size)),
        torch.from_numpy(runs.map_of(_semantic_labels(sample)[runs.value], sample.size)),
    )
