"""Places class names on a drawn panoptic map and writes them.

A name is centred where the largest rectangle of its aspect ratio fits into its segment. Summed-area tables find this
position. The name is therefore in the thickest part of the segment, inside it if possible, and never over another name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Mask = npt.NDArray[np.bool_]
Table = npt.NDArray[np.int64]
Color = tuple[int, int, int]

__all__ = ["draw_labels", "font_of"]

# The search uses a map that is reduced to at most this many pixels along its longer edge.
_SEARCH_EDGE = 512
# Font sizes to try, relative to the size that suits the image. The first one whose text fits into the segment is used.
_FONT_STEPS = (1.0, 0.85, 0.72)
# A name that does not fit inside may extend beyond its segment if the segment covers this share of its rectangle.
_MIN_COVERAGE = 0.4
MIN_FONT = 10


@dataclass(frozen=True)
class _Label:
    """A name with its font and the size of its background plate, in pixels of the image."""

    text: str
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    pad: int
    width: int
    height: int


def draw_labels(
    image: Image.Image,
    owner: npt.NDArray[np.integer[Any]],
    names: Sequence[str],
    colors: Sequence[Color],
    limit: int | None = None,
    taken_box: tuple[int, int, int, int] | None = None,
) -> None:
    """Writes the names of segments onto an image, in place; segments that are too small get no name.

    Args:
        image: RGB image.
        owner: [H, W], index of each pixel's segment plus one, 0 = void.
        names: Name of each segment.
        colors: Color of each segment; its name is written on a dark tone of this color.
        limit: Number of segments to name, largest first; None for all.
        taken_box: x1, y1, x2, y2 of a part of the image that gets no name.
    """
    step = -(-max(owner.shape) // _SEARCH_EDGE)
    small = np.ascontiguousarray(owner[::step, ::step])
    areas = np.bincount(small.ravel(), minlength=len(names) + 1)[1:]
    taken = np.zeros(small.shape, dtype=bool)
    if taken_box is not None:
        x1, y1, x2, y2 = (side // step for side in taken_box)
        taken[y1 : y2 + 1, x1 : x2 + 1] = True
    base = max(MIN_FONT, min(owner.shape) * 0.032)
    for index in np.argsort(-areas, kind="stable")[:limit]:
        if not areas[index]:
            continue
        mask = small == index + 1
        for font_step in _FONT_STEPS:
            label = _measure(names[index], max(MIN_FONT, round(base * font_step)))
            last = font_step == _FONT_STEPS[-1]
            corner = _place(mask, taken, -(-label.height // step), -(-label.width // step), may_extend=last)
            if corner is not None:
                top, left = corner
                taken[top : top + -(-label.height // step), left : left + -(-label.width // step)] = True
                y = min(top * step, owner.shape[0] - label.height)
                x = min(left * step, owner.shape[1] - label.width)
                _write(image, label, x, y, colors[index])
                break


def _place(mask: Mask, taken: Mask, height: int, width: int, may_extend: bool) -> tuple[int, int] | None:
    """Returns the top left corner of the best rectangle in `mask` and outside `taken`, or None if nothing fits."""
    rows, columns = mask.shape
    if height > rows or width > columns:
        return None
    free = _table(mask & ~taken)
    if _windows(free, height, width).max() == height * width:
        return _most_interior(free, height, width)
    if not may_extend:
        return None
    coverage = _windows(free, height, width)
    coverage[_windows(_table(taken), height, width) > 0] = 0
    best = coverage.max()
    if best < _MIN_COVERAGE * height * width:
        return None
    # Several windows may cover the same number of pixels. The middle one is the most stable under small
    # changes of the mask.
    candidates = np.argwhere(coverage == best)
    middle = candidates.mean(axis=0)
    top, left = candidates[np.argmin(((candidates - middle) ** 2).sum(axis=1))]
    return int(top), int(left)


def _most_interior(free: Table, height: int, width: int) -> tuple[int, int]:
    """Enlarges the rectangle, keeping its aspect ratio, until it barely fits, and centres the original one there."""
    low, high = 1.0, min((free.shape[0] - 1) / height, (free.shape[1] - 1) / width)
    for _ in range(7):
        scale = (low + high) / 2
        tall, wide = round(height * scale), round(width * scale)
        if _windows(free, tall, wide).max() == tall * wide:
            low = scale
        else:
            high = scale
    tall, wide = round(height * low), round(width * low)
    candidates = np.argwhere(_windows(free, tall, wide) == tall * wide)
    middle = candidates.mean(axis=0)
    top, left = candidates[np.argmin(((candidates - middle) ** 2).sum(axis=1))]
    return int(top) + (tall - height) // 2, int(left) + (wide - width) // 2


def _table(mask: Mask) -> Table:
    """Computes the summed-area table with a leading row and column of zeros: [H + 1, W + 1]."""
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), dtype=np.int64)
    np.cumsum(mask, axis=0, out=table[1:, 1:])
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
    return table


def _windows(table: Table, height: int, width: int) -> Table:
    """Counts the set pixels in each height x width window, indexed by its top left corner."""
    return (
        table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]
    )


@lru_cache(maxsize=16)
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns Pillow's own font."""
    return ImageFont.load_default(size)


def _measure(text: str, size: int) -> _Label:
    font = font_of(size)
    left, _, right, _ = font.getbbox(text)
    _, top, _, bottom = font.getbbox("Ag")  # the same height for all names
    pad = max(2, round(size * 0.24))
    return _Label(text, font, pad, round(right - left) + 2 * pad, round(bottom - top) + 2 * pad)


def _write(image: Image.Image, label: _Label, x: int, y: int, color: Color) -> None:
    """Writes light text on a rounded, nearly opaque plate in a dark tone of the segment's color."""
    red, green, blue = (channel * 2 // 7 for channel in color)
    # Pillow does not smooth rounded corners, so the plate is drawn enlarged and then reduced.
    fine = 4 if label.height < 60 else 2
    plate = Image.new("L", (label.width * fine, label.height * fine))
    ImageDraw.Draw(plate).rounded_rectangle(
        (0, 0, plate.width - 1, plate.height - 1), radius=label.pad * fine * 1.2, fill=205
    )
    image.paste((red, green, blue), (x, y), plate.resize((label.width, label.height), Image.Resampling.BOX))
    left, _, _, _ = label.font.getbbox(label.text)
    _, top, _, _ = label.font.getbbox("Ag")
    ImageDraw.Draw(image).text((x + label.pad - left, y + label.pad - top), label.text, "white", label.font)
