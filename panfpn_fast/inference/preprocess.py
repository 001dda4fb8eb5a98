"""Images in: reading any picture file as RGB, and the shortest-edge resizes the published models were trained
with.

Nothing here needs torch, so data tools can import it cheaply.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

ImageArray = npt.NDArray[np.uint8]
ImageSource = ImageArray | Image.Image | str | os.PathLike[str]

# What a folder is searched for; a file named outright may end in anything.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".jp2"}
)

RESIZES = ("detectron2", "mmdetection")
"""Whose size rule and whose pixels a resize has."""

__all__ = [
    "IMAGE_SUFFIXES",
    "RESIZES",
    "ImageArray",
    "ImageReadError",
    "ImageSource",
    "is_image_path",
    "read_image",
    "resize_shortest_edge",
    "resized_shape",
    "to_rgb_array",
]


class ImageReadError(OSError, ValueError):
    """A file that exists but does not hold a picture Pillow can decode; the message names the file."""


def resized_shape(
    height: int, width: int, short_edge: int, max_edge: int, resize: str = "detectron2"
) -> tuple[int, int]:
    """Returns the (height, width) that `resize_shortest_edge` gives an image of this size.

    Args:
        height: Rows of the image, at least 1.
        width: Columns of the image, at least 1.
        short_edge: Wanted length of the shorter edge, in pixels.
        max_edge: Upper limit for the longer edge, in pixels; where it binds, the shorter edge gets less.
        resize: Whose order of roundings decides where a size lies halfway between two: one of `RESIZES`.

    Returns:
        The new height and width, each at least 1.

    Raises:
        TypeError: If `short_edge` or `max_edge` is not a whole number.
        ValueError: If `short_edge` or `max_edge` is not positive, or `resize` is none of `RESIZES`.

    Example:
        >>> resized_shape(427, 640, short_edge=480, max_edge=800)
        (480, 719)
    """
    for name, value in (("short_edge", short_edge), ("max_edge", max_edge)):
        if not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name}: expected a whole number of pixels, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected a positive number of pixels, got {value}")
    if resize not in RESIZES:
        raise ValueError(f"resize: expected one of {', '.join(RESIZES)}, got {resize!r}")
    if resize == "mmdetection":
        scale = min(max_edge / max(height, width), short_edge / min(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    scale = short_edge / min(height, width)
    # The shorter edge is the requested number itself, not scale * edge, so that rounding cannot move it.
    if height < width:
        new_height, new_width = float(short_edge), scale * width
    else:
        new_height, new_width = scale * height, float(short_edge)
    longest = max(new_height, new_width)
    if longest > max_edge:
        shrink = max_edge / longest
        new_height, new_width = new_height * shrink, new_width * shrink
    # A very long and thin image would otherwise lose its short edge altogether.
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def resize_shortest_edge(
    image: ImageArray, short_edge: int = 800, max_edge: int = 1333, resize: str = "detectron2"
) -> ImageArray:
    """Resizes an image so that its shorter edge has a given length, keeping the aspect ratio.

    Args:
        image: uint8 [H, W, 3].
        short_edge: Wanted length of the shorter edge, in pixels.
        max_edge: Upper limit for the longer edge, in pixels.
        resize: "detectron2" or "mmdetection"; see Note.

    Returns:
        uint8 [H', W', 3], a new array; `resized_shape` tells its size beforehand.

    Raises:
        TypeError: If `image` is not a uint8 array, or an edge is not a whole number.
        ValueError: If `image` is not [H, W, 3] with H and W at least 1, an edge is not positive, or `resize` is none
            of `RESIZES`.

    Note:
        "detectron2" equals its `ResizeShortestEdge` (sizes rounded half up) followed by its `ResizeTransform`:
        Pillow's bilinear filter, whose support widens when shrinking (antialiasing). "mmdetection" equals its
        `Resize(scale, keep_ratio=True)`: OpenCV's `INTER_LINEAR` on uint8, which takes two samples per axis whatever
        the scale, bit for bit, without OpenCV.

    Example:
        >>> resize_shortest_edge(np.zeros((427, 640, 3), np.uint8), 480, 800).shape
        (480, 719, 3)
    """
    _check_array(image, "image")
    height, width = image.shape[:2]
    new_height, new_width = resized_shape(height, width, short_edge, max_edge, resize)
    if (new_height, new_width) == (height, width):
        return np.array(image)
    if resize == "mmdetection":
        return _resize_as_opencv(image, new_height, new_width)
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.array(resized, dtype=np.uint8)


def _resize_as_opencv(image: ImageArray, height: int, width: int) -> ImageArray:
    """OpenCV's bilinear resize of uint8, in its fixed-point arithmetic (modules/imgproc/src/resize.cpp)."""
    if image.shape[:2] == (2 * height, 2 * width):  # exact halving is its area filter: means of 2 x 2 pixels
        blocks = image.reshape(height, 2, width, 2, 3).astype(np.uint16)
        return ((blocks.sum(axis=(1, 3), dtype=np.uint16) + 2) >> 2).astype(np.uint8)
    left, right, left_weight, right_weight = _opencv_samples(image.shape[1], width)
    # Beyond the middle of the outermost column it stands alone. Rows are repeated instead, and keep their weights,
    # which are rounded one by one: that differs by a grey level.
    outside = (left < 0) | (left >= image.shape[1] - 1)
    left_weight[outside], right_weight[outside] = 2048, 0
    left, right = left.clip(0, image.shape[1] - 1), right.clip(0, image.shape[1] - 1)
    pixels = image.astype(np.int32)
    rows = pixels[:, left] * left_weight[:, None]
    rows += pixels[:, right] * right_weight[:, None]
    rows >>= 4
    top, bottom, top_weight, bottom_weight = _opencv_samples(image.shape[0], height)
    top, bottom = top.clip(0, image.shape[0] - 1), bottom.clip(0, image.shape[0] - 1)
    result = (rows[top] * top_weight[:, None, None]) >> 16
    result += (rows[bottom] * bottom_weight[:, None, None]) >> 16
    return np.clip((result + 2) >> 2, 0, 255).astype(np.uint8)


def _opencv_samples(old: int, new: int) -> tuple[npt.NDArray[np.int32], ...]:
    """For each new pixel along an axis: its two old neighbours and their weights of 2048 together, about."""
    place = ((np.arange(new) + 0.5) * (1.0 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(place)
    fraction = place - first
    weights = [np.rint(share * np.float32(2048)) for share in (np.float32(1) - fraction, fraction)]
    return tuple(array.astype(np.int32) for array in (first, first + 1, *weights))


def read_image(path: str | os.PathLike[str]) -> ImageArray:
    """Reads a picture file as an upright RGB array.

    The EXIF orientation is applied. Palette, grey, CMYK and 1-bit pictures become RGB; 16-bit grey is scaled
    to 8 bits; an alpha channel is dropped (the colours underneath stay, as in detectron2). Of an animation
    the first frame counts.

    Args:
        path: Any file that Pillow can decode.

    Returns:
        uint8 [H, W, 3].

    Raises:
        FileNotFoundError: If there is no such file (and the other `OSError`s of opening a file).
        ImageReadError: If the file is not a picture, is truncated or damaged, or has no 8-bit RGB meaning.
    """
    # Opened here rather than by Pillow: errors of the file system keep their own types, the rest is decoding.
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=_formats()) as image:
                return _pil_to_rgb(image)
        # Decoders meet damaged data with many types (SyntaxError, struct.error, IndexError, zlib.error ...).
        except Exception as error:
            reason = "not a picture in a known format" if isinstance(error, UnidentifiedImageError) else error
            raise ImageReadError(f"cannot read image {os.fspath(path)}: {reason}") from error


def _formats() -> list[str]:
    """Every format that Pillow decodes itself: for EPS it starts Ghostscript, whatever the file's name says."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def to_rgb_array(image: ImageSource, name: str = "image") -> ImageArray:
    """Turns whatever a caller may hold (array, PIL image, path) into a uint8 RGB array.

    Args:
        image: uint8 RGB array [H, W, 3]; or a PIL image, whose EXIF orientation is applied as for a file; or
            a path.
        name: What error messages call the argument.

    Returns:
        uint8 [H, W, 3]; an array argument comes back as it is.

    Raises:
        TypeError: If `image` is something else, or an array of another dtype.
        ValueError: If the shape is not [H, W, 3] with H and W at least 1.
        OSError: If a path cannot be read; see `read_image`.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"{name}: expected at least one pixel, got a PIL image of size {image.size}")
        try:
            return _pil_to_rgb(image)
        except Exception as error:  # a lazily opened file fails only now, when its pixels are decoded
            source = getattr(image, "filename", "") or "the PIL image"
            raise ImageReadError(f"{name}: cannot read {source}: {error}") from error
    _check_array(image, name)
    return image


def is_image_path(path: Path) -> bool:
    """Whether a file of a folder counts as a picture, judged by its name: hidden files never do."""
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES


def _check_array(image: Any, name: str) -> None:
    if not isinstance(image, np.ndarray):
        kind = f"{type(image).__module__}.{type(image).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name}: expected a uint8 RGB array [H, W, 3], a PIL image or a path, got {kind}")
    if image.dtype != np.uint8:
        raise TypeError(f"{name}: expected dtype uint8 (0..255), got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{name}: expected shape [H, W, 3] with H, W >= 1, got {list(image.shape)}")


def _pil_to_rgb(image: Image.Image) -> ImageArray:
    image.load()
    image = _upright(image)
    if image.mode.startswith("I"):
        # 16-bit grey, which Pillow holds as I;16 or I and would clip at 255. 65535 / 257 = 255.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        eight_bit = ((grey + 128) // 257).astype(np.uint8)
        return np.repeat(eight_bit[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError(
            "32-bit float pixels have no defined range; save the picture with 8 or 16 bits per channel"
        )
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # in one step Pillow warns about palettes with transparency
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block does not make the pixels unreadable
        return image
