"""Draws panoptic maps over images: colored segments, outlines and class names."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter

from panfpn_fast.data import Category
from panfpn_fast.data.sample import runs_of, segment_boxes
from panfpn_fast.inference.legend import draw_legend, legend_rows
from panfpn_fast.inference.name_placement import draw_labels

Color = tuple[int, int, int]
ColorBy = Literal["class", "instance"]

__all__ = ["distinct_color", "draw_panoptic", "instance_color"]

MAX_LABELS = 30
"""Above this many names, a picture gets a legend."""

# Multiples of (1/p, 1/p^2) modulo 1, where p is the plastic number, fill the unit square evenly for any number of
# points (the R2 sequence, Roberts 2018). Even a few instances therefore get clearly different shades.
_PLASTIC = 1.3247179572447460

# Things stand out: stuff is drawn with lower opacity (a factor) and fainter borders (strength out of 255).
_STUFF_OPACITY = 0.85
_THING_LINE = 220
_STUFF_LINE = 110


def instance_color(color: Color, index: int) -> Color:
    """Returns the shade for an instance of a class, so that neighbouring instances are distinguishable.

    Args:
        color: Color of the class, (R, G, B) in 0..255.
        index: Number of the instance within its class, from 0. Instance 0 gets the color of the class.

    Returns:
        (R, G, B) in 0..255, the same for the same arguments.
    """
    if index == 0:
        return color
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
    hue += 0.14 * _spread(index / _PLASTIC)
    # Very dark colors cannot become darker, and very light ones cannot become lighter. Their shades therefore start
    # from a medium lightness.
    lightness = min(max(lightness, 0.35), 0.7) + 0.3 * _spread(index / _PLASTIC**2)
    red, green, blue = colorsys.hls_to_rgb(hue % 1.0, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def _spread(position: float) -> float:
    """Returns the position modulo 1, in -0.5..0.5."""
    return (position + 0.5) % 1.0 - 0.5


def distinct_color(index: int) -> Color:
    """Returns the color of a thing among all things of a picture; those of neighbouring numbers differ strongly.

    Args:
        index: Number of the thing, from 0.

    Returns:
        (R, G, B) in 0..255, the same for the same number; never grey.
    """
    lightness = 0.53 + 0.24 * _spread(index / _PLASTIC**2)
    red, green, blue = colorsys.hls_to_rgb((index / _PLASTIC) % 1.0, lightness, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_panoptic(
    image: npt.NDArray[np.uint8],
    panoptic: npt.NDArray[np.integer[Any]],
    segments: Sequence[tuple[int, Category]],
    *,
    opacity: float = 0.5,
    labels: bool = True,
    color_by: ColorBy = "class",
    boxes: bool = False,
    scores: Sequence[float | None] | None = None,
    max_labels: int | None = MAX_LABELS,
) -> Image.Image:
    """Draws a panoptic map over its image.

    Args:
        image: uint8 RGB [H, W, 3].
        panoptic: Integer [H, W], segment ids; 0 and ids that are not in `segments` are void.
        segments: (id, category) of each segment.
        opacity: Opacity of the colors over the image, 0..1.
        labels: Whether to write class names.
        color_by: "class" for the colors of the classes, in shades for the instances of one class, or "instance" for a
            color of its own for each thing; stuff keeps the colors of the classes.
        boxes: Whether to draw the boxes of things around their pixels.
        scores: Score of each segment, written after its name; None for a segment without one.
        max_labels: Largest number of names; None for no limit. If there are more segments, the largest ones are named,
            and a legend in a corner lists the classes.

    Returns:
        An RGB image of size [H, W]; void pixels show the input image.

    Raises:
        TypeError: If `max_labels` is not an integer or None.
        ValueError: If the sizes differ, `opacity` is outside 0..1, `max_labels` is negative, or `color_by` is another
            word.
    """
    if image.shape[:2] != panoptic.shape:
        raise ValueError(
            f"image: expected height and width {list(panoptic.shape)}, those of the panoptic map, "
            f"got {list(image.shape[:2])}"
        )
    if not 0.0 <= opacity <= 1.0:
        raise ValueError(f"opacity: expected a number in 0..1, got {opacity}")
    if color_by not in get_args(ColorBy):
        raise ValueError(f'color_by: expected "class" or "instance", got {color_by!r}')
    if max_labels is not None and (isinstance(max_labels, bool) or not isinstance(max_labels, int)):
        raise TypeError(f"max_labels: expected an integer or None, got {type(max_labels).__name__}")
    if max_labels is not None and max_labels < 0:
        raise ValueError(f"max_labels: expected at least 0, got {max_labels}")
    categories = [category for _, category in segments]
    owner = _Owner(panoptic, [id_ for id_, _ in segments])
    colors = _segment_colors(categories, color_by)
    isthing = np.array([False, *(category.isthing for category in categories)])

    cover = np.where(isthing, 255 * opacity, 255 * opacity * _STUFF_OPACITY).round().astype(np.uint8)
    cover[0] = 0
    flat = owner.picture([(0, 0, 0), *colors])
    drawing = Image.composite(flat, Image.fromarray(image), Image.fromarray(owner.spread(cover)))
    drawing = _with_outlines(drawing, owner, isthing, colors)
    if boxes:
        _draw_boxes(drawing, owner, isthing, colors)
    if labels:
        names = [category.display_name for category in categories]
        panel = None
        if max_labels is not None and np.count_nonzero(owner.areas) > max_labels:
            panel = draw_legend(drawing, isthing[owner.map], legend_rows(names, colors, owner.areas))
        if scores is not None:
            names = [
                name if score is None else f"{name} {score:.2f}"
                for name, score in zip(names, scores, strict=True)
            ]
        draw_labels(drawing, owner.map, names, colors, max_labels, panel)
    return drawing


class _Owner:
    """The segment of each pixel.

    The map consists of runs of equal pixels in a row. Tables are looked up once for each run, not for each pixel, which
    makes large images fast.

    Attributes:
        map: [H, W], the index of each pixel's segment in `ids`, plus one; 0 for void.
        areas: int64 [N], the number of pixels of each segment.
    """

    def __init__(self, panoptic: npt.NDArray[np.integer[Any]], ids: Sequence[int]) -> None:
        self._runs = runs_of(panoptic)
        # Ids may be large, so they are found by binary search and not with a table indexed by id.
        order = np.argsort(np.asarray(ids, dtype=np.int64), kind="stable")
        sorted_ids = np.asarray(ids, dtype=np.int64)[order]
        value = self._runs.value.astype(np.int64)
        place = np.searchsorted(sorted_ids, value).clip(max=max(len(ids) - 1, 0))
        found = (value != 0) & (sorted_ids[place] == value) if len(ids) else np.zeros(len(value), dtype=bool)
        self._of_run = np.zeros(len(value), np.uint16 if len(ids) <= np.iinfo(np.uint16).max else np.int32)
        self._of_run[found] = order[place[found]] + 1
        self._shape = (panoptic.shape[0], panoptic.shape[1])
        self.map = self.spread(np.arange(len(ids) + 1, dtype=self._of_run.dtype))
        self.areas = np.bincount(self._of_run, self._runs.length, len(ids) + 1)[1:].astype(np.int64)

    def spread(self, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns the map [H, W] of the values in a table [N + 1], whose first one is that of void."""
        return self._runs.map_of(table[self._of_run], self._shape)

    def picture(self, colors: Sequence[Color]) -> Image.Image:
        """Returns the picture of the colors in a list, whose first one is that of void."""
        packed = np.array([(*color, 255) for color in colors], np.uint8).view(np.uint32)[:, 0]
        height, width = self._shape
        return Image.frombuffer("RGB", (width, height), self.spread(packed), "raw", "RGBX", 0, 1)


def _segment_colors(categories: Sequence[Category], color_by: ColorBy) -> list[Color]:
    seen: Counter[Category | bool] = Counter()
    colors = []
    for category in categories:
        own = color_by == "instance" and category.isthing
        key = own or category
        colors.append(distinct_color(seen[key]) if own else instance_color(category.color, seen[key]))
        seen[key] += 1
    return colors


def _with_outlines(
    drawing: Image.Image, owner: _Owner, isthing: npt.NDArray[np.bool_], colors: Sequence[Color]
) -> Image.Image:
    """Draws light lines between segments, strong around things and faint between stuff."""
    side = owner.spread(np.where(isthing, _THING_LINE, _STUFF_LINE).astype(np.uint8))
    strength = np.zeros_like(side)
    for here, there in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        line = np.maximum(side[here], side[there])
        line *= owner.map[here] != owner.map[there]
        np.maximum(strength[here], line, out=strength[here])
        np.maximum(strength[there], line, out=strength[there])
    outline = Image.fromarray(strength)
    # The line is two pixels wide, which suits COCO images. In larger images it is about 1/250 of the shorter edge wide.
    reach = (min(strength.shape) / 250 - 2.0) / 2
    if reach > 0:
        grown = [min(int(value * (1 + reach)), _THING_LINE) for value in range(256)]
        outline = outline.filter(ImageFilter.BoxBlur(reach)).point(grown)
    light = owner.picture([(255, 255, 255), *(_lighter(color) for color in colors)])
    return Image.composite(light, drawing, outline)


def _draw_boxes(
    drawing: Image.Image, owner: _Owner, isthing: npt.NDArray[np.bool_], colors: Sequence[Color]
) -> None:
    """Draws the boxes of things in lines as wide as the outlines."""
    corners, _ = segment_boxes(torch.from_numpy(owner.map.astype(np.int32)), len(colors))
    width = max(1, round(min(owner.map.shape) / 250))
    draw = ImageDraw.Draw(drawing)
    for index in np.flatnonzero(isthing[1:] & (owner.areas > 0)).tolist():
        x1, y1, x2, y2 = corners[index].tolist()
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=_lighter(colors[index]), width=width)


def _lighter(color: Color) -> Color:
    red, green, blue = ((channel + 255 * 2) // 3 for channel in color)
    return red, green, blue
