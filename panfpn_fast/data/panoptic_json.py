"""Reads and checks JSON files in COCO's panoptic format; errors name the file, the entry and the field."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from panfpn_fast.data.categories import Categories, listed_categories
from panfpn_fast.data.class_check import ListedClass, check_classes
from panfpn_fast.data.fields import MAX_INTEGER, Fields
from panfpn_fast.data.files import DataError, read_json

_MAX_SEGMENT_ID = 256**3 - 1  # the largest id that the colour of a PNG can encode


class Annotation(NamedTuple):
    """One entry of `annotations`.

    Attributes:
        image_id: Id of the image in `images`.
        file_name: Name of the PNG of segment ids.
        segments_info: The segments as the JSON holds them; `PanopticJson.segments` checks and converts them.
        where: Name of the entry in error messages, such as "annotations[3]".
    """

    image_id: int | str
    file_name: str
    segments_info: list[Any]
    where: str


class Segment(NamedTuple):
    """One entry of `segments_info`.

    Attributes:
        id: Id in the PNG, at least 1; a prediction may use 0.
        category_id: Id of a category.
        area: Number of pixels according to the JSON, at least 0; 0 where it was not read. `check_area` compares it with
            the PNG.
        iscrowd: 1 for a region of several things that are not annotated separately, else 0.
    """

    id: int
    category_id: int
    area: float
    iscrowd: int


def check_area(where: str, segment: int, area: float, pixels: int) -> None:
    """Refuses an area below the number of pixels in the map, which could give a quality above 1.

    A larger area is legal: panopticapi takes the area from the JSON, as part of the union.

    Args:
        where: Beginning of the message: the file, the image.
        segment: Id of the segment.
        area: Its area according to the JSON.
        pixels: Number of its pixels in the map.

    Raises:
        DataError: If the area is too small.
    """
    if area < pixels:
        raise DataError(
            f"{where}: segment {segment} has the area {area} in the JSON, but {pixels} pixels in the map; count the "
            "areas anew"
        )


class PanopticJson:
    """A JSON file in COCO's panoptic format.

    The annotations are checked when the file is read, and each other part when it is requested. A file of predictions
    needs neither `images` nor `categories`.

    Args:
        path: The file.
        content: The content of the file, if it was read before; None reads it.

    Attributes:
        path: The file.
        annotations: The entries of `annotations`, in the order of the file, one for each image.

    Raises:
        MissingFileError: If the file does not exist.
        DataError: If the file is not JSON or not in this format, an annotation has a wrong field, or two annotations
            are of one image.
    """

    def __init__(self, path: Path, content: object = None) -> None:
        self.path = path
        content = read_json(path) if content is None else content
        if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
            raise DataError(f"{path}: expected COCO's panoptic format, an object with a list 'annotations'")
        self._content: dict[str, Any] = content
        self.annotations: list[Annotation] = []
        first: dict[int | str, str] = {}
        for i, entry in enumerate(content["annotations"]):
            fields = Fields(path, f"annotations[{i}]", entry)
            annotation = Annotation(
                fields.image_id("image_id"),
                fields.text("file_name"),
                fields.list_of("segments_info"),
                fields.where,
            )
            if (other := first.setdefault(annotation.image_id, fields.where)) != fields.where:
                raise fields.error("image_id", f"an image without another annotation ({other})")
            self.annotations.append(annotation)

    def image_names(self) -> list[str]:
        """Returns the file name of each annotation's image, from `images`.

        Raises:
            DataError: If `images` is missing or lacks an annotated image, an entry has a wrong field, or two entries
                of one id have different names.
        """
        names: dict[int | str, str] = {}
        for fields in self._entries("images"):
            id_, name = fields.image_id("id"), fields.text("file_name")
            if names.setdefault(id_, name) != name:
                raise fields.error("id", f"a unique id, but it is also that of {names[id_]!r}")
        for annotation in self.annotations:
            if annotation.image_id not in names:
                raise DataError(
                    f"{self.path}: {annotation.where}.image_id: 'images' lacks the image {annotation.image_id!r}"
                )
        return [names[annotation.image_id] for annotation in self.annotations]

    def kinds(self) -> dict[int, bool]:
        """Returns, for the id of each category, whether it is a thing.

        Raises:
            DataError: If `categories` is missing, an entry has a wrong field, or two entries have one id.
        """
        kinds: dict[int, bool] = {}
        for fields in self._entries("categories"):
            id_ = fields.integer("id", 0, MAX_INTEGER)
            if id_ in kinds:
                raise fields.error("id", "a unique id")
            kinds[id_] = bool(fields.flag("isthing"))
        return kinds

    def categories(self) -> Categories:
        """Returns the categories of the file, things and stuff in ascending id order.

        Raises:
            DataError: If `categories` is missing or empty, an entry has a wrong field, two entries have one id, or
                there are too many stuff classes.
        """
        kinds = self.kinds()
        if not kinds:
            raise DataError(f"{self.path}: 'categories' is empty; name the data set whose classes it has")
        entries = zip(kinds.items(), self._entries("categories"), strict=True)
        rows = [
            (id_, fields.text("name"), isthing, fields.color("color")) for (id_, isthing), fields in entries
        ]
        try:
            return listed_categories(self.path.stem, rows)
        except ValueError as error:  # too many classes
            raise DataError(f"{self.path}: categories: {error}") from None

    def check_categories(self, categories: Categories) -> None:
        """Compares the classes that the file lists, if any, with `categories`; see `check_classes`.

        Raises:
            ClassMismatchError: If the file has a class that is not in `categories`.
            DataError: If a listed entry has a wrong field.
        """
        if "categories" not in self._content:
            return
        listed = [
            ListedClass(
                fields.integer("id", 0, MAX_INTEGER),
                fields.text("name") if "name" in fields.entry else None,
                bool(fields.flag("isthing")) if "isthing" in fields.entry else None,
            )
            for fields in self._entries("categories")
        ]
        check_classes(self.path, listed, categories)

    def segments(
        self, annotation: Annotation, known: Collection[int], *, predicted: bool = False
    ) -> list[Segment]:
        """Checks and returns the segments of an annotation.

        Args:
            annotation: One of `annotations`.
            known: Ids of the categories.
            predicted: Whether they are predictions. Then `area` is not read, and an id may be 0, as in panopticapi.

        Raises:
            DataError: If a segment has a wrong field or an unknown category, or two segments have one id.
        """
        segments: dict[int, Segment] = {}
        for i, entry in enumerate(annotation.segments_info):
            where = f"{annotation.where}.segments_info[{i}] (image {annotation.image_id})"
            fields = Fields(self.path, where, entry)
            segment = Segment(
                fields.integer("id", 0 if predicted else 1, _MAX_SEGMENT_ID),
                fields.integer("category_id", 0, MAX_INTEGER),
                0 if predicted else fields.area("area"),
                fields.flag("iscrowd", False),
            )
            if segment.category_id not in known:
                raise DataError(
                    f"{self.path}: segment {segment.id} of image {annotation.image_id} has the unknown category "
                    f"{segment.category_id}"
                )
            if segment.id in segments:
                raise fields.error("id", "a unique id")
            segments[segment.id] = segment
        return list(segments.values())

    def _entries(self, part: str) -> Iterable[Fields]:
        if not isinstance(self._content.get(part), list):
            remedy = "; without it, pass the classes as `categories`" if part == "categories" else ""
            raise DataError(f"{self.path}: expected a list {part!r}{remedy}")
        return (Fields(self.path, f"{part}[{i}]", entry) for i, entry in enumerate(self._content[part]))


def read_categories(path: str | os.PathLike[str]) -> Categories:
    """Reads the classes in a JSON file in one of COCO's formats.

    Args:
        path: A list of categories, as in panopticapi's panoptic_coco_categories.json, or annotations (panoptic or
            instances), whose list `categories` is read. If no category has `isthing`, as in annotations of instances,
            all of them are things.

    Returns:
        The classes, things and stuff in ascending order of ids. The classes of a network of detectron2 that was trained
        on these annotations have the same order.

    Raises:
        MissingFileError: If the file does not exist.
        DataError: If the file is not JSON, has no such list, or a category has a wrong field; the message names it.

    Example:
        >>> import json, pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "cells.json")
        ...     _ = file.write_text(json.dumps([{"id": 3, "name": "cell"}]))
        ...     read_categories(file)
        Categories('cells', things: cell; stuff: none)
    """
    path = Path(path)
    content = read_json(path)
    rows = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of categories, or an object with a list 'categories'")
    if not any(isinstance(row, dict) and "isthing" in row for row in rows):
        rows = [{**row, "isthing": 1} if isinstance(row, dict) else row for row in rows]
    return PanopticJson(path, {"annotations": [], "categories": rows}).categories()
