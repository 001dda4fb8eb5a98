"""Reads images and annotations; errors name the file."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError, features

from panfpn_fast._errors import UserError, one_line

T = TypeVar("T")

_PIXEL_LIMIT = "PANFPN_MAX_IMAGE_PIXELS"
# The brands in the first box of the files.
_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}


class DataError(UserError):
    """An image or annotation is damaged or inconsistent; the message names the file and the defect."""


class MissingFileError(FileNotFoundError, DataError):
    """An image, an annotation or a directory does not exist."""


class ImageReadError(OSError, DataError):
    """An existing file cannot be read as an image; the message names the file."""


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image file, and names the file in the errors of opening and decoding it.

    Decoding can be completed in the body of the `with` statement.

    Raises:
        MissingFileError: If the file does not exist.
        ImageReadError: If the file cannot be opened, is not an image, is damaged, or has too many pixels.

    Note:
        Pillow warns of images with more than `PIL.Image.MAX_IMAGE_PIXELS` pixels and refuses more than twice as many.
        The environment variable `PANFPN_MAX_IMAGE_PIXELS` replaces this limit.
    """
    name = os.fspath(path)
    # The file is opened here, not by Pillow, so that all other errors are known to be decoding errors.
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below
    except FileNotFoundError:
        raise MissingFileError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte or a lone surrogate in the name
        raise ImageReadError(f"{name}: cannot be opened: {getattr(error, 'strerror', '') or error}") from None
    with file, decode_image(file, name) as image:
        yield image


@contextmanager
def decode_image(file: io.BufferedReader, name: str) -> Iterator[Image.Image]:
    """Opens an image in an open file, and puts a name before the errors of decoding it.

    Decoding can be completed in the body of the `with` statement.

    Raises:
        ImageReadError: If the content is not an image, is damaged, or has too many pixels.
    """
    _set_pixel_limit()
    try:
        if missing := _missing_plugin(file.peek(64)[:64]):
            raise ValueError(missing)
        with Image.open(file, formats=_formats()) as image:
            yield image
    except Image.DecompressionBombError:
        raise ImageReadError(
            f"{name}: has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, twice Pillow's limit; for a file "
            f"that you trust, set PIL.Image.MAX_IMAGE_PIXELS or the environment variable {_PIXEL_LIMIT}"
        ) from None
    # Decoders raise many exception types for damaged data (SyntaxError, struct.error, IndexError, zlib.error ...).
    except Exception as error:
        reason = "not an image in a known format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageReadError(f"{name}: cannot be decoded: {reason}") from error


def missing_plugin(suffix: str) -> str:
    """Returns how to read image files of a suffix such as ".heic"; an empty text if Pillow reads them already."""
    brand = {".heic": b"heic", ".heif": b"heic", ".hif": b"heic", ".avif": b"avif"}.get(suffix.lower(), b"")
    return _missing_plugin(b"\0\0\0\x0cftyp" + brand)


def _missing_plugin(head: bytes) -> str:
    """Loads Pillow's plugin for a file that begins with these bytes; returns how to install it if it is missing."""
    box = head[8 : int.from_bytes(head[:4], "big")] if head[4:8] == b"ftyp" else b""
    brands = {box[start : start + 4] for start in range(0, len(box), 4)}
    if brands & _AVIF:
        if not features.check("avif"):
            return "this Pillow reads no AVIF; a newer one does: pip install --upgrade pillow"
    elif brands & _HEIF:
        try:
            _register_heif()
        except ImportError:
            return "HEIC images need another package: pip install pillow-heif"
    return ""


@functools.cache
def _register_heif() -> None:
    importlib.import_module("pillow_heif").register_heif_opener()


def _set_pixel_limit() -> None:
    value = os.environ.get(_PIXEL_LIMIT, "")
    if not value:
        return
    if not (value.isascii() and value.isdigit() and len(value) < 19 and int(value) > 0):
        raise DataError(f"{_PIXEL_LIMIT}: expected a positive number of pixels, got {value!r}")
    Image.MAX_IMAGE_PIXELS = int(value)


def _formats() -> list[str]:
    """Returns the formats that Pillow decodes itself, all but EPS: for EPS it would start Ghostscript.

    Pillow detects the format from the content, so the suffix of a file does not prevent this.
    """
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def read_label_map(path: Path, palette: bool = False) -> npt.NDArray[np.integer[Any]]:
    """Reads a gray image with 8 or 16 bits per pixel, whose values are labels, as [H, W].

    The pixels are in the order of the file; an Exif orientation is ignored.

    Args:
        path: The file.
        palette: Whether images with a palette are read, too; their labels are the numbers of the colors.

    Raises:
        MissingFileError: If the file does not exist.
        DataError: If the file cannot be decoded, is lossy, or is not gray.
    """
    with open_image(path) as image:
        kind, mode, pixels = _lossy_kind(image), image.mode, np.array(image)
    if kind or (mode not in ("L", "I", *("P" * palette)) and not mode.startswith("I;16")):
        raise DataError(f"{path}: expected gray pixels of 8 or 16 bits, got {kind or _kind(mode)}")
    return pixels


def read_segment_ids(path: Path) -> npt.NDArray[np.uint8]:
    """Reads an image whose colours encode segment ids, COCO's panoptic PNG, as uint8 [H, W, 3], C-contiguous.

    An alpha channel is dropped. The pixels are in the order of the file; an Exif orientation is ignored.

    Raises:
        MissingFileError: If the file does not exist.
        DataError: If the file cannot be decoded, is lossy, or has other than 8-bit RGB pixels.
    """
    with open_image(path) as image:
        kind = _lossy_kind(image)
        if not kind and image.mode not in ("RGB", "RGBA"):
            kind = _kind(image.mode)
        # Pillow reads PNGs with 16 bits per channel as mode RGB and drops the lower 8 bits.
        if not kind and any("16" in str(tile[3]) for tile in getattr(image, "tile", ())):
            kind = "16 bits per channel"
        colors = None if kind else np.array(image)
    if colors is None:
        raise DataError(
            f"{path}: expected 8-bit RGB pixels, whose colour is the segment id R + 256 G + 65536 B, got {kind}"
        )
    return np.ascontiguousarray(colors[..., :3])


def _lossy_kind(image: Image.Image) -> str:
    return f"a lossy {image.format} file" if image.format in ("JPEG", "MPO", "JPEG2000") else ""


def _kind(mode: str) -> str:
    names = {
        "1": "1-bit ",
        "L": "gray ",
        "P": "palette ",
        "LA": "gray and alpha ",
        "I": "integer ",
        "F": "float ",
    }
    name = "16-bit gray " if mode.startswith("I;16") else names.get(mode, "")
    return f"{name}pixels of Pillow's mode {mode}"


def check_same_size(image: npt.NDArray[Any], image_path: Path, labels: npt.NDArray[Any], path: Path) -> None:
    """Compares the sizes of an image and its map of labels.

    Raises:
        DataError: If the sizes differ.
    """
    if image.shape[:2] != labels.shape[:2]:
        turned = image.shape[:2] == labels.shape[1::-1]
        raise DataError(
            f"{path}: expected {image.shape[1]} x {image.shape[0]} pixels, the size of {image_path}"
            f"{' after its Exif orientation is applied' if turned else ''}, "
            f"got {labels.shape[1]} x {labels.shape[0]}"
        )


def check_folder(folder: Path, content: str) -> None:
    """Checks that a folder exists.

    Args:
        folder: The folder.
        content: What it holds, for the message, such as "images".

    Raises:
        MissingFileError: If there is no such folder.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder; expected the folder of the {content}")


def read_text(path: Path, kind: str, parse: Callable[[str], T]) -> T:
    """Reads a text file in UTF-8, with or without a byte order mark, whatever the locale is.

    Args:
        path: The file.
        kind: What the text is, for messages, such as "JSON".
        parse: Makes the result from the text.

    Raises:
        MissingFileError: If the file does not exist.
        DataError: If the file cannot be opened, is not in UTF-8, or cannot be parsed.
    """
    try:
        return parse(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}") from None
    except MemoryError:
        raise
    except Exception as error:  # parsers raise many types for the values of damaged files
        raise DataError(f"{path}: cannot be read as {kind}: {one_line(error)[:150]}") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        MissingFileError: If the file does not exist.
        DataError: If the file cannot be opened or is not JSON.
    """
    return read_text(path, "JSON", json.loads)
