"""Reads image files as RGB, and resizes images by their shorter edge as published models require.

This module does not import torch, so that data tools can import it quickly.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile

from panfpn_fast._files import atomic_write
from panfpn_fast.data.files import ImageReadError, decode_image, open_image

ImageArray = npt.NDArray[np.uint8]
ImageSource = ImageArray | Image.Image | str | os.PathLike[str]

# Suffixes of the files that are read from a folder. A file that is named explicitly may have any suffix.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".apng", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".jp2"}
    | {".avif", ".heic", ".heif", ".hif"}
)
# Pillow's formats whose frames are images. Those of other formats are layers (PSD), sizes (ICO) or previews (MPO).
_FORMATS_OF_FRAMES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")

# Photographs hardly compress. This level takes a quarter of the default level's time and makes files a seventh larger.
PHOTO_COMPRESS_LEVEL = 2

RESIZES = ("detectron2", "mmdetection")
"""Frameworks whose resize is reproduced: its rule for sizes and its pixel values."""

__all__ = [
    "IMAGE_SUFFIXES",
    "RESIZES",
    "ImageArray",
    "ImageReadError",
    "ImageSource",
    "has_frames",
    "is_image_path",
    "read_frames",
    "read_image",
    "resize_shortest_edge",
    "resized_shape",
    "to_rgb_array",
]


def resized_shape(
    height: int, width: int, short_edge: int, max_edge: int, resize: str = "detectron2"
) -> tuple[int, int]:
    """Returns the (height, width) that `resize_shortest_edge` gives an image of this size.

    Args:
        height: Rows of the image, at least 1.
        width: Columns of the image, at least 1.
        short_edge: Length of the resized shorter edge, in pixels.
        max_edge: Upper limit for the longer edge, in pixels. Where it applies, the shorter edge is less than
            `short_edge`.
        resize: Framework whose rounding is used, one of `RESIZES`. They round differently where a size is halfway
            between two integers.

    Returns:
        The new height and width, each at least 1.

    Raises:
        TypeError: If `short_edge` or `max_edge` is not an integer.
        ValueError: If `short_edge` or `max_edge` is not positive, or `resize` is not one of `RESIZES`.

    Example:
        >>> resized_shape(427, 640, short_edge=480, max_edge=800)
        (480, 719)
    """
    for name, value in (("short_edge", short_edge), ("max_edge", max_edge)):
        if not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name}: expected an integer number of pixels, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected a positive number of pixels, got {value}")
    if resize not in RESIZES:
        raise ValueError(f"resize: expected one of {', '.join(RESIZES)}, got {resize!r}")
    if resize == "mmdetection":
        scale = min(max_edge / max(height, width), short_edge / min(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    scale = short_edge / min(height, width)
    # The shorter edge is set to `short_edge`, not to scale * edge, so that rounding cannot change it.
    if height < width:
        new_height, new_width = float(short_edge), scale * width
    else:
        new_height, new_width = scale * height, float(short_edge)
    longest = max(new_height, new_width)
    if longest > max_edge:
        shrink = max_edge / longest
        new_height, new_width = new_height * shrink, new_width * shrink
    # The shorter edge of a very elongated image would round to 0.
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def resize_shortest_edge(
    image: ImageArray, short_edge: int = 800, max_edge: int = 1333, resize: str = "detectron2"
) -> ImageArray:
    """Resizes an image so that its shorter edge has a given length, keeping the aspect ratio.

    Args:
        image: uint8 [H, W, 3].
        short_edge: Length of the resized shorter edge, in pixels.
        max_edge: Upper limit for the longer edge, in pixels.
        resize: "detectron2" or "mmdetection"; see Note.

    Returns:
        uint8 [H', W', 3], a new array of the size that `resized_shape` returns.

    Raises:
        TypeError: If `image` is not a uint8 array, or an edge is not an integer.
        ValueError: If `image` is not [H, W, 3] with H and W at least 1, an edge is not positive, or `resize` is not
            one of `RESIZES`.

    Note:
        "detectron2" equals detectron2's `ResizeShortestEdge` (sizes rounded half up) followed by its `ResizeTransform`.
        It uses Pillow's bilinear filter, whose support widens when shrinking (antialiasing). "mmdetection" equals
        mmdetection's `Resize(scale, keep_ratio=True)`. It reproduces OpenCV's `INTER_LINEAR` on uint8 bit for bit,
        without OpenCV; this filter uses two samples per axis at any scale.

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
    """Reproduces OpenCV's bilinear resize of uint8 in its fixed-point arithmetic (modules/imgproc/src/resize.cpp)."""
    if image.shape[:2] == (2 * height, 2 * width):  # for exact halving OpenCV uses means of 2 x 2 pixels
        blocks = image.reshape(height, 2, width, 2, 3).astype(np.uint16)
        return ((blocks.sum(axis=(1, 3), dtype=np.uint16) + 2) >> 2).astype(np.uint8)
    (left, right), (left_weight, right_weight) = opencv_table(image.shape[1], width, "columns")
    pixels = image.astype(np.int32)
    rows = pixels[:, left] * left_weight[:, None]
    rows += pixels[:, right] * right_weight[:, None]
    rows >>= 4
    (top, bottom), (top_weight, bottom_weight) = opencv_table(image.shape[0], height, "rows")
    result = (rows[top] * top_weight[:, None, None]) >> 16
    result += (rows[bottom] * bottom_weight[:, None, None]) >> 16
    return np.clip((result + 2) >> 2, 0, 255).astype(np.uint8)


def opencv_table(old: int, new: int, axis: Literal["rows", "columns"]) -> npt.NDArray[np.int32]:
    """Returns the two samples of OpenCV's bilinear filter for each new pixel along an axis.

    Returns:
        int32 [2, 2, new]: the positions of the two old pixels, then their weights, which sum to about 2048.
    """
    place = ((np.arange(new) + 0.5) * (1.0 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(place)
    fraction = place - first
    weights = np.rint(np.stack((np.float32(1) - fraction, fraction)) * np.float32(2048))
    if axis == "columns":
        # Outside the centre of the outermost column, OpenCV uses that column alone. At the outermost row it uses the
        # row twice, with both weights. These are rounded separately, so the result can differ by one grey level.
        outside = (first < 0) | (first >= old - 1)
        weights[:, outside] = [[2048], [0]]
    return np.stack((np.stack((first, first + 1)).clip(0, old - 1), weights)).astype(np.int32)


def read_image(path: str | os.PathLike[str]) -> ImageArray:
    """Reads an image file as an upright RGB array. Prediction, training and evaluation read images with this function.

    The EXIF orientation is applied. Palette, grey, CMYK and 1-bit images are converted to RGB. 16-bit grey is scaled to
    8 bits. An alpha channel is dropped without blending, as in detectron2. Of several frames, the first one is read.

    Args:
        path: Path of a file that Pillow can decode.

    Returns:
        uint8 [H, W, 3].

    Raises:
        FileNotFoundError: If the file does not exist.
        ImageReadError: If the file cannot be opened, is not an image, is truncated or damaged, has too many pixels, or
            cannot be converted to 8-bit RGB.

    Note:
        Pillow refuses images with more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels, by default about 179 million.
        Set that attribute or the environment variable `PANFPN_MAX_IMAGE_PIXELS` to read larger images.
    """
    with open_image(path) as image:
        return _pil_to_rgb(image)


def read_image_bytes(content: bytes, name: str) -> ImageArray:
    """Reads the content of an image file, as `read_image` reads the file.

    Args:
        content: The bytes of the file.
        name: What error messages call the image.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageReadError: If the content is not an image, is truncated or damaged, has too many pixels, or cannot be
            converted to 8-bit RGB.
    """
    with decode_image(io.BufferedReader(io.BytesIO(content)), name) as image:
        return _pil_to_rgb(image)


def read_frames(path: str | os.PathLike[str]) -> Iterator[tuple[int | None, ImageArray]]:
    """Reads the frames of an image file one by one, each as `read_image` reads one.

    Args:
        path: Path of a file that Pillow can decode. GIF, TIFF, APNG, WebP and AVIF files may have several frames.

    Yields:
        Pairs of the frame's number, from 1, and uint8 RGB [H, W, 3]. A file of one frame yields None as its number.
        Reduced copies in a TIFF file are left out.

    Raises:
        FileNotFoundError, ImageReadError: As `read_image`, at the frame that cannot be read.
    """
    with open_image(path) as image:
        if not (count := _frame_count(image)):
            yield None, _pil_to_rgb(image)
        for number in range(count):
            image.seek(number)
            if not _is_reduced(image):
                yield number + 1, _pil_to_rgb(image)


def has_frames(path: str | os.PathLike[str]) -> bool:
    """Whether `read_frames` reads several frames; the errors are the same."""
    with open_image(path) as image:
        return _frame_count(image) > 0


def _frame_count(image: Image.Image) -> int:
    """Returns the number of frames with the reduced ones, or 0 if there is only one to read."""
    count = int(getattr(image, "n_frames", 1)) if image.format in _FORMATS_OF_FRAMES else 1
    if count == 1:
        return 0
    whole = 0
    for number in range(count):
        if image.format == "TIFF":
            image.seek(number)
        whole += not _is_reduced(image)
    image.seek(0)
    return count if whole > 1 else 0


def _is_reduced(image: Image.Image) -> bool:
    """Whether a frame of a TIFF file is a copy of another one with fewer pixels, by bit 0 of the tag NewSubfileType."""
    return isinstance(image, TiffImageFile) and bool(int(image.tag_v2.get(254, 0)) & 1)


def to_rgb_array(image: ImageSource, name: str = "image") -> ImageArray:
    """Converts an array, a PIL image or a path to a uint8 RGB array.

    Args:
        image: uint8 RGB array [H, W, 3], or a PIL image, whose EXIF orientation is applied as for a file, or a path.
        name: Name of the argument in error messages.

    Returns:
        uint8 [H, W, 3]; an array argument is returned unchanged.

    Raises:
        TypeError: If `image` has another type, or is an array of another dtype.
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
        except Exception as error:  # Pillow opens files lazily, so decoding errors are raised here
            source = getattr(image, "filename", "") or "the PIL image"
            raise ImageReadError(f"{name}: cannot read {source}: {error}") from error
    _check_array(image, name)
    return image


def is_image_path(path: Path) -> bool:
    """Whether the name of a file in a folder is that of an image; hidden files are not images."""
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES


def _check_array(image: Any, name: str) -> None:
    if not isinstance(image, np.ndarray):
        kind = f"{type(image).__module__}.{type(image).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name}: expected a uint8 RGB array [H, W, 3], a PIL image or a path, got {kind}")
    if image.dtype != np.uint8:
        hint = "; (255 * array).round().astype(np.uint8) converts 0..1" if image.dtype.kind == "f" else ""
        raise TypeError(f"{name}: expected dtype uint8 (0..255), got {image.dtype}{hint}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"{name}: expected shape [H, W, 3] with H, W >= 1, got {list(image.shape)}{_shape_hint(image.shape)}"
        )


def _shape_hint(shape: tuple[int, ...]) -> str:
    """Returns advice on how to convert an array of this shape to [H, W, 3], or an empty string."""
    if 0 in shape:
        return ""
    match shape:
        case (_, _):
            return "; np.stack([array] * 3, axis=-1) makes three channels of a gray image"
        case (_, _, 1):
            return "; array.repeat(3, axis=-1) makes three channels of a gray image"
        case (1, _, _):
            return "; np.stack([array[0]] * 3, axis=-1) makes three channels of a gray image"
        case (_, _, 4):
            return "; array[..., :3] drops the alpha channel"
        case (3, _, _):
            return "; array.transpose(1, 2, 0) moves the channels"
        case (1, _, _, 3):
            return "; array[0] is one image"
    return ""


def _pil_to_rgb(image: Image.Image) -> ImageArray:
    image.load()
    image = _upright(image)
    if image.mode.startswith("I"):
        # Pillow stores 16-bit grey as I;16 or I, and its conversion would clip it at 255. 65535 / 257 = 255.
        grey = np.asarray(image).astype(np.int64)
        if grey.size and not 0 <= int(grey.min()) <= int(grey.max()) <= 65535:
            raise ValueError(
                f"expected integer pixels of at most 16 bits, got values in {grey.min()}..{grey.max()}; "
                "save the image with 8 or 16 bits per channel"
            )
        eight_bit = ((grey + 128) // 257).astype(np.uint8)
        return np.repeat(eight_bit[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError(
            "32-bit float pixels have no defined range; save the image with 8 or 16 bits per channel"
        )
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # a direct conversion to RGB makes Pillow warn about transparency
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block does not make the pixels unreadable
        return image


def save_png(image: Image.Image, path: Path, compress_level: int = 6, info: PngInfo | None = None) -> None:
    """Writes a PNG atomically; `compress_level` is the level of zlib, 0..9, and `info` has texts for the file."""
    with atomic_write(path) as file:
        image.save(file, format="PNG", compress_level=compress_level, pnginfo=info)
