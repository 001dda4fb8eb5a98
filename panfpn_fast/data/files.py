"""Reading images and annotations, with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


class DataError(ValueError):
    """A damaged or inconsistent image or annotation; the message names the file and what is wrong."""


class MissingFileError(FileNotFoundError, DataError):
    """An image, an annotation or a folder that is not there."""


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """Reads an image as uint8 [H, W, 3], C-contiguous, as its pixels lie in the file (Exif is not looked at).

    Raises:
        MissingFileError: There is no such file.
        DataError: It cannot be decoded.
    """
    with _decoding(path), Image.open(path) as image:
        return np.array(image.convert("RGB"))


def read_grey(path: Path) -> npt.NDArray[np.integer[Any]]:
    """Reads a grey picture of 8 or 16 bits a pixel, such as a map of numbers, as [H, W].

    Raises:
        MissingFileError: There is no such file.
        DataError: It cannot be decoded, or has colours.
    """
    with _decoding(path), Image.open(path) as image:
        mode, pixels = image.mode, np.array(image)
    if mode not in ("L", "I") and not mode.startswith("I;16"):
        raise DataError(f"{path}: expected grey pixels of 8 or 16 bits, got Pillow's mode {mode}")
    return pixels


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except Exception as error:  # decoders meet files cut short or damaged with many types
        raise DataError(f"{path}: cannot be decoded: {error}") from None


def check_same_size(image: npt.NDArray[Any], image_path: Path, labels: npt.NDArray[Any], path: Path) -> None:
    """Compares an image with its map of labels.

    Raises:
        DataError: Their sizes differ.
    """
    if image.shape[:2] != labels.shape[:2]:
        raise DataError(
            f"{path}: is {labels.shape[1]} x {labels.shape[0]} pixels, and its image {image_path} "
            f"{image.shape[1]} x {image.shape[0]}"
        )


def read_panoptic_json(path: Path) -> dict[str, Any]:
    """Reads a JSON of COCO's panoptic format: an object with a list `annotations`.

    Raises:
        MissingFileError: There is no such file.
        DataError: It is no JSON, or not of this format.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise DataError(f"{path}: expected COCO's panoptic format, an object with a list 'annotations'")
    return content
