"""One segment of a panoptic map, with its mask, box, polygons and run lengths."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.data.sample import boxes_of, runs_of
from panfpn_fast.inference.polygons import mask_polygons

__all__ = ["Segment"]


@dataclass(frozen=True)
class Segment:
    """One region of a panoptic map: a thing instance, or all pixels of one stuff class.

    A segment of a `PanopticResult` refers to the result's map. Its mask, box, polygons and run lengths are computed
    from the map each time they are asked for, so segments take no memory.

    Attributes:
        id: Value of its pixels in `PanopticResult.panoptic`, from 1.
        category_id: Id of its class in the data set (COCO panoptic: 1..200).
        name: Name of its class in the data set.
        isthing: True for an instance of a thing, False for stuff.
        class_index: Index of its class among the things or among the stuff, from 0.
        score: Confidence of the detection, 0..1; None for stuff, which has no score.
        area: Number of its pixels in the map, at least 1.
        instance: Its row in `PanopticResult.instances`; None for stuff.

    Example:
        >>> from panfpn_fast.inference import Instances, PanopticResult
        >>> from panfpn_fast.data import get_categories
        >>> panoptic = torch.tensor([[0, 0, 1], [0, 1, 1]], dtype=torch.int32)
        >>> nothing = Instances(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 28, 28))
        >>> sky = Segment(1, 187, "sky-other-merged", False, 39, None, 3)
        >>> coco = get_categories("coco_panoptic")
        >>> [sky] = PanopticResult(panoptic, [sky], nothing, torch.zeros(2, 3).byte(), coco).segments
        >>> sky.bbox, sky.mask.sum().item(), sky.polygons()
        ((1, 0, 2, 2), 3, [[2, 0, 3, 0, 3, 2, 1, 2, 1, 1, 2, 1]])
    """

    id: int
    category_id: int
    name: str
    isthing: bool
    class_index: int
    score: float | None
    area: int
    instance: int | None = None
    # No field, so that dataclasses.asdict gives the table's columns alone.
    _panoptic: ClassVar[Tensor | None] = None

    @property
    def mask(self) -> Tensor:
        """Its pixels, a new tensor bool [H, W]; they belong to no other segment.

        Raises:
            ValueError: If the segment belongs to no result.
        """
        return self._map() == self.id

    @property
    def bbox(self) -> tuple[int, int, int, int]:
        """The smallest box that contains its pixels, (x, y, width, height) in pixels as in COCO's annotations.

        Unlike the row of `PanopticResult.instances.boxes`, which the network predicts, it ends where the pixels end.

        Raises:
            ValueError: If the segment belongs to no result.
        """
        x, y, crop = self._crop()
        return x, y, crop.shape[1], crop.shape[0]

    def polygons(self) -> list[list[int]]:
        """Returns polygons that cover exactly the pixels of the mask, along the pixels' edges.

        Returns:
            A polygon [x1, y1, x2, y2, ...] for each connected group of pixels, in the format of `segmentation` in
            COCO's annotations. Pixel (x, y) is the square between (x, y) and (x + 1, y + 1). A hole is joined to the
            outline around it by a cut. pycocotools converts the polygons back to the same mask.

        Raises:
            ValueError: If the segment belongs to no result.
        """
        x, y, crop = self._crop()
        offset = (x, y)
        return [
            [side + offset[place % 2] for place, side in enumerate(polygon)]
            for polygon in mask_polygons(crop)
        ]

    def rle(self) -> dict[str, Any]:
        """Returns the mask as COCO's compressed run lengths, which pycocotools reads.

        Returns:
            {"size": [H, W], "counts": bytes}, byte for byte as pycocotools.mask.encode writes them. For JSON, decode
            `counts` as ASCII.

        Raises:
            ValueError: If the segment belongs to no result.
        """
        return self._rle(*self._crop())

    def _rle(self, x: int, y: int, crop: npt.NDArray[np.bool_]) -> dict[str, Any]:
        # Pasted into a box of its own size, a mask stays as it is.
        box = torch.tensor([[x, y, x + crop.shape[1], y + crop.shape[0]]], dtype=torch.float32)
        mask = torch.from_numpy(crop) if crop.size else torch.zeros(1, 1, dtype=torch.bool)
        [rle] = ops.paste_masks_rle(mask[None], box, list(self._map().shape))
        return rle

    def _bound_to(self, panoptic: Tensor) -> Segment:
        """Returns a copy that refers to a map."""
        bound = copy.copy(self)
        object.__setattr__(bound, "_panoptic", panoptic)
        return bound

    def _map(self) -> Tensor:
        if self._panoptic is None:
            raise ValueError(
                f"segment {self.id}: expected a segment of a PanopticResult, got one without a map; "
                "take it from result.segments"
            )
        return self._panoptic

    def _crop(self) -> tuple[int, int, npt.NDArray[np.bool_]]:
        """Returns the left and the upper end of the segment, and the mask between its ends."""
        mask = self._map().numpy() == self.id
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if not len(rows):  # the map was changed
            return 0, 0, mask[:0, :0]
        y, x = int(rows[0]), int(columns[0])
        return x, y, mask[y : int(rows[-1]) + 1, x : int(columns[-1]) + 1]


class Region(NamedTuple):
    """A segment, its box (x, y, width, height), and the mask [height, width] inside the box."""

    segment: Segment
    box: tuple[int, int, int, int]
    crop: npt.NDArray[np.bool_]

    def rle(self) -> dict[str, Any]:
        """Returns the same as `Segment.rle`."""
        return self.segment._rle(*self.box[:2], self.crop)


def regions(panoptic: Tensor, segments: Sequence[Segment]) -> Iterator[Region]:
    """Finds the pixels of all segments, and reads the whole map once instead of once for each segment.

    Args:
        panoptic: int32 [H, W].
        segments: Segments of the map.
    """
    pixels = panoptic.numpy()
    runs = runs_of(pixels)
    ids, places = np.unique(runs.value, return_inverse=True)
    boxes, _ = boxes_of(runs._replace(value=places + 1), pixels.shape[1], len(ids))
    box_of = dict(zip(ids.tolist(), boxes.tolist(), strict=True))
    for segment in segments:
        x1, y1, x2, y2 = box_of.get(segment.id, (0, 0, 0, 0))  # absent if the map was changed
        yield Region(segment, (x1, y1, x2 - x1, y2 - y1), pixels[y1:y2, x1:x2] == segment.id)
