"""Random transforms of annotated images. Each takes its random numbers from the given generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from panfpn_fast.data.images import resize_shortest_edge, resized_shape
from panfpn_fast.data.sample import IGNORE, Sample, segment_boxes, semantic_map

# detectron2 draws at most this many windows to find one in which no class exceeds its share.
_CROP_TRIES = 10


class Transform(Protocol):
    """A function of a sample, which may be random."""

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Returns the changed sample. The given sample is not modified."""
        ...


def _nearest(old: int, new: int) -> npt.NDArray[np.int64]:
    """Returns the index of the nearest of `old` pixels for each of `new` pixels.

    The positions are summed step by step as in Pillow, so ties are resolved equally.
    """
    step = old / new
    steps = np.full(new, step)
    steps[0] = step * 0.5
    return np.minimum(np.cumsum(steps).astype(np.int64), old - 1)


class KeepBoxes:
    """Finds the boxes of the segments, which the transforms that follow resize and mirror.

    Without this transform, the boxes of the target are those of the segments after all transforms.
    """

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Sets the boxes."""
        return replace(sample, boxes=segment_boxes(sample.segments, len(sample.label))[0].double())


class Resize:
    """Resizes so that the shorter edge has one of the given lengths.

    Args:
        short_edges: The lengths to choose from in pixels or, if `continuous`, the minimum and the maximum.
        max_edge: Upper limit for the longer edge in pixels.
        continuous: Whether every integer between the minimum and the maximum can be chosen.
        resize: "detectron2" or "mmdetection", as in the configuration of the network.

    Note:
        Images are resized by `resize_shortest_edge` and segments by the nearest pixel, as in detectron2.
    """

    def __init__(
        self,
        short_edges: Sequence[int],
        max_edge: int,
        continuous: bool = False,
        resize: str = "detectron2",
    ) -> None:
        if not short_edges or min(short_edges) < 1 or (continuous and len(short_edges) != 2):
            raise ValueError(
                f"short_edges: expected positive lengths, exactly two if continuous, got {short_edges}"
            )
        self.short_edges = tuple(short_edges)
        self.max_edge = max_edge
        self.continuous = continuous
        self.resize = resize

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Resizes the image and the segments."""
        if self.continuous:
            short_edge = int(random.integers(self.short_edges[0], self.short_edges[1] + 1))
        else:
            short_edge = int(random.choice(self.short_edges))
        height, width = resized_shape(*sample.size, short_edge, self.max_edge, self.resize)
        if (height, width) == sample.size:
            return sample
        pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        image = resize_shortest_edge(pixels, short_edge, self.max_edge, self.resize)
        rows, columns = (_nearest(old, new) for old, new in zip(sample.size, (height, width), strict=True))
        boxes = sample.boxes
        if boxes is not None:
            y, x = height / sample.size[0], width / sample.size[1]
            boxes = boxes * boxes.new_tensor([x, y, x, y])
        return replace(
            sample,
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            segments=torch.from_numpy(sample.segments.numpy()[:, columns][rows]),
            boxes=boxes,
        )


class Flip:
    """Flips horizontally with a given probability."""

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Flips the image and the segments, or returns the sample unchanged."""
        if random.random() >= self.probability:
            return sample
        boxes = sample.boxes
        if boxes is not None:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([sample.size[1] - x2, y1, sample.size[1] - x1, y2], dim=1)
        return replace(sample, image=sample.image.flip(2), segments=sample.segments.flip(1), boxes=boxes)


class QuarterTurn:
    """Rotates by 0, 90, 180 or 270 degrees, each with the same probability."""

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Rotates the image and the segments counterclockwise."""
        turns = int(random.integers(4))
        boxes, width = sample.boxes, sample.size[1]
        for _ in range(turns if boxes is not None else 0):
            assert boxes is not None
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([y1, width - x2, y2, width - x1], dim=1)
            width = sum(sample.size) - width
        return replace(
            sample,
            image=sample.image.rot90(turns, (1, 2)).contiguous(),
            segments=sample.segments.rot90(turns, (0, 1)).contiguous(),
            boxes=boxes,
        )


class Crop:
    """Crops a random window of a fixed size, or of the size of the image along axes where the image is smaller.

    The sample loses its boxes, because the rest of a segment may be smaller than the rest of its box. detectron2 also
    computes boxes anew after a crop.

    Args:
        size: Height and width in pixels.
        most_of_one_class: Maximum share of one semantic class in the window. As in detectron2, up to ten windows are
            drawn to satisfy it; 1 accepts the first.
    """

    def __init__(self, size: tuple[int, int], most_of_one_class: float = 1.0) -> None:
        self.size = size
        self.most_of_one_class = most_of_one_class

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Crops the image and the segments."""
        height, width = (min(wanted, have) for wanted, have in zip(self.size, sample.size, strict=True))
        semantic = semantic_map(sample) if self.most_of_one_class < 1 else None
        rows, columns = slice(0, height), slice(0, width)
        for _ in range(_CROP_TRIES):
            top = int(random.integers(sample.size[0] - height + 1))
            left = int(random.integers(sample.size[1] - width + 1))
            rows, columns = slice(top, top + height), slice(left, left + width)
            if semantic is None:
                break
            labels = semantic[rows, columns]
            counts = torch.bincount(labels[labels != IGNORE])
            if (counts > 0).sum() > 1 and counts.max() <= self.most_of_one_class * counts.sum():
                break
        return replace(
            sample,
            image=sample.image[:, rows, columns].contiguous(),
            segments=sample.segments[rows, columns].contiguous(),
            boxes=None,
        )


class Exposure:
    """Multiplies all values by a random factor, as a longer or shorter exposure does.

    Dark backgrounds stay dark, unlike with `Photometric`, so it suits fluorescence microscopy.

    Args:
        most: Largest factor; the smallest is 1 / `most`. The logarithm of the factor is uniform.
    """

    def __init__(self, most: float = 2.0) -> None:
        self.most = most

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Changes the image; the segments stay the same."""
        factor = self.most ** float(random.uniform(-1, 1))
        image = (sample.image.float() * factor).round_().clamp_(0, 255).to(torch.uint8)
        return replace(sample, image=image)


class Photometric:
    """Changes brightness, contrast and saturation at random.

    Args:
        brightness: Maximum offset of all values in both directions, as a share of 255.
        contrast: The difference from the mean value is scaled by a factor in 1 - contrast to 1 + contrast.
        saturation: The difference from gray is scaled by a factor in 1 - saturation to 1 + saturation.
    """

    def __init__(self, brightness: float = 0.125, contrast: float = 0.5, saturation: float = 0.5) -> None:
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Changes the image; the segments stay the same."""
        x = sample.image.float()
        x += 255 * float(random.uniform(-self.brightness, self.brightness))
        mean = x.mean()
        x.sub_(mean).mul_(float(random.uniform(1 - self.contrast, 1 + self.contrast))).add_(mean)
        grey = torch.tensordot(x.new_tensor([0.299, 0.587, 0.114]), x, 1)
        x.sub_(grey).mul_(float(random.uniform(1 - self.saturation, 1 + self.saturation))).add_(grey)
        return replace(sample, image=x.round_().clamp_(0, 255).to(torch.uint8))


class Compose:
    """Applies transforms in sequence."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Applies all transforms."""
        for transform in self.transforms:
            sample = transform(sample, random)
        return sample
