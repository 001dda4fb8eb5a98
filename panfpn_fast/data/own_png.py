"""Writes PNGs under names that the user did not choose, and replaces no file of the user."""

from __future__ import annotations

import os
import re
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from panfpn_fast._errors import OutputError
from panfpn_fast.data.files import DataError, open_image
from panfpn_fast.data.images import IMAGE_SUFFIXES, save_png

_KEYWORD = "Software"


def plain_name(image_id: int | str) -> str:
    """Returns the stem of a file name for an image: its id without suffix, folders and characters of other kinds.

    Example:
        >>> plain_name("../bonn/a 1.png"), plain_name(42)
        ('bonn_a_1', '42')
    """
    text = str(image_id)
    for suffix in IMAGE_SUFFIXES:
        if text.lower().endswith(suffix):
            text = text[: -len(suffix)]
            break
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("._")[:100] or "image"


class OwnPngs:
    """Writes PNGs, each of which names the command or the method that made it.

    Only PNGs of the same maker are replaced, from an earlier run: other files may be the images or masks that it reads.

    Args:
        maker: The command or the method, such as "data show".
        refusal: The end of the message about another file of the same name, with a remedy.
    """

    def __init__(
        self, maker: str, refusal: str = "that this command did not make; give another --out"
    ) -> None:
        self._maker = f"panfpn-fast {maker}"
        self._refusal = refusal
        self._taken: set[str] = set()

    def name(self, image_id: int | str) -> str:
        """Returns the name of an image's file, such as "42.png"; no two calls return the same."""
        stem = plain_name(image_id)
        number = len(self._taken)
        name = f"{stem}.png"
        while name.casefold() in self._taken:  # some file systems do not distinguish upper from lower case
            name = f"{stem}_{number}.png"
            number += 1
        self._taken.add(name.casefold())
        return name

    def save(self, image: Image.Image, path: Path, compress_level: int = 6) -> None:
        """Writes a PNG and the missing folders.

        Raises:
            OutputError: If there is a file of that name that the maker did not make; it stays as it is.
        """
        if os.path.lexists(path) and _maker_of(path) != self._maker:
            raise OutputError(f"{path}: there is a file {self._refusal}")
        path.parent.mkdir(parents=True, exist_ok=True)
        info = PngInfo()
        info.add_text(_KEYWORD, self._maker)
        save_png(image, path, compress_level, info)


def _maker_of(path: Path) -> str | None:
    """Returns what a PNG states as its maker; None for other files."""
    try:
        with open_image(path) as image:
            return image.info.get(_KEYWORD) if image.format == "PNG" else None
    except DataError:
        return None
