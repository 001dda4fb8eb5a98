"""COCO's panoptic result format: a folder of PNGs that hold segment ids as colours, and one JSON that names
the segments.

The format is described at cocodataset.org/#format-results ("Panoptic Segmentation"): the folder has the
JSON's name without its suffix, a pixel's id is R + 256 G + 65536 B, and 0 means void.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from panfpn_fast.data import Categories
from panfpn_fast.distributed import gather_to_first, tell_all
from panfpn_fast.inference.result import PanopticResult

__all__ = ["CocoPanopticWriter", "atomic_write", "decode_panoptic", "encode_panoptic", "save_png"]

_MAX_ID = 256**3 - 1


def encode_panoptic(panoptic: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    """Encodes segment ids as colours.

    Args:
        panoptic: Integer [H, W], ids in 0..16777215.

    Returns:
        uint8 [H, W, 3] with id = R + 256 G + 65536 B.

    Raises:
        ValueError: If an id does not fit.

    Example:
        >>> encode_panoptic(np.array([[1, 256 + 2]])).tolist()
        [[[1, 0, 0], [2, 1, 0]]]
    """
    if panoptic.size and not 0 <= int(panoptic.min()) <= int(panoptic.max()) <= _MAX_ID:
        raise ValueError(f"panoptic: expected ids in 0..{_MAX_ID}, got {panoptic.min()}..{panoptic.max()}")
    return np.stack([panoptic & 255, panoptic >> 8 & 255, panoptic >> 16], axis=-1).astype(np.uint8)


def decode_panoptic(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Decodes a picture of `encode_panoptic`: uint8 [H, W, 3] to int32 [H, W]."""
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 65536 * blue


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only when it is complete."""
    temporary = path.with_name(f".panfpn-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_png(image: Image.Image, path: Path, compress_level: int = 6) -> None:
    """Writes a PNG atomically; `compress_level` is zlib's, 0..9."""
    with atomic_write(path) as file:
        image.save(file, format="PNG", compress_level=compress_level)


class _Entry(NamedTuple):
    """One result; `name` is unique."""

    name: str
    source: str
    height: int
    width: int
    segments_info: list[dict[str, Any]]


class CocoPanopticWriter:
    """Collects results under `<out>/predictions.json` and `<out>/predictions/<name>.png`.

    A context manager: the JSON is written when the block ends, however it ends, and now and then before, so
    that a run that is interrupted or killed keeps what it has computed. An earlier run's JSON is replaced.

    Several processes may write into one folder, each with its rank and results of its own names. Until `gather` the
    JSON of rank r > 0 is `<out>/predictions.rank<r>.json`.

    Args:
        out: Folder to write to; made where it is missing.
        categories: The data set whose ids the results carry.
        flush_seconds: The JSON is rewritten by `add` when it is older than this.
        rank: Number of this process.

    Example:
        >>> import tempfile
        >>> from panfpn_fast.data import get_categories
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with CocoPanopticWriter(Path(out), get_categories("cityscapes")) as writer:
        ...         pass  # writer.add(predictor("photo.jpg"), "photo", source="photo.jpg")
        ...     len(json.loads(writer.json_path.read_text())["categories"])
        19
    """

    def __init__(self, out: Path, categories: Categories, flush_seconds: float = 30.0, rank: int = 0) -> None:
        self.json_path = out / ("predictions.json" if rank == 0 else f"predictions.rank{rank}.json")
        self.png_folder = out / "predictions"
        self.png_folder.mkdir(parents=True, exist_ok=True)
        self._flush_seconds = flush_seconds
        self._flushed_at = time.monotonic()
        self._entries: list[_Entry] = []
        self._gathered = False
        self._categories = [
            {"id": c.id, "name": c.name, "isthing": int(c.isthing), "color": list(c.color)}
            for c in categories.all
        ]

    def add(self, result: PanopticResult, name: str, source: str) -> None:
        """Writes one result's PNG and notes its segments for the JSON.

        Args:
            result: What was predicted.
            name: Stem of the PNG's name, unique in this run. Its number is the image id where it is a number,
                as in COCO ("000000142238" is image 142238); otherwise it is the image id itself.
            source: The image's file name, for the JSON's `images`.
        """
        panoptic = result.panoptic.cpu().numpy()
        save_png(Image.fromarray(encode_panoptic(panoptic)), self.png_folder / f"{name}.png")
        segments_info = []
        for segment in result.segments:
            info: dict[str, Any] = {
                "id": segment.id,
                "category_id": segment.category_id,
                "isthing": int(segment.isthing),
                "area": segment.area,
            }
            if segment.isthing:
                info["score"] = round(segment.score, 6)
            segments_info.append(info)
        height, width = panoptic.shape
        self._entries.append(_Entry(name, source, height, width, segments_info))
        if time.monotonic() - self._flushed_at > self._flush_seconds:
            self.flush()

    def gather(self, order: Sequence[str]) -> None:
        """Puts what all processes have added into one JSON; every one of them must call this, once, at its end.

        Args:
            order: The names of all images in the order of the JSON; those without a result are left out.
        """
        parts = gather_to_first(self._entries)
        self._gathered = True
        if parts:
            place = {name: number for number, name in enumerate(order)}
            entries = [entry for part in parts for entry in part]
            self._entries = sorted(entries, key=lambda entry: place[entry.name])
            self.flush()
            for part in self.json_path.parent.glob("predictions.rank*.json"):
                part.unlink()
        tell_all(None)  # nobody ends before the JSON is complete

    def flush(self) -> None:
        """Writes the JSON with everything added so far."""
        images, annotations = [], []
        for image_id, entry in zip(_image_ids(self._entries), self._entries, strict=True):
            size = {"width": entry.width, "height": entry.height}
            images.append({"id": image_id, "file_name": entry.source, **size})
            annotations.append(
                {
                    "image_id": image_id,
                    "file_name": f"{entry.name}.png",
                    "segments_info": entry.segments_info,
                }
            )
        content = {"images": images, "annotations": annotations, "categories": self._categories}
        with atomic_write(self.json_path) as file:
            file.write(json.dumps(content).encode())
        self._flushed_at = time.monotonic()

    def __enter__(self) -> CocoPanopticWriter:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes the JSON, also when an exception ends the block."""
        if not self._gathered:
            self.flush()


def _image_ids(entries: Iterable[_Entry]) -> list[int | str]:
    ids: dict[int | str, None] = {}
    for entry in entries:
        # "1" and "01" are the same number: the second keeps its text, because ids must be unique.
        number = int(entry.name) if entry.name.isascii() and entry.name.isdecimal() else entry.name
        ids[entry.name if number in ids else number] = None
    return list(ids)
