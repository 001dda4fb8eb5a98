"""Draws a legend of the classes into a corner of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from panfpn_fast.inference.name_placement import MIN_FONT, font_of

Color = tuple[int, int, int]

# A class shows the colors of at most this many of its segments.
_SWATCHES = 4
# The legend covers at most this share of the picture's height, and of its width.
_SHARE = 0.6
_BACKGROUND = (24, 24, 24)
_OPACITY = 205


class Row(NamedTuple):
    """A line of the legend."""

    text: str
    colors: Sequence[Color]


def legend_rows(names: Sequence[str], colors: Sequence[Color], areas: npt.NDArray[np.int64]) -> list[Row]:
    """Returns a row for each class, by descending area, with the number of its segments.

    Args:
        names: Class of each of N segments.
        colors: Color of each segment.
        areas: int64 [N], pixels of each segment; one without pixels is not counted.
    """
    of_class: dict[str, list[int]] = {}
    for index in np.argsort(-areas, kind="stable").tolist():
        if areas[index]:
            of_class.setdefault(names[index], []).append(index)
    ranked = sorted(of_class.items(), key=lambda item: -int(areas[item[1]].sum()))
    return [
        Row(
            name if len(members) == 1 else f"{name} ({len(members)})",
            [colors[i] for i in members[:_SWATCHES]],
        )
        for name, members in ranked
    ]


def draw_legend(
    image: Image.Image, isthing: npt.NDArray[np.bool_], rows: Sequence[Row]
) -> tuple[int, int, int, int] | None:
    """Draws the rows into the corner where they hide the fewest pixels of things, in place.

    Args:
        image: RGB image.
        isthing: bool [H, W], whether each pixel belongs to a thing.
        rows: The rows. Those that do not fit are counted in a last one.

    Returns:
        x1, y1, x2, y2 of the legend, or None if the image is too small for one.
    """
    size = max(MIN_FONT, round(min(image.size) * 0.028))
    font = font_of(size)
    line, pad = round(size * 1.4), round(size * 0.6)
    space = int(image.height * _SHARE) - 2 * pad
    if len(rows) * line > space:
        shown = max(space // line - 1, 0)
        rows = [*rows[:shown], Row(f"{len(rows) - shown} more", [])]
    width = round(max(font.getlength(row.text) for row in rows)) + line + 3 * pad
    height = len(rows) * line + 2 * pad
    if width > image.width * _SHARE or height > image.height * _SHARE:
        return None

    corners = [(x, y) for y in (image.height - height, 0) for x in (image.width - width, 0)]
    left, top = min(
        corners, key=lambda at: np.count_nonzero(isthing[at[1] : at[1] + height, at[0] : at[0] + width])
    )
    box = (left, top, left + width, top + height)
    image.paste(_BACKGROUND, box, Image.new("L", (width, height), _OPACITY))
    draw = ImageDraw.Draw(image)
    for number, row in enumerate(rows):
        x, y = left + pad, top + pad + number * line
        for place, color in enumerate(row.colors):
            x1, x2 = (x + round(line * share / len(row.colors)) for share in (place, place + 1))
            draw.rectangle((x1, y + line // 8, x2 - 1, y + line - line // 8 - 1), fill=color)
        draw.text((x + line + pad, y + line / 2), row.text, "white", font, anchor="lm")
    return box
