"""Reads a whole data set and counts what is in it: images, segments, pixels, and files that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from panfpn_fast.data.categories import Categories, class_list
from panfpn_fast.data.files import DataError
from panfpn_fast.data.loader import PanopticDataset
from panfpn_fast.data.sample import Sample, segment_boxes


@dataclass
class ClassCount:
    """Counts of one class.

    Attributes:
        images: Number of images with the class.
        segments: Number of its segments: instances of a thing without crowd regions, one per image of stuff.
        crowds: Number of its crowd regions.
        pixels: Number of its pixels.
        smallest: Shorter edge of the smallest box around an instance, in pixels; 0 without instances.
        largest: Longer edge of the largest box around an instance, in pixels; 0 without instances.
    """

    images: int = 0
    segments: int = 0
    crowds: int = 0
    pixels: int = 0
    smallest: int = 0
    largest: int = 0


@dataclass
class Survey:
    """Counts of a data set.

    Attributes:
        categories: The classes.
        images: Number of images that were read.
        empty: Number of images without a thing.
        pixels: Number of pixels of all images.
        void: Number of their pixels without a class.
        sizes: Smallest and largest height and width of the images: (h, w) and (h, w).
        most: Largest number of instances in one image.
        classes: Counts by the id of the class.
        broken: A message for each image that cannot be read.
    """

    categories: Categories
    images: int = 0
    empty: int = 0
    pixels: int = 0
    void: int = 0
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    most: int = 0
    classes: dict[int, ClassCount] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Counts an image."""
        height, width = sample.size
        low, high = self.sizes if self.images else (sample.size, sample.size)
        self.sizes = (min(low[0], height), min(low[1], width)), (max(high[0], height), max(high[1], width))
        self.images += 1
        self.pixels += height * width
        self.void += int((sample.segments == 0).sum())
        boxes, areas = segment_boxes(sample.segments, len(sample.label))
        seen = set()
        rows = zip(
            sample.classes(self.categories),
            sample.crowd.tolist(),
            boxes.tolist(),
            areas.tolist(),
            strict=True,
        )
        for category, crowd, (x1, y1, x2, y2), area in rows:
            count = self.classes.setdefault(category.id, ClassCount())
            if area == 0:
                continue
            count.pixels += area
            count.segments += not crowd
            count.crowds += crowd
            if category.isthing and not crowd:
                least = min(x2 - x1, y2 - y1)
                count.smallest = min(count.smallest, least) if count.smallest else least
                count.largest = max(count.largest, x2 - x1, y2 - y1)
            seen.add(category.id)
        for id_ in seen:
            self.classes[id_].images += 1
        instances = int((sample.isthing & ~sample.crowd).sum())
        self.most = max(self.most, instances)
        self.empty += not sample.isthing.any()

    def table(self) -> str:
        """Returns the counts of each class that occurs as text, and a list of those that do not."""
        lines = [
            f"{'id':>6}  {'class':<24}{'kind':<7}{'images':>8}{'segments':>10}{'crowds':>8}{'pixels':>9}  edges"
        ]
        absent = []
        for category in self.categories.all:
            count = self.classes.get(category.id, ClassCount())
            if not count.images:
                absent.append(category)
                continue
            share = 100 * count.pixels / max(self.pixels, 1)
            edges = f"{count.smallest}..{count.largest}" if count.largest else ""
            kind = "thing" if category.isthing else "stuff"
            lines.append(
                f"{category.id:>6}  {category.name[:23]:<24}{kind:<7}{count.images:>8}{count.segments:>10}"
                f"{count.crowds:>8}{share:>8.2f}%  {edges}".rstrip()
            )
        if absent:
            many = len(absent) > 1
            lines.append(
                f"{len(absent)} {'classes do' if many else 'class does'} not occur: {class_list(absent)}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        """Returns all counts as text, without the broken images."""
        (low_height, low_width), (high_height, high_width) = self.sizes
        head = (
            f"{self.images} image{'s' * (self.images != 1)}, {low_width} to {high_width} pixels wide and "
            f"{low_height} to {high_height} high; "
            f"{self.empty} without things; at most {self.most} instances in one; "
            f"{100 * self.void / max(self.pixels, 1):.2f}% void"
        )
        return f"{head}\n{self.table()}"


def survey(dataset: PanopticDataset, on_sample: Callable[[int, Sample], None] | None = None) -> Survey:
    """Reads all images of a data set.

    Args:
        dataset: The data set.
        on_sample: Called with the number and the content of each image that was read.

    Returns:
        The counts; images that cannot be read are in `broken`.
    """
    found = Survey(dataset.categories)
    for index in range(len(dataset)):
        try:
            sample = dataset.load(index)
        except (DataError, OSError) as error:
            found.broken.append(str(error))
            continue
        found.add(sample)
        if on_sample is not None:
            on_sample(index, sample)
    return found
