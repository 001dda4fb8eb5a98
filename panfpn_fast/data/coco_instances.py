"""Reads COCO's instances format: images, and a JSON of things with polygons or run lengths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from panfpn_fast.data.categories import Categories
from panfpn_fast.data.fields import MAX_INTEGER, Fields
from panfpn_fast.data.files import DataError, read_json
from panfpn_fast.data.images import read_image
from panfpn_fast.data.polygons import pycocotools_mask, segmentation_rle
from panfpn_fast.data.regions import Painter, Region
from panfpn_fast.data.rules import FoundClass, ReadingRules, choose_categories
from panfpn_fast.data.sample import Sample

_PathLike = str | os.PathLike[str]
_PARTS = ("images", "annotations", "categories")


class CocoInstancesDataset:
    """Images with annotated instances.

    Args:
        image_folder: Directory of the images.
        annotation_json: The JSON file with `images`, `annotations` and `categories`.
        categories: The classes, or a name for `get_categories`; None selects the classes in the JSON file.
        rules: Decides, for the classes in the JSON file, which are stuff, and the class of uncovered pixels.

    Raises:
        MissingFileError: If the JSON does not exist.
        DataError: If the JSON is damaged, or an image or a class has a wrong field. The message names the file, the
            entry and the field.
        ClassMismatchError: If the JSON has a class that is not in `categories`.
        ImportError: If pycocotools is not installed.

    Note:
        All images of the file are used, also those without annotations. The annotations of an image are checked when
        it is loaded. Classes are things, unless their optional field `isthing` is 0 or `rules.stuff` names them.
        Overlaps are resolved by `Painter`. The format: cocodataset.org/#format-data, "Object Detection".
    """

    def __init__(
        self,
        image_folder: _PathLike,
        annotation_json: _PathLike,
        categories: Categories | str | None = None,
        rules: ReadingRules | None = None,
    ) -> None:
        self.image_folder, self._path = Path(image_folder), Path(annotation_json)
        rules = rules or ReadingRules()
        pycocotools_mask(self._path)
        content = read_json(self._path)
        for part in _PARTS:
            if not isinstance(content, dict) or not isinstance(content.get(part), list):
                raise DataError(f"{self._path}: expected COCO's instances format, with a list {part!r}")
        self._images = self._read_images(content["images"])
        found = self._read_classes(content["categories"])
        self.categories = choose_categories(self._path, found, categories, rules)
        self._class_ids = {one.id for one in found}
        self._painter = Painter(self.categories, rules)
        self._annotations: dict[int | str, list[Fields]] = {id_: [] for id_, *_ in self._images}
        for i, entry in enumerate(content["annotations"]):
            fields = Fields(self._path, f"annotations[{i}]", entry)
            image_id = fields.image_id("image_id")
            if image_id not in self._annotations:
                raise fields.error("image_id", "the id of an entry of 'images'")
            self._annotations[image_id].append(fields)

    def _read_images(self, entries: list[Any]) -> list[tuple[int | str, str, tuple[int, int] | None]]:
        images: dict[int | str, tuple[int | str, str, tuple[int, int] | None]] = {}
        for i, entry in enumerate(entries):
            fields = Fields(self._path, f"images[{i}]", entry)
            id_ = fields.image_id("id")
            if id_ in images:
                raise fields.error("id", "a unique id")
            size = None
            if "height" in fields.entry or "width" in fields.entry:
                size = fields.integer("height", 1, MAX_INTEGER), fields.integer("width", 1, MAX_INTEGER)
            images[id_] = id_, fields.text("file_name"), size
        return list(images.values())

    def _read_classes(self, entries: list[Any]) -> list[FoundClass]:
        found: dict[int, FoundClass] = {}
        for i, entry in enumerate(entries):
            fields = Fields(self._path, f"categories[{i}]", entry)
            id_ = fields.integer("id", 0, MAX_INTEGER)
            if id_ in found:
                raise fields.error("id", "a unique id")
            isthing = bool(fields.flag("isthing")) if "isthing" in fields.entry else None
            found[id_] = FoundClass(id_, fields.text("name"), isthing, fields.color("color"))
        return list(found.values())

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._images)

    def load(self, index: int) -> Sample:
        """Reads one image and its annotations.

        Raises:
            MissingFileError: If the image does not exist.
            DataError: If the image is damaged or has another size than in the JSON, or an annotation has a wrong field.
        """
        image_id, file_name, size = self._images[index]
        path = self.image_folder / file_name
        image = read_image(path)
        height, width = image.shape[:2]
        if size is not None and size != (height, width):
            raise DataError(
                f"{self._path}: images[{index}]: expected the size of {path}, {width} x {height} pixels, got "
                f"{size[1]} x {size[0]}"
            )
        regions = []
        for fields in self._annotations[image_id]:
            category_id = fields.integer("category_id", 0, MAX_INTEGER)
            if category_id not in self._class_ids:
                raise fields.error("category_id", "the id of an entry of 'categories'")
            mask = segmentation_rle(fields.value("segmentation"), height, width)
            if isinstance(mask, str):
                raise fields.error("segmentation", mask)
            regions.append(Region(category_id, mask, bool(fields.flag("iscrowd", False))))
        return self._painter.paint(image, regions, image_id, path)
