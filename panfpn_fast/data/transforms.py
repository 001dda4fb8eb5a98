"""Random changes of annotated images; each takes its random numbers from the generator that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from panfpn_fast.data.sample import IGNORE, Sample, semantic_map
from panfpn_fast.inference.preprocess import resize_shortest_edge, resized_shape

# detectron2 tries this often to find a crop in which no class has more than its share.
_CROP_TRIES = 10


class Transform(Protocol):
    """What changes a sample, by random numbers or not."""

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Returns the changed sample; the given one stays as it is."""
        ...


def _nearest(old: int, new: int) -> npt.NDArray[np.int64]:
    """Which of `old` pixels each of `new` ones takes; summed step by step as Pillow does, so that ties are the same."""
    step = old / new
    steps = np.full(new, step)
    steps[0] = step * 0.5
    return np.minimum(np.cumsum(steps).astype(np.int64), old - 1)


class Resize:
    """Resizes so that the shorter edge has one of the given lengths.

    Args:
        short_edges: One length, several to choose from, or, with `continuous`, the least and the greatest.
        max_edge: Upper limit for the longer edge.
        continuous: Any whole number between the two is chosen.
        resize: Whose way of resizing, as the network's configuration says.

    Note:
        Images as `resize_shortest_edge`, segments by the nearest pixel, as detectron2.
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
                f"short_edges: expected positive numbers, two of them if continuous, got {short_edges}"
            )
        self.short_edges = tuple(short_edges)
        self.max_edge = max_edge
        self.continuous = continuous
        self.resize = resize

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Resizes both maps."""
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
        return replace(
            sample,
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            segments=torch.from_numpy(sample.segments.numpy()[:, columns][rows]),
        )


class Flip:
    """Mirrors left and right with a probability."""

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Mirrors both maps, or neither."""
        if random.random() >= self.probability:
            return sample
        return replace(sample, image=sample.image.flip(2), segments=sample.segments.flip(1))


class Crop:
    """Cuts out a window of a fixed size, or what the image has of it.

    Args:
        size: Height and width.
        most_of_one_class: The window is drawn again (up to ten times) while one semantic class has a greater share of
            it than this, as in detectron2; 1 takes the first.
    """

    def __init__(self, size: tuple[int, int], most_of_one_class: float = 1.0) -> None:
        self.size = size
        self.most_of_one_class = most_of_one_class

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Cuts both maps."""
        height, width = (min(wanted, have) for wanted, have in zip(self.size, sample.size, strict=True))
        semantic = semantic_map(sample) if self.most_of_one_class < 1 else None
        rows, columns = slice(0, height), slice(0, width)
        for _ in range(_CROP_TRIES):
            top = int(random.integers(sample.size[0] - height + 1))
            left = int(random.integers(sample.size[1] - width + 1))
            rows, columns = slice(top, top + height), slice(left, left + width)
            if semantic is None:
                break
            counts = torch.bincount(semantic[rows, columns].flatten(), minlength=256)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() <= self.most_of_one_class * counts.sum():
                break
        return replace(
            sample,
            image=sample.image[:, rows, columns].contiguous(),
            segments=sample.segments[rows, columns].contiguous(),
        )


class Photometric:
    """Changes brightness, contrast, saturation and hue-free colour balance at random.

    Args:
        brightness: Added, as a share of 255: up to this in either direction.
        contrast: The distance from the mean colour is scaled by 1 - contrast to 1 + contrast.
        saturation: The same for the distance from grey.
    """

    def __init__(self, brightness: float = 0.125, contrast: float = 0.5, saturation: float = 0.5) -> None:
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Changes the image alone."""
        x = sample.image.float()
        x += 255 * float(random.uniform(-self.brightness, self.brightness))
        mean = x.mean()
        x.sub_(mean).mul_(float(random.uniform(1 - self.contrast, 1 + self.contrast))).add_(mean)
        grey = torch.tensordot(x.new_tensor([0.299, 0.587, 0.114]), x, 1)
        x.sub_(grey).mul_(float(random.uniform(1 - self.saturation, 1 + self.saturation))).add_(grey)
        return replace(sample, image=x.round_().clamp_(0, 255).to(torch.uint8))


class Compose:
    """Applies transforms one after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Applies all."""
        for transform in self.transforms:
            sample = transform(sample, random)
        return sample
