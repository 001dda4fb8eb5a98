"""Reading images and annotations, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


class DataError(ValueError):
    """A damaged or inconsistent image or annotation; the message names the file and what is wrong."""


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """Reads an image as uint8 [H, W, 3], C-contiguous, as its pixels lie in the file (Exif is not looked at).

    Raises:
        FileNotFoundError: There is no such file.
        DataError: It cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for files cut short or damaged
        raise DataError(f"{path}: cannot be decoded: {error}") from None


def read_panoptic_json(path: Path) -> dict[str, Any]:
    """Reads a JSON of COCO's panoptic format: an object with a list `annotations`.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: It is no JSON, or not of this format.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise DataError(f"{path}: expected COCO's panoptic format, an object with a list 'annotations'")
    return content
