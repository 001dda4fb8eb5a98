"""Resizes images on the device of a tensor, with the pixel values of `resize_shortest_edge`.

The filters are Pillow's and OpenCV's in their fixed-point arithmetic. Pixels are computed from integers only, so all
devices give equal bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from panfpn_fast.data.images import opencv_table

_BITS = 22  # of Pillow's weights for 8-bit pixels (PRECISION_BITS in Resample.c)
_CHECKED_PIXELS, _TRIES = 2000, 40

Table = npt.NDArray[np.int32]
"""[2, K, new]: for each new pixel along an axis, the positions of K old pixels, then their weights."""


class ResizePlan(NamedTuple):
    """How to resize images of one size to another."""

    rows: Table
    columns: Table
    resize: str  # one of `RESIZES`
    columns_first: bool


@lru_cache(maxsize=256)
def resize_plan(old: tuple[int, int], new: tuple[int, int], resize: str) -> ResizePlan | None:
    """Plans how to resize images from one size to another.

    Args:
        old: Height and width of the images, at least 1.
        new: Height and width after resizing, at least 1; not both as before.
        resize: One of `RESIZES`, the framework whose filter is used.

    Returns:
        The plan, which the caller must not change; None if the installed Pillow has another filter.

    Note:
        Pillow rounds to 8 bits between its two passes. Since version 13 it begins with the rows for some sizes. The
        plan therefore follows what the installed Pillow does with an image of this size, which takes some
        milliseconds.
    """
    if resize == "mmdetection":
        tables = opencv_table(old[0], new[0], "rows"), opencv_table(old[1], new[1], "columns")
        return ResizePlan(*tables, resize, columns_first=True)
    rows, columns = _pillow_table(old[0], new[0]), _pillow_table(old[1], new[1])
    columns_first = _pillow_order(old, new, rows, columns)
    return None if columns_first is None else ResizePlan(rows, columns, resize, columns_first)


def resize_pixels(image: Tensor, plan: ResizePlan, rows: Tensor, columns: Tensor) -> Tensor:
    """Resizes an image on its device.

    Args:
        image: uint8 [H, W, 3] of the plan's old size.
        plan: The plan.
        rows: The plan's table of rows, on the image's device.
        columns: The plan's table of columns, on the image's device.

    Returns:
        uint8 [new height, new width, 3].

    Note:
        Equals `resize_shortest_edge` bit for bit. Deterministic. No host sync.
    """
    height, width = rows.shape[2], columns.shape[2]
    if plan.resize != "mmdetection":
        passes = [(1, columns), (0, rows)]
        for axis, table in passes if plan.columns_first else reversed(passes):
            if image.shape[axis] != table.shape[2]:
                # The weights of a pixel sum to 1 within their rounding, so no sum exceeds 255.
                image = ((_weighted(image, table, axis) + (1 << (_BITS - 1))) >> _BITS).to(torch.uint8)
        return image
    if tuple(image.shape[:2]) == (2 * height, 2 * width):  # OpenCV uses means of 2 x 2 pixels
        blocks = image.reshape(height, 2, width, 2, 3).sum(dim=(1, 3), dtype=torch.int32)
        return ((blocks + 2) >> 2).to(torch.uint8)
    across = _weighted(image, columns, 1) >> 4
    total = _weighted(across, rows, 0, shift=16)
    return ((total + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _weighted(image: Tensor, table: Tensor, axis: int, shift: int = 0) -> Tensor:
    """Sums weighted pixels along an axis, int32 [H, W, 3]; each product is shifted to the right first."""
    total: Tensor | None = None
    for places, weights in zip(table[0], table[1], strict=True):
        product = image.index_select(axis, places) * weights.reshape(-1, *[1] * (2 - axis))
        if shift:
            product >>= shift
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _pillow_table(old: int, new: int) -> Table:
    """Computes the weights of Pillow's bilinear filter, a triangle that widens when shrinking (antialiasing)."""
    scale = old / new
    widened = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    # Truncated to integers, like in C; the negative ones among the first are raised to 0.
    first = np.maximum((centre - widened + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + widened + 0.5).astype(np.int64), old) - first
    taps = np.arange(int(count.max()))[:, None]
    distance = np.abs((taps + first - centre + 0.5) * (1.0 / widened))
    weights = np.where((taps < count) & (distance < 1.0), 1.0 - distance, 0.0)
    # Pillow adds in this order, which may change the last bit of the sum.
    total = np.zeros(new)
    for row in weights:
        total += row
    fixed = (0.5 + weights / total * (1 << _BITS)).astype(np.int32)
    return np.stack((np.minimum(first + taps, old - 1).astype(np.int32), fixed))


def _pillow_order(old: tuple[int, int], new: tuple[int, int], rows: Table, columns: Table) -> bool | None:
    """Whether the installed Pillow resizes along the columns first; None if neither order gives its pixels."""
    orders = [True, False] if old[0] != new[0] and old[1] != new[1] else [True]
    # Few pixels of a result may be equal in both orders, so that further images must decide.
    for seed in range(_TRIES):
        image = np.frombuffer(np.random.default_rng(seed).bytes(old[0] * old[1]), np.uint8).reshape(old)
        resized = np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR))
        chosen = np.linspace(0, new[0] - 1, min(new[0], 2 + _CHECKED_PIXELS // new[1])).astype(np.int64)
        read = image[rows[0][:, chosen]]  # [K, chosen, old width]
        orders = [
            columns_first
            for columns_first in orders
            if np.array_equal(
                _resized_rows(read, rows[1][:, chosen], columns, columns_first), resized[chosen]
            )
        ]
        if len(orders) < 2:
            break
    return orders[0] if orders else None


def _resized_rows(
    pixels: npt.NDArray[np.uint8], weights: npt.NDArray[np.int32], columns: Table, columns_first: bool
) -> npt.NDArray[np.uint8]:
    """Returns M new rows [M, new width] of the K old rows [K, M, old width] that each reads with weights [K, M]."""
    if columns_first:
        pixels = _across(pixels, columns)
    pixels = _rounded((pixels * weights[:, :, None]).sum(axis=0, dtype=np.int32))
    return pixels if columns_first else _across(pixels, columns)


def _across(pixels: npt.NDArray[np.uint8], columns: Table) -> npt.NDArray[np.uint8]:
    total = np.zeros((*pixels.shape[:-1], columns.shape[2]), np.int32)
    for places, weights in zip(columns[0], columns[1], strict=True):
        total += pixels[..., places] * weights
    return _rounded(total)


def _rounded(total: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    return ((total + (1 << (_BITS - 1))) >> _BITS).astype(np.uint8)
