"""Paints annotated regions, which may overlap, into the map of a `Sample`, in which each pixel has one segment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from panfpn_fast.data.categories import Categories
from panfpn_fast.data.polygons import Rle, bitmap
from panfpn_fast.data.rules import BACKGROUND, ReadingRules
from panfpn_fast.data.sample import Sample

Row = tuple[bool, int, bool]
"""A segment in the table of a `Sample`: whether it is a thing, its label, whether it is a crowd region."""


class Region(NamedTuple):
    """An annotated region.

    Attributes:
        category_id: Id of its class; None makes its pixels void.
        mask: Its pixels.
        crowd: Whether it is a region of several things that are not annotated separately.
    """

    category_id: int | None
    mask: Rle
    crowd: bool = False


class SegmentTable:
    """The segments of an image. All regions of one stuff class are one segment.

    Attributes:
        rows: The segments; segment k + 1 is row k.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._stuff: dict[int, int] = {}

    def number(self, row: Row) -> int:
        """Returns the number of the segment of a region: a new one, or that of its stuff class."""
        isthing, label, _ = row
        new = len(self.rows) + 1
        number = new if isthing else self._stuff.setdefault(label, new)
        if number == new:
            self.rows.append(row)
        return number


class Painter:
    """Makes samples of images whose annotations are regions.

    Args:
        categories: The classes.
        rules: With the background "stuff", pixels that no region covers are the stuff class "background", if there is
            one; otherwise they are void.

    Note:
        Where regions overlap, things cover stuff, smaller regions cover larger ones, and crowd regions are below other
        things. Void regions cover everything. All regions of one stuff class are one segment. Regions of which no pixel
        is visible are left out.
    """

    def __init__(self, categories: Categories, rules: ReadingRules) -> None:
        self._rows: dict[int, tuple[bool, int]] = {}
        self._rows |= {c.id: (True, i) for i, c in enumerate(categories.things)}
        self._rows |= {c.id: (False, i + 1) for i, c in enumerate(categories.stuff)}
        self._background = None
        if rules.background == "stuff":
            self._background = next((c.id for c in categories.stuff if c.name == BACKGROUND), None)

    def background(self) -> Row | None:
        """Returns the segment of the pixels that nothing covers, or None if they are void."""
        return None if self._background is None else self.row(self._background, False)

    def row(self, category_id: int, crowd: bool) -> Row:
        """Returns the segment of a region; stuff has no crowd regions."""
        isthing, label = self._rows[category_id]
        return isthing, label, crowd and isthing

    def paint(
        self, image: npt.NDArray[np.uint8], regions: Sequence[Region], image_id: int | str, image_path: Path
    ) -> Sample:
        """Paints the regions of an image [H, W, 3]; each class must be known."""
        segments = np.zeros(image.shape[:2], np.int32)
        table = SegmentTable()
        if (background := self.background()) is not None:
            segments[:] = table.number(background)
        painted = [(region, *bitmap(region.mask)) for region in regions]
        painted.sort(key=lambda one: self._order(one[0], int(one[3].sum())))
        for region, top, left, mask in painted:
            id_, crowd = region.category_id, region.crowd
            segments[top, left][mask] = 0 if id_ is None else table.number(self.row(id_, crowd))
        return make_sample(image, segments, table.rows, image_id, image_path)

    def _order(self, region: Region, area: int) -> tuple[int, int]:
        if region.category_id is None:
            return 3, 0
        isthing, _, crowd = self.row(region.category_id, region.crowd)
        return (2 - crowd if isthing else 0), -area


def make_sample(
    image: npt.NDArray[np.uint8],
    segments: npt.NDArray[np.int32],
    rows: Sequence[Row],
    image_id: int | str,
    image_path: Path,
) -> Sample:
    """Makes a sample from a map in which k + 1 is row k; counts the areas, and drops rows without pixels.

    Args:
        image: uint8 [H, W, 3].
        segments: int32 [H, W].
        rows: The segments.
        image_id: Id of the image.
        image_path: File of the image.
    """
    counts = np.bincount(segments.ravel(), minlength=len(rows) + 1)[1:]
    kept: list[int] = np.flatnonzero(counts).tolist()
    if len(kept) < len(rows):
        number = np.zeros(len(rows) + 1, np.int32)
        number[np.array(kept, np.int64) + 1] = np.arange(1, len(kept) + 1)
        segments = number[segments]
    isthing, label, crowd = zip(*(rows[k] for k in kept), strict=True) if kept else ((), (), ())
    return Sample(
        image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        segments=torch.from_numpy(segments),
        isthing=torch.tensor(isthing, dtype=torch.bool, device="cpu"),
        label=torch.tensor(label, dtype=torch.int64, device="cpu"),
        crowd=torch.tensor(crowd, dtype=torch.bool, device="cpu"),
        area=torch.from_numpy(counts[kept].astype(np.int64)),
        image_id=image_id,
        file_name=str(image_path),
    )
