"""Panoptic maps in PNGs that also contain their segments, so that one file is the whole result of an image.

Any number of processes can write such files to one folder, and the folder alone states what is done. The PNGs are those
of COCO's panoptic format (segment id = R + 256 G + 65536 B, 0 = void) with one more text chunk, which other readers
ignore.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from panfpn_fast._files import atomic_write
from panfpn_fast.data import Categories
from panfpn_fast.data.coco_ids import encode_panoptic
from panfpn_fast.data.files import DataError, open_image
from panfpn_fast.inference.coco_format import Entry, info_of, panoptic_content
from panfpn_fast.inference.result import PanopticResult

__all__ = ["find_maps", "write_json", "write_maps"]

_KEYWORD = "panfpn_fast segments"

# On a shared folder, most of the time for a file is waiting.
_READERS = 16


def encode_map(result: PanopticResult) -> tuple[bytes, str]:
    """Returns a result as a PNG that contains the segments, and the segments as JSON."""
    segments = json.dumps(info_of(result.segments))
    info = PngInfo()
    info.add_text(_KEYWORD, segments)
    with io.BytesIO() as file:
        pixels = encode_panoptic(result.panoptic.cpu().numpy())
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)
        return file.getvalue(), segments


def write_maps(batch: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Writes the maps in the columns of `BatchPredictor` to `<out>/predictions/<name>.png`.

    Each file appears complete or not at all. Writing a row again replaces the file by an equal one, so an engine may
    repeat a batch, also while an earlier attempt still runs on another machine.

    Args:
        batch: The columns `name` (the stem of the file, unique among all images), `panoptic_png`, and `error`. A row
            with an error is not written.
        out: Folder to write to, which all machines share; created if missing.

    Returns:
        The columns without `panoptic_png`.

    Raises:
        ValueError: If a column is missing, or a name is not the name of a file.
        OSError: If a file cannot be written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from panfpn_fast import PanopticFPN
        >>> from panfpn_fast.inference import BatchPredictor
        >>> predict = BatchPredictor(PanopticFPN(), images="image", device="cpu", short_edge=64)  # untrained
        >>> found = predict({"name": ["zero"], "image": [np.zeros((48, 64, 3), np.uint8)]})
        >>> with tempfile.TemporaryDirectory() as out:
        ...     rest = write_maps(found, Path(out))
        ...     [entry] = find_maps(Path(out), {"zero": "zero.jpg"}).values()
        >>> sorted(rest), entry.source, entry.height
        (['error', 'name', 'segments'], 'zero.jpg', 48)
    """
    for column in ("name", "panoptic_png", "error"):
        if column not in batch:
            raise ValueError(f"batch: expected a column {column!r}, got {', '.join(batch) or 'none'}")
    folder = out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    for name, png, error in zip(batch["name"], batch["panoptic_png"], batch["error"], strict=True):
        check_name(name)
        if not error:
            with atomic_write(folder / f"{name}.png", durable=True) as file:
                file.write(png)
    return {column: values for column, values in batch.items() if column != "panoptic_png"}


def check_name(name: Any) -> None:
    """Checks that a name, which may come from the data of others, is that of a file without folders."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ValueError(f"name: expected the name of a file without folders, got {name!r}")


def find_maps(out: Path, sources: Mapping[str, str]) -> dict[str, Entry]:
    """Finds the images whose maps `write_maps` has written.

    Args:
        out: The folder that `write_maps` wrote to; it may be missing.
        sources: The name and the source (such as the file name) of each image.

    Returns:
        The name and the result of each image that is done, in the order of `sources`.
    """
    folder = out / "predictions"
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _read_entry(folder / f"{name}.png", name, sources[name]), sources)
        return {entry.name: entry for entry in found if entry is not None}


def _read_entry(path: Path, name: str, source: str) -> Entry | None:
    """Reads the size and the segments, not the pixels; None if `write_maps` did not write the file."""
    try:
        with open_image(path) as image:
            return Entry(name, source, image.height, image.width, json.loads(image.info[_KEYWORD]))
    except DataError:
        return None


def write_json(out: Path, entries: Sequence[Entry], categories: Categories) -> Path:
    """Writes the results of images to `<out>/predictions.json`, in COCO's panoptic format.

    Args:
        out: The folder that `write_maps` wrote to.
        entries: Results that `find_maps` has found.
        categories: The classes of the network.

    Returns:
        The path of the JSON, which is replaced if it exists.

    Raises:
        OSError: If the file cannot be written.
    """
    path = out / "predictions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(panoptic_content(entries, categories)).encode())
    return path
