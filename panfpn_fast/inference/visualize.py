"""Panoptic maps as pictures: coloured segments, outlines, and class names readable on a photograph."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from panfpn_fast.data import Category
from panfpn_fast.inference.labels import draw_labels

Color = tuple[int, int, int]

__all__ = ["draw_panoptic", "instance_color"]

# Multiples of (1/p, 1/p^2), p the plastic number, taken modulo 1, fill the unit square evenly however many are
# taken (Roberts 2018, the R2 sequence): any few instances get shades that lie far apart.
_PLASTIC = 1.3247179572447460

# Stuff is covered less than things, which are what one looks for, and its borders are drawn fainter (of 255).
_STUFF_OPACITY = 0.85
_THING_LINE = 220
_STUFF_LINE = 110


def instance_color(color: Color, index: int) -> Color:
    """Returns the shade for the index-th instance of a class, so that neighbours can be told apart.

    Args:
        color: The class's colour, (R, G, B) in 0..255.
        index: Position of the instance among those of its class, from 0; the first keeps the class's own
            colour.

    Returns:
        (R, G, B) in 0..255, the same for the same arguments.
    """
    if index == 0:
        return color
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
    hue += 0.14 * _spread(index / _PLASTIC)
    # Very dark and very light classes have no room on one side, so their further instances start nearer the middle.
    lightness = min(max(lightness, 0.35), 0.7) + 0.3 * _spread(index / _PLASTIC**2)
    red, green, blue = colorsys.hls_to_rgb(hue % 1.0, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def _spread(position: float) -> float:
    """Position modulo 1, in -0.5..0.5."""
    return (position + 0.5) % 1.0 - 0.5


def draw_panoptic(
    image: npt.NDArray[np.uint8],
    panoptic: npt.NDArray[np.integer[Any]],
    segments: Sequence[tuple[int, Category]],
    *,
    opacity: float = 0.5,
    labels: bool = True,
) -> Image.Image:
    """Draws a panoptic map over its photograph.

    Args:
        image: uint8 RGB [H, W, 3].
        panoptic: Integer [H, W], segment ids; ids not listed in `segments`, and 0, are void.
        segments: (id, class) of each segment.
        opacity: How much the colours cover the photograph, 0..1.
        labels: Whether to write class names.

    Returns:
        An RGB picture [H, W]; void pixels show the photograph.

    Raises:
        ValueError: If the sizes differ or `opacity` is outside 0..1.
    """
    if image.shape[:2] != panoptic.shape:
        raise ValueError(
            f"image: expected height and width {list(panoptic.shape)}, as the panoptic map has, "
            f"got {list(image.shape[:2])}"
        )
    if not 0.0 <= opacity <= 1.0:
        raise ValueError(f"opacity: expected a number in 0..1, got {opacity}")
    owner = _owner_map(panoptic, [id_ for id_, _ in segments])
    colors = _segment_colors([category for _, category in segments])

    photo = Image.fromarray(image)
    palette = np.array([(0, 0, 0), *colors], dtype=np.uint8)
    isthing = np.array([False, *(category.isthing for _, category in segments)])
    cover = np.where(isthing, 255 * opacity, 255 * opacity * _STUFF_OPACITY).round().astype(np.uint8)
    cover[0] = 0
    picture = Image.composite(Image.fromarray(palette[owner]), photo, Image.fromarray(cover[owner]))
    picture = _with_outlines(picture, owner, isthing, colors)
    if labels:
        names = [category.display_name for _, category in segments]
        draw_labels(picture, owner, names, colors)
    return picture


def _owner_map(panoptic: npt.NDArray[np.integer[Any]], ids: Sequence[int]) -> npt.NDArray[np.uint16]:
    """Position of each pixel's segment in `ids`, plus one; 0 for void. Ids of any size, so no table by id."""
    order = np.argsort(np.asarray(ids, dtype=np.int64), kind="stable")
    sorted_ids = np.asarray(ids, dtype=np.int64)[order]
    if not len(ids):
        return np.zeros(panoptic.shape, dtype=np.uint16)
    place = np.minimum(np.searchsorted(sorted_ids, panoptic), len(ids) - 1)
    found = (sorted_ids[place] == panoptic) & (panoptic != 0)
    return np.where(found, order[place] + 1, 0).astype(np.uint16)


def _segment_colors(categories: Sequence[Category]) -> list[Color]:
    seen: Counter[Category] = Counter()
    colors = []
    for category in categories:
        colors.append(instance_color(category.color, seen[category]))
        seen[category] += 1
    return colors


def _with_outlines(
    picture: Image.Image,
    owner: npt.NDArray[np.uint16],
    isthing: npt.NDArray[np.bool_],
    colors: Sequence[Color],
) -> Image.Image:
    """Adds light lines where segments meet, strong around things and faint between stuff."""
    strength = np.zeros(owner.shape, dtype=np.uint8)
    for here, there in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        first, second = owner[here], owner[there]
        line = np.where(isthing[first] | isthing[second], _THING_LINE, _STUFF_LINE)
        line = np.where(first != second, line, 0).astype(np.uint8)
        np.maximum(strength[here], line, out=strength[here])
        np.maximum(strength[there], line, out=strength[there])
    outline = Image.fromarray(strength)
    # The line is two pixels wide, as suits a COCO photograph; larger pictures get about 1/250 of their
    # shorter edge.
    reach = (min(owner.shape) / 250 - 2.0) / 2
    if reach > 0:
        grown = np.asarray(outline.filter(ImageFilter.BoxBlur(reach)), dtype=np.float32) * (1 + reach)
        outline = Image.fromarray(np.minimum(grown, _THING_LINE).astype(np.uint8))
    light = np.array([(255, 255, 255), *(_lighter(color) for color in colors)], dtype=np.uint8)
    return Image.composite(Image.fromarray(light[owner]), picture, outline)


def _lighter(color: Color) -> Color:
    red, green, blue = ((channel + 255 * 2) // 3 for channel in color)
    return red, green, blue
