"""Reads folders of LabelMe: a JSON of labelled shapes for each image."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from panfpn_fast.data.categories import Categories, to_categories
from panfpn_fast.data.class_check import check_names
from panfpn_fast.data.fields import MAX_INTEGER, Fields, is_integer
from panfpn_fast.data.files import DataError, check_folder, read_json
from panfpn_fast.data.images import read_image
from panfpn_fast.data.polygons import (
    Rle,
    bitmap_rle,
    polygon_problem,
    polygons_rle,
    pycocotools_mask,
    union,
)
from panfpn_fast.data.regions import Painter, Region
from panfpn_fast.data.rules import FoundClass, ReadingRules, make_categories
from panfpn_fast.data.sample import Sample

IGNORED = "__ignore__"
"""LabelMe's label of regions that are void."""

_SHAPES = ("polygon", "rectangle", "circle", "mask")
_CIRCLE_CORNERS = 72


class LabelMeDataset:
    """Images with the shapes that LabelMe writes.

    Args:
        image_folder: Directory of the images.
        annotation_folder: Directory of the JSON files, which is searched with its subfolders; often the same one.
        categories: The classes, or a name for `get_categories`. None selects `rules.classes` or, if there are none,
            all labels in alphabetical order, with ids from 1.
        rules: Decides, for the classes of the files, which are stuff, and the class of uncovered pixels.

    Raises:
        MissingFileError: If the directory does not exist.
        DataError: If it has no JSON file, or no file has a label.
        ClassMismatchError: If a label is not among the given classes.
        ImportError: If pycocotools is not installed.

    Note:
        Labels are compared by name. The shapes are polygons, rectangles, circles and masks; shapes with the same label
        and `group_id` are one instance; the label "__ignore__" is void. The image of a file is that of its `imagePath`
        in `image_folder`; the picture in `imageData` is not used. A damaged file is an error when it is loaded.
    """

    def __init__(
        self,
        image_folder: str | os.PathLike[str],
        annotation_folder: str | os.PathLike[str],
        categories: Categories | str | None = None,
        rules: ReadingRules | None = None,
    ) -> None:
        self._image_folder, self._folder = Path(image_folder), Path(annotation_folder)
        rules = rules or ReadingRules()
        pycocotools_mask(self._folder)
        check_folder(self._folder, "JSON files")
        self._paths = sorted(path for path in self._folder.rglob("*.json") if path.is_file())
        if not self._paths:
            raise DataError(f"{self._folder}: no JSON file in this folder")
        labels = sorted({label for path in self._paths for label in _labels(path)} - {IGNORED})
        if categories is None:
            names = rules.classes or labels
            self.categories = make_categories(
                self._folder, [FoundClass(i, name) for i, name in enumerate(names, 1)], rules
            )
        else:
            self.categories = to_categories(categories)
        check_names(self._folder, [*labels, *rules.classes], self.categories)
        self._ids = {category.name: category.id for category in self.categories.all}
        self._painter = Painter(self.categories, rules)

    def __len__(self) -> int:
        """Returns the number of JSON files."""
        return len(self._paths)

    def load(self, index: int) -> Sample:
        """Reads one image and its shapes.

        Raises:
            MissingFileError: If the image does not exist.
            DataError: If a file is damaged, a field is wrong, or the image has another size than in the JSON.
        """
        path = self._paths[index]
        fields = Fields(path, "", read_json(path))
        # LabelMe writes the path as its system does, relative to the JSON.
        name = PureWindowsPath(fields.text("imagePath")).name
        inside = path.parent.relative_to(self._folder)
        image_path = self._image_folder / inside / name
        if not name:
            raise fields.error("imagePath", "the path of an image")
        image = read_image(image_path)
        height, width = image.shape[:2]
        for key, side in (("imageHeight", height), ("imageWidth", width)):
            if fields.entry.get(key) is not None and fields.integer(key, 1, MAX_INTEGER) != side:
                raise fields.error(key, f"{side}, the size of {image_path}")
        regions: dict[object, Region] = {}
        for i, entry in enumerate(fields.list_of("shapes")):
            shape = Fields(path, f"shapes[{i}]", entry)
            label, mask = shape.text("label"), _mask(shape, height, width)
            if label != IGNORED and label not in self._ids:
                raise shape.error("label", "one of the classes")
            group = shape.entry.get("group_id")
            if group is not None and not is_integer(group, -MAX_INTEGER, MAX_INTEGER):
                raise shape.error("group_id", "an integer or null")
            instance = ("alone", i) if group is None else (label, group)
            if instance in regions:
                mask = union([regions[instance].mask, mask])
            regions[instance] = Region(self._ids.get(label), mask)
        return self._painter.paint(image, list(regions.values()), (inside / path.stem).as_posix(), image_path)


def _labels(path: Path) -> Iterator[str]:
    """Yields the labels of a file; `load` names what is wrong with a damaged one."""
    try:
        for i, entry in enumerate(Fields(path, "", read_json(path)).list_of("shapes")):
            yield Fields(path, f"shapes[{i}]", entry).text("label")
    except DataError:
        return


def _mask(shape: Fields, height: int, width: int) -> Rle:
    kind = shape.entry.get("shape_type", "polygon")
    if kind not in _SHAPES:
        raise shape.error("shape_type", f"one of {', '.join(_SHAPES)}")
    polygon = _flat(shape.list_of("points"))
    if kind == "polygon":
        if problem := polygon_problem(polygon, height, width):
            raise shape.error(
                "points", problem.replace("[x1, y1, x2, y2, x3, y3, ...]", "[[x1, y1], [x2, y2], ...]")
            )
        return polygons_rle([polygon], height, width)
    # The three other kinds have two points; twice as many are checked like a polygon's.
    if len(polygon) != 4 or polygon_problem([*polygon, *polygon], height, width):
        raise shape.error("points", f"two points near an image of {width} x {height} pixels")
    x1, y1, x2, y2 = map(float, polygon)
    if kind == "rectangle":
        return polygons_rle([[x1, y1, x2, y1, x2, y2, x1, y2]], height, width)
    if kind == "circle":
        radius = math.hypot(x2 - x1, y2 - y1)
        turns = [2 * math.pi * i / _CIRCLE_CORNERS for i in range(_CIRCLE_CORNERS)]
        corners = [(x1 + radius * math.cos(turn), y1 + radius * math.sin(turn)) for turn in turns]
        return polygons_rle([[value for corner in corners for value in corner]], height, width)
    return _pasted(shape, _decoded(shape), round(x1), round(y1), height, width)


def _flat(points: list[Any]) -> list[Any]:
    """Returns [x1, y1, x2, y2, ...]; nothing if a point is not a pair."""
    pairs = [point for point in points if isinstance(point, list) and len(point) == 2]
    return [value for pair in pairs for value in pair] if len(pairs) == len(points) else []


def _decoded(shape: Fields) -> npt.NDArray[np.bool_]:
    try:
        data = base64.b64decode(shape.text("mask"), validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.array(image.convert("L")) > 0
    except DataError:
        raise
    except Exception:  # decoders raise many exception types
        raise shape.error("mask", "a PNG in base64") from None


def _pasted(shape: Fields, mask: npt.NDArray[np.bool_], x: int, y: int, height: int, width: int) -> Rle:
    if not (0 <= x <= width - mask.shape[1] and 0 <= y <= height - mask.shape[0]):
        raise shape.error(
            "points", f"a place for a mask of {mask.shape[1]} x {mask.shape[0]} pixels in the image"
        )
    whole = np.zeros((height, width), bool)
    whole[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    return bitmap_rle(whole)
