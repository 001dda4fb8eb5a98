"""Writes results in COCO's panoptic format: a folder of PNGs with segment ids as colors, and a JSON of the segments.

The format is described at cocodataset.org/#format-results ("Panoptic Segmentation"). The folder has the name of the
JSON without its suffix, the id of a pixel is R + 256 G + 65536 B, and 0 means void.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from panfpn_fast._files import atomic_write
from panfpn_fast.data import Categories
from panfpn_fast.distributed import broadcast, gather
from panfpn_fast.inference.coco_format import Entry, panoptic_content, write_map
from panfpn_fast.inference.result import PanopticResult

__all__ = ["CocoPanopticWriter"]


class CocoPanopticWriter:
    """Writes results to `<out>/predictions.json` and `<out>/predictions/<name>.png`.

    Use it as a context manager. It writes the JSON when the block ends, also after an exception, and from time to time
    before, so that an interrupted or killed run keeps its results. The JSON of an earlier run is replaced.

    Several processes may write to one folder, each with its own rank and with distinct names of results. Until
    `gather`, rank r > 0 writes its JSON to `<out>/predictions.rank<r>.json`.

    Args:
        out: Folder to write to; created if missing.
        categories: Categories of the segments, written to the JSON.
        flush_seconds: Age in seconds at which `add` rewrites the JSON.
        rank: Rank of this process.

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
        self._entries: list[Entry] = []
        self._gathered = False
        self._categories = categories

    def add(self, result: PanopticResult, name: str, source: str) -> None:
        """Writes the PNG of a result and adds its segments to the JSON.

        Args:
            result: The prediction.
            name: Stem of the PNG's file name, unique in this run. It is also the image id. As in COCO, a number becomes
                an integer id ("000000142238" is image 142238).
            source: File name of the image, for `images` in the JSON.
        """
        self._entries.append(write_map(result.panoptic, result.segments, self.png_folder, name, source))
        if time.monotonic() - self._flushed_at > self._flush_seconds:
            self.flush()

    def gather(self, order: Sequence[str]) -> None:
        """Writes the results of all processes to one JSON; every process must call this once, after its last `add`.

        Args:
            order: Names of all images in the order of the JSON; images without a result are left out.
        """
        parts = gather(self._entries)
        self._gathered = True
        if parts:
            place = {name: number for number, name in enumerate(order)}
            entries = [entry for part in parts for entry in part]
            self._entries = sorted(entries, key=lambda entry: place[entry.name])
            self.flush()
            for part in self.json_path.parent.glob("predictions.rank*.json"):
                part.unlink()
        broadcast(None)  # no process continues before the JSON is complete

    def flush(self) -> None:
        """Writes the JSON with all results added so far."""
        content = panoptic_content(self._entries, self._categories)
        with atomic_write(self.json_path) as file:
            file.write(json.dumps(content).encode())
        self._flushed_at = time.monotonic()

    def __enter__(self) -> CocoPanopticWriter:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes the JSON, also after an exception."""
        if not self._gathered:
            self.flush()
