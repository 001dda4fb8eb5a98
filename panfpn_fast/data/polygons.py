"""Polygons and run lengths as masks, by pycocotools; their values are checked before its C code sees them."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from panfpn_fast.data.fields import is_integer, short

Rle = dict[str, Any]
"""A mask as pycocotools has it: "size" (height and width) and "counts"."""

# pycocotools reads past the end of counts whose last character has the bit "more follows".
_COMPRESSED = re.compile(r"(?:[P-o]{0,6}[0-O])+", re.ASCII)


def pycocotools_mask(path: Path) -> Any:
    """Returns the module pycocotools.mask.

    Raises:
        ImportError: If it is not installed; the message names the file that needs it, and gives the command.
    """
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise ImportError(
            f"{path}: {error}. Its polygons need pycocotools: pip install pycocotools"
        ) from error


def polygon_problem(points: object, height: int, width: int) -> str:
    """Returns what a polygon is expected to be, or an empty string if it is so.

    Args:
        points: x1, y1, x2, y2, ... in pixels, from outside.
        height: Height of the image.
        width: Width of the image.
    """
    if not isinstance(points, list | tuple) or len(points) < 6 or len(points) % 2:
        return "at least three points as [x1, y1, x2, y2, x3, y3, ...]"
    for place, value in enumerate(points):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        size = height if place % 2 else width
        # A polygon may cross the border; coordinates far outside are in another unit, and fill the memory.
        if not number or not math.isfinite(value) or not -size <= value <= 2 * size:
            return (
                f"{'y' if place % 2 else 'x'} in {-size}..{2 * size} in an image of {width} x {height} pixels"
            )
    return ""


def polygons_rle(polygons: Sequence[Sequence[float]], height: int, width: int) -> Rle:
    """Returns the union of checked polygons."""
    mask = importlib.import_module("pycocotools.mask")
    found: Rle = mask.merge(mask.frPyObjects([list(map(float, one)) for one in polygons], height, width))
    return found


def bitmap_rle(bitmap: npt.NDArray[np.bool_]) -> Rle:
    """Returns the run lengths of a mask [H, W]."""
    found: Rle = importlib.import_module("pycocotools.mask").encode(np.asfortranarray(bitmap, np.uint8))
    return found


def union(masks: Sequence[Rle]) -> Rle:
    """Returns the union of masks of one size."""
    found: Rle = importlib.import_module("pycocotools.mask").merge(list(masks))
    return found


def bitmap(rle: Rle) -> tuple[slice, slice, npt.NDArray[np.bool_]]:
    """Returns the rows and the columns of a mask's box, and the mask in it; all are empty if it has no pixels."""
    mask = importlib.import_module("pycocotools.mask")
    x, y, w, h = (int(side) for side in mask.toBbox(rle))
    rows, columns = slice(y, y + h), slice(x, x + w)
    return rows, columns, mask.decode(rle)[rows, columns].astype(bool)


def segmentation_rle(value: object, height: int, width: int) -> Rle | str:
    """Converts the field `segmentation` of COCO's instances.

    Args:
        value: A list of polygons, or run lengths: an object of "size" and "counts" (a list, or compressed).
        height: Height of the image.
        width: Width of the image.

    Returns:
        The mask, or what the field is expected to be.
    """
    if isinstance(value, list):
        if not value:
            return "at least one polygon (a box alone has no mask)"
        for polygon in value:
            if problem := polygon_problem(polygon, height, width):
                return f"{problem}, not {short(polygon)}"
        return polygons_rle(value, height, width)
    if not isinstance(value, dict):
        return "a list of polygons or run lengths"
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or size != [height, width] or any(isinstance(side, bool) for side in size):
        return f"the size [{height}, {width}] of the image, not {short(size)}"
    mask = importlib.import_module("pycocotools.mask")
    pixels = height * width
    if isinstance(counts, list):
        if not all(is_integer(count, 0, pixels) for count in counts) or sum(counts) != pixels:
            return f"counts of at least 0 that add up to {pixels} pixels"
        found: Rle = mask.frPyObjects({"size": size, "counts": counts}, height, width)
        return found
    if not isinstance(counts, str) or not _COMPRESSED.fullmatch(counts):
        return "counts as a list of integers, or as a string in COCO's compression"
    rle = {"size": [height, width], "counts": counts.encode()}
    if not (_fits(mask, counts, pixels) and (pixels == 1 or not _fits(mask, counts, pixels - 1))):
        return f"compressed counts of {pixels} pixels"
    return rle


def _fits(mask: Any, counts: str, pixels: int) -> bool:
    """Whether run lengths have at most so many pixels."""
    try:
        mask.decode({"size": [pixels, 1], "counts": counts.encode()})
    except ValueError:
        return False
    return True
