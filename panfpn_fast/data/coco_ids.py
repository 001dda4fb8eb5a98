"""Converts between segment ids and their colours in COCO's panoptic PNGs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_MAX_ID = 256**3 - 1


def encode_panoptic(panoptic: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    """Encodes segment ids as colours.

    Args:
        panoptic: Integer [H, W], ids in 0..16777215.

    Returns:
        uint8 [H, W, 3] with id = R + 256 G + 65536 B.

    Raises:
        ValueError: If an id is outside 0..16777215.

    Example:
        >>> encode_panoptic(np.array([[1, 256 + 2]])).tolist()
        [[[1, 0, 0], [2, 1, 0]]]
    """
    if panoptic.size and not 0 <= int(panoptic.min()) <= int(panoptic.max()) <= _MAX_ID:
        raise ValueError(f"panoptic: expected ids in 0..{_MAX_ID}, got {panoptic.min()}..{panoptic.max()}")
    panoptic = panoptic.astype(np.int32)  # narrower than the masks and shifts may be
    return np.stack([panoptic & 255, panoptic >> 8 & 255, panoptic >> 16], axis=-1).astype(np.uint8)


def decode_panoptic(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Decodes an image written by `encode_panoptic`: uint8 [H, W, 3] to int32 [H, W]."""
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 65536 * blue
