"""Where class names go on a panoptic picture, and how they are written.

A name is centred where the largest rectangle of its own shape fits into its segment, found with summed-area
tables; so it sits in the thickest part, inside the segment where it can, and never over another name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Mask = npt.NDArray[np.bool_]
Table = npt.NDArray[np.int64]
Color = tuple[int, int, int]

__all__ = ["draw_labels"]

# Places are searched on a map of at most this many pixels along its longer edge.
_SEARCH_EDGE = 512
# Font sizes tried, relative to the size that suits the picture: the first that fits inside its segment is
# taken.
_FONT_STEPS = (1.0, 0.85, 0.72)
# A name that does not fit inside may stick out, if its segment fills this share of its rectangle.
_MIN_COVERAGE = 0.4
_MIN_FONT = 10


@dataclass(frozen=True)
class _Label:
    """A name with its font and the size of its backing, in pixels of the picture."""

    text: str
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    pad: int
    width: int
    height: int


def draw_labels(
    picture: Image.Image, owner: npt.NDArray[np.uint16], names: Sequence[str], colors: Sequence[Color]
) -> None:
    """Writes the segments' names onto a picture, in place; segments too small to carry theirs stay without.

    Args:
        picture: RGB.
        owner: [H, W], index of each pixel's segment plus one, 0 = void.
        names: What to write, one per segment.
        colors: The segments' colours, one per segment; each name stands on a dark tone of it.
    """
    step = -(-max(owner.shape) // _SEARCH_EDGE)
    small = np.ascontiguousarray(owner[::step, ::step])
    areas = np.bincount(small.ravel(), minlength=len(names) + 1)[1:]
    taken = np.zeros(small.shape, dtype=bool)
    base = max(_MIN_FONT, min(owner.shape) * 0.032)
    for index in np.argsort(-areas, kind="stable"):
        if not areas[index]:
            continue
        mask = small == index + 1
        for font_step in _FONT_STEPS:
            label = _measure(names[index], max(_MIN_FONT, round(base * font_step)))
            last = font_step == _FONT_STEPS[-1]
            corner = _place(
                mask, taken, -(-label.height // step), -(-label.width // step), may_stick_out=last
            )
            if corner is not None:
                top, left = corner
                taken[top : top + -(-label.height // step), left : left + -(-label.width // step)] = True
                y = min(top * step, owner.shape[0] - label.height)
                x = min(left * step, owner.shape[1] - label.width)
                _write(picture, label, x, y, colors[index])
                break


def _place(mask: Mask, taken: Mask, height: int, width: int, may_stick_out: bool) -> tuple[int, int] | None:
    """Top left corner of the best place for a rectangle in `mask`, clear of `taken`; None if there is none."""
    rows, columns = mask.shape
    if height > rows or width > columns:
        return None
    free = _table(mask & ~taken)
    if _windows(free, height, width).max() == height * width:
        return _most_interior(free, height, width)
    if not may_stick_out:
        return None
    coverage = _windows(free, height, width)
    coverage[_windows(_table(taken), height, width) > 0] = 0
    best = coverage.max()
    if best < _MIN_COVERAGE * height * width:
        return None
    # Many windows may cover as much: the middle one of them is the steadiest choice.
    candidates = np.argwhere(coverage == best)
    middle = candidates.mean(axis=0)
    top, left = candidates[np.argmin(((candidates - middle) ** 2).sum(axis=1))]
    return int(top), int(left)


def _most_interior(free: Table, height: int, width: int) -> tuple[int, int]:
    """Grows the rectangle, keeping its shape, as far as it fits somewhere, and centres the original there."""
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
    """Summed-area table with a leading row and column of zeros: [H + 1, W + 1]."""
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), dtype=np.int64)
    np.cumsum(mask, axis=0, out=table[1:, 1:])
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
    return table


def _windows(table: Table, height: int, width: int) -> Table:
    """Pixels set within each height x width window, by its top left corner."""
    return (
        table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]
    )


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _measure(text: str, size: int) -> _Label:
    font = _font(size)
    left, _, right, _ = font.getbbox(text)
    _, top, _, bottom = font.getbbox("Ag")  # one height for all names, whatever letters they have
    pad = max(2, round(size * 0.24))
    return _Label(text, font, pad, round(right - left) + 2 * pad, round(bottom - top) + 2 * pad)


def _write(picture: Image.Image, label: _Label, x: int, y: int, color: Color) -> None:
    """Light text on a rounded, nearly opaque plate in a dark tone of the segment's colour."""
    red, green, blue = (channel * 2 // 7 for channel in color)
    # Pillow does not smooth corners, so the plate is drawn large and reduced.
    fine = 4
    plate = Image.new("L", (label.width * fine, label.height * fine))
    ImageDraw.Draw(plate).rounded_rectangle(
        (0, 0, plate.width - 1, plate.height - 1), radius=label.pad * fine * 1.2, fill=205
    )
    picture.paste((red, green, blue), (x, y), plate.resize((label.width, label.height), Image.Resampling.BOX))
    left, _, _, _ = label.font.getbbox(label.text)
    _, top, _, _ = label.font.getbbox("Ag")
    ImageDraw.Draw(picture).text((x + label.pad - left, y + label.pad - top), label.text, "white", label.font)
