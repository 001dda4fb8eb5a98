"""Data sets in COCO's panoptic format: images, a PNG of segment ids for each, and a JSON that names the segments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from panfpn_fast.data.categories import Categories, Category, get_categories, register_categories
from panfpn_fast.data.files import DataError, check_same_size, read_panoptic_json, read_rgb
from panfpn_fast.data.sample import Sample, runs_of

_PathLike = str | os.PathLike[str]


class CocoPanopticDataset:
    """Images with panoptic annotations.

    Args:
        image_folder: Where the images are.
        annotation_json: The JSON: `images`, `annotations`, `categories`.
        annotation_folder: Where the PNGs are; by default the JSON's name without its suffix.
        categories: Name of a known data set, or None: those that the JSON lists.

    Raises:
        MissingFileError: There is no such JSON.
        DataError: It is damaged or lacks a part.

    Note:
        A sample's segments are checked against its PNG when it is loaded: both must have the same ids, and every
        category must be known. The format: cocodataset.org/#format-data, "Panoptic Segmentation".
    """

    def __init__(
        self,
        image_folder: _PathLike,
        annotation_json: _PathLike,
        annotation_folder: _PathLike | None = None,
        categories: str | None = None,
    ) -> None:
        self.image_folder = Path(image_folder)
        self.annotation_json = Path(annotation_json)
        self.annotation_folder = (
            self.annotation_json.with_suffix("") if annotation_folder is None else Path(annotation_folder)
        )
        content = read_panoptic_json(self.annotation_json)
        if not isinstance(content.get("images"), list):
            raise DataError(f"{self.annotation_json}: lists no 'images'")
        self.categories = (
            categories_of(content, self.annotation_json) if categories is None else get_categories(categories)
        )
        register_categories(self.categories)
        self._things = {category.id: i for i, category in enumerate(self.categories.things)}
        self._stuff = {category.id: i + 1 for i, category in enumerate(self.categories.stuff)}
        self._annotations: list[dict[str, Any]] = content["annotations"]
        _check_keys(content["images"], ("id", "file_name"), "an image", self.annotation_json)
        _check_keys(
            self._annotations,
            ("image_id", "file_name", "segments_info"),
            "an annotation",
            self.annotation_json,
        )
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in self._annotations:
            if annotation["image_id"] not in names:
                raise DataError(f"{self.annotation_json}: 'images' lacks image {annotation['image_id']}")
        self._image_names = [names[annotation["image_id"]] for annotation in self._annotations]

    def __len__(self) -> int:
        """Number of annotated images."""
        return len(self._annotations)

    def load(self, index: int) -> Sample:
        """Reads one image and its annotation.

        Raises:
            MissingFileError: A file is missing; named.
            DataError: A file is damaged, sizes differ, or an id or a category is unknown.
        """
        annotation = self._annotations[index]
        image_path = self.image_folder / self._image_names[index]
        png_path = self.annotation_folder / annotation["file_name"]
        image, colours = read_rgb(image_path), read_rgb(png_path)
        check_same_size(image, image_path, colours, png_path)
        red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
        ids = red + 256 * green + 65536 * blue
        table = annotation["segments_info"]
        of = f"a segment of image {annotation['image_id']}"
        _check_keys(table, ("id", "category_id", "area"), of, self.annotation_json)
        isthing, label, crowd, area = [], [], [], []
        for segment in table:
            category = segment["category_id"]
            if category not in self._things and category not in self._stuff:
                raise DataError(
                    f"{self.annotation_json}: segment {segment['id']} of image {annotation['image_id']} has the "
                    f"unknown category {category}"
                )
            isthing.append(category in self._things)
            label.append(self._things.get(category, self._stuff.get(category, 0)))
            crowd.append(bool(segment.get("iscrowd", 0)))
            area.append(int(segment["area"]))
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            segments=torch.from_numpy(_rows_of(ids, [segment["id"] for segment in table], png_path)),
            isthing=torch.tensor(isthing, dtype=torch.bool),
            label=torch.tensor(label, dtype=torch.int64),
            crowd=torch.tensor(crowd, dtype=torch.bool),
            area=torch.tensor(area, dtype=torch.int64),
            image_id=annotation["image_id"],
            file_name=str(image_path),
        )


def _check_keys(entries: list[dict[str, Any]], keys: tuple[str, ...], what: str, path: Path) -> None:
    for entry in entries:
        for key in keys:
            if not isinstance(entry, dict) or key not in entry:
                raise DataError(f"{path}: {what} lacks {key!r}: {str(entry)[:80]}")


def _rows_of(ids: npt.NDArray[np.int32], table: list[int], path: Path) -> npt.NDArray[np.int32]:
    """Replaces each id by 1 + its row in the table; 0 stays 0."""
    known = np.array([0, *table], dtype=np.int64)
    order = np.argsort(known, kind="stable")
    runs = runs_of(ids)
    place = np.minimum(np.searchsorted(known[order], runs.value), len(known) - 1)
    rows = order[place]
    unknown = runs.value[known[rows] != runs.value]
    if unknown.size:
        raise DataError(f"{path}: has the segment {unknown[0]}, which its segments_info lacks")
    lacking = np.flatnonzero(np.bincount(rows, minlength=len(known))[1:] == 0)
    if lacking.size:
        raise DataError(f"{path}: lacks the segment {table[lacking[0]]} of its segments_info")
    return runs.map_of(rows.astype(np.int32), ids.shape)


def categories_of(content: dict[str, Any], path: Path) -> Categories:
    """The categories that a panoptic JSON lists, things and stuff in ascending id order."""
    if not isinstance(content.get("categories"), list):
        raise DataError(f"{path}: lists no 'categories'; name the data set that they are of")
    found = sorted(
        (
            Category(
                entry["id"], entry["name"], bool(entry["isthing"]), tuple(entry.get("color", (128, 128, 128)))
            )
            for entry in content["categories"]
        ),
        key=lambda category: category.id,
    )
    things = tuple(category for category in found if category.isthing)
    stuff = tuple(category for category in found if not category.isthing)
    return Categories(path.stem, things, stuff)
