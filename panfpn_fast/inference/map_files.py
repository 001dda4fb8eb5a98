"""Panoptic maps in one folder, which any number of processes on any number of machines may write.

The PNGs are those of `CocoPanopticWriter`: each contains the segments too, so the folder alone states what is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from panfpn_fast._files import atomic_write
from panfpn_fast.inference.coco_writer import read_written

__all__ = ["find_maps", "write_maps"]

# On a shared folder, most of the time for a file is waiting.
_READERS = 16


def write_maps(batch: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Writes the maps in the columns of `BatchPredictor` to `<out>/predictions/<name>.png`.

    Each file appears complete or not at all. Writing a row again replaces the file by an equal one, so an engine may
    repeat a batch, also while an earlier attempt still runs on another machine. `CocoPanopticWriter` makes the JSON.

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
        ...     find_maps(Path(out), ["zero", "one"])
        {'zero'}
        >>> sorted(rest)
        ['error', 'name', 'segments']
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


def find_maps(out: Path, names: Iterable[str]) -> set[str]:
    """Returns the names whose maps are in a folder, whole and written by `write_maps` or `CocoPanopticWriter`.

    Args:
        out: The folder of `predictions/<name>.png`; it may be missing.
        names: The names to look for.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        known = list(names)
        found = pool.map(lambda name: read_written(out / "predictions" / f"{name}.png"), known)
        return {name for name, written in zip(known, found, strict=True) if written is not None}
