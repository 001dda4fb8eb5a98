"""Reads datasets in COCO's panoptic format: images, a PNG of segment ids per image, and a JSON of all segments."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from panfpn_fast.data.categories import Categories, to_categories
from panfpn_fast.data.coco_ids import decode_panoptic
from panfpn_fast.data.files import DataError, check_same_size, read_segment_ids
from panfpn_fast.data.images import read_image
from panfpn_fast.data.panoptic_json import Annotation, PanopticJson, Segment, check_area
from panfpn_fast.data.sample import Sample, runs_of

_PathLike = str | os.PathLike[str]


class CocoPanopticDataset:
    """Images with panoptic annotations.

    Args:
        image_folder: Directory of the images.
        annotation_json: The JSON file with `images`, `annotations` and `categories`.
        annotation_folder: Directory of the PNGs; None selects the path of the JSON file without its suffix.
        categories: The classes, or a name for `get_categories`; None selects the classes in the JSON file.

    Raises:
        MissingFileError: If the JSON does not exist.
        DataError: If the JSON is damaged, lacks a field or has one with a wrong value, or gives a class of `categories`
            another name or kind. The message names the file, the entry and the field.
        ValueError: If `categories` is anything else.

    Note:
        A sample's segments are checked when it is loaded. They must have the same ids as its PNG, and every category
        must be known. An area may not be below the segment's number of pixels, which would give qualities above 1. The
        PNG must fit the upright image, because the Exif orientation of images is applied. The format:
        cocodataset.org/#format-data, "Panoptic Segmentation".
    """

    def __init__(
        self,
        image_folder: _PathLike,
        annotation_json: _PathLike,
        annotation_folder: _PathLike | None = None,
        categories: Categories | str | None = None,
    ) -> None:
        self.image_folder = Path(image_folder)
        self.annotation_json = Path(annotation_json)
        self.annotation_folder = (
            self.annotation_json.with_suffix("") if annotation_folder is None else Path(annotation_folder)
        )
        self._json = PanopticJson(self.annotation_json)
        self._image_names = self._json.image_names()
        if categories is None:
            self.categories = self._json.categories()
        else:
            self.categories = to_categories(categories)
            self._json.check_categories(self.categories)
        self._things = {category.id: i for i, category in enumerate(self.categories.things)}
        self._stuff = {category.id: i + 1 for i, category in enumerate(self.categories.stuff)}

    def __len__(self) -> int:
        """Returns the number of annotated images."""
        return len(self._image_names)

    def load(self, index: int) -> Sample:
        """Reads one image and its annotation.

        Raises:
            MissingFileError: If the image or its PNG does not exist.
            DataError: If a file is damaged, sizes differ, an id or a category is unknown, or an area is too small.
        """
        annotation = self._json.annotations[index]
        image_path = self.image_folder / self._image_names[index]
        png_path = self.annotation_folder / annotation.file_name
        image, colors = read_image(image_path), read_segment_ids(png_path)
        check_same_size(image, image_path, colors, png_path)
        table = self._json.segments(annotation, self._things.keys() | self._stuff.keys())
        isthing, label, crowd, area = [], [], [], []
        for segment in table:
            category = segment.category_id
            isthing.append(category in self._things)
            label.append(self._things.get(category, self._stuff.get(category, 0)))
            crowd.append(bool(segment.iscrowd))
            area.append(segment.area)
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            segments=torch.from_numpy(self._rows_of(decode_panoptic(colors), table, annotation, png_path)),
            isthing=torch.tensor(isthing, dtype=torch.bool, device="cpu"),
            label=torch.tensor(label, dtype=torch.int64, device="cpu"),
            crowd=torch.tensor(crowd, dtype=torch.bool, device="cpu"),
            area=torch.tensor(area, dtype=torch.float64, device="cpu"),
            image_id=annotation.image_id,
            file_name=str(image_path),
        )

    def _rows_of(
        self, ids: npt.NDArray[np.int32], table: list[Segment], annotation: Annotation, path: Path
    ) -> npt.NDArray[np.int32]:
        """Replaces each id by 1 + its row in the table, and keeps 0; checks ids and areas."""
        known = np.array([0, *(segment.id for segment in table)], dtype=np.int64)
        order = np.argsort(known, kind="stable")
        runs = runs_of(ids)
        position = np.minimum(np.searchsorted(known[order], runs.value), len(known) - 1)
        rows = order[position]
        unknown = runs.value[known[rows] != runs.value]
        if unknown.size:
            raise DataError(f"{path}: segment {unknown[0]} is missing from segments_info in the JSON")
        pixels = np.bincount(rows, runs.length, len(known))[1:].astype(np.int64)
        where = f"{self.annotation_json}: image {annotation.image_id}"
        for segment, count in zip(table, pixels.tolist(), strict=True):
            if count == 0:
                raise DataError(f"{path}: segment {segment.id} of segments_info in the JSON has no pixels")
            check_area(where, segment.id, segment.area, count)
        return runs.map_of(rows.astype(np.int32), ids.shape)
