"""Writes results in COCO's panoptic format: a folder of PNGs with segment ids as colors, and a JSON of the segments.

The format is described at cocodataset.org/#format-results ("Panoptic Segmentation"). The folder has the name of the
JSON without its suffix, the id of a pixel is R + 256 G + 65536 B, and 0 means void.

Each PNG also contains its part of the JSON as a text. The PNGs are thus complete, and the JSON is their index. It can
be made again at any time: from the PNGs of a run that was killed, and from those of other processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from PIL.PngImagePlugin import PngInfo

from panfpn_fast._errors import OutputError
from panfpn_fast._files import atomic_write
from panfpn_fast.data import Categories
from panfpn_fast.data.files import DataError, open_image, read_json
from panfpn_fast.data.images import save_png
from panfpn_fast.distributed import broadcast, gather
from panfpn_fast.inference.coco_format import (
    Entry,
    category_rows,
    entries_of,
    make_entry,
    map_picture,
    panoptic_content,
)
from panfpn_fast.inference.download import is_address
from panfpn_fast.inference.result import PanopticResult

__all__ = ["CocoPanopticWriter"]

_KEYWORD = "panfpn_fast"
# The JSON is written while other processes write PNGs, perhaps on a file system with another clock. PNGs that are newer
# than the JSON, or at most this many seconds older, are read again.
_SLACK = 60.0
# A large JSON, which takes long to write, is written less often: up to so many times less.
_LESS_OFTEN = 20

Position = tuple[int, int]


class Written(NamedTuple):
    """The texts in a PNG of a writer: its part of the JSON, and the origin of its image."""

    entry: Entry
    origin: str


class CocoPanopticWriter:
    """Writes results to `<out>/predictions.json` and `<out>/predictions/<name>.png`.

    Use it as a context manager. It writes the JSON when the block ends, also after an exception, and from time to time
    before, so that an interrupted or killed run keeps its results.

    The results of earlier runs in the folder stay in the JSON, also those of a run that was killed. A result with the
    name of an earlier one replaces it.

    Several processes may write to one folder, each with its own rank and with distinct names of results. Rank 0 writes
    the JSON.

    Args:
        out: Folder to write to; created if missing.
        categories: Categories of the segments, written to the JSON.
        flush_seconds: Age in seconds at which `add` rewrites the JSON; more if writing it takes long, up to 20 times.
        rank: Rank of this process.

    Raises:
        OutputError: If the folder has results of other categories, or a `predictions.json` of another kind.

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
        self.json_path = out / "predictions.json"
        self.png_folder = out / "predictions"
        self.png_folder.mkdir(parents=True, exist_ok=True)
        self._categories = categories
        self._flush_seconds = flush_seconds
        self._next_flush = 0.0
        self._is_first = rank == 0
        self._added: dict[str, tuple[Position, Entry]] = {}
        self._others: dict[str, Entry] = {}  # of earlier runs and other processes
        self._read_until = 0.0  # PNGs that are newer may differ from these entries
        self._gathered = False
        if self._is_first:
            self._read_json()
            self.flush()
        self._earlier = frozenset(self._others)

    def add(self, result: PanopticResult, name: str, source: str, position: Position | None = None) -> None:
        """Writes the PNG of a result and adds its segments to the JSON.

        Args:
            result: The prediction.
            name: Stem of the PNG's file name, unique in this run. It is also the image id. As in COCO, a number becomes
                an integer id ("000000142238" is image 142238).
            source: File name of the image, for `images` in the JSON.
            position: Place among this run's results in the JSON, such as the numbers of the file and of the frame; by
                default the order of calls.
        """
        png = MapPng(result, name, source, origin_of(result.source, result.frame))
        save_png(png.picture, self.png_folder / f"{name}.png", info=png.info)
        self._added[name] = position or (len(self._added), 0), png.entry
        if self._is_first and time.monotonic() > self._next_flush:
            self.flush()

    def gather(self) -> None:
        """Writes the results of all processes to one JSON; every process must call this once, after its last `add`."""
        parts = gather(self._added)
        self._gathered = True
        for part in parts:
            self._added |= part
        if self._is_first:
            # This process may have read results of the others from the folder. The gathered ones have positions.
            self._others = {
                name: entry
                for name, entry in self._others.items()
                if name in self._earlier or name not in self._added
            }
            self.flush()
        broadcast(None)  # no process continues before the JSON is complete

    def flush(self) -> None:
        """Writes the JSON with all results in the folder; only rank 0 may call this."""
        started, now = time.monotonic(), time.time()
        content = panoptic_content(list(self._entries().values()), self._categories)
        with atomic_write(self.json_path) as file:
            file.write(json.dumps(content).encode())
        self._read_until = now - _SLACK
        finished, age = time.monotonic(), self._flush_seconds
        self._next_flush = finished + max(age, _LESS_OFTEN * min(finished - started, age))

    def _entries(self) -> dict[str, Entry]:
        """Returns the entries of all PNGs in the folder: those of earlier runs, of this run, and found ones."""
        with os.scandir(self.png_folder) as files:
            times = {
                file.name.removesuffix(".png"): file.stat().st_mtime
                for file in files
                if file.name.endswith(".png") and not file.name.startswith(".") and file.is_file()
            }
        for name in sorted(name for name, changed in times.items() if self._is_unknown(name, changed)):
            written = read_written(self.png_folder / f"{name}.png")
            if written is not None:
                self._check_ids(written.entry)
                self._others[name] = written.entry
        self._others = {name: entry for name, entry in self._others.items() if name in times}
        added = dict(sorted(self._added.items(), key=lambda item: item[1][0]))
        return self._others | {name: entry for name, (_, entry) in added.items() if name in times}

    def _is_unknown(self, name: str, changed: float) -> bool:
        return name not in self._added and (name not in self._others or changed >= self._read_until)

    def _read_json(self) -> None:
        """Reads the JSON of an earlier run."""
        if not self.json_path.exists():
            return
        remedy = f"give another folder, or remove {self.json_path} and {self.png_folder}"
        try:
            content = read_json(self.json_path)
            entries, rows = entries_of(content), content["categories"]
        except (DataError, LookupError, TypeError, AttributeError) as error:
            raise OutputError(f"{self.json_path}: not a JSON that predict wrote; {remedy}") from error
        if entries and rows != category_rows(self._categories):
            raise OutputError(f"{self.json_path}: has results of a network with other classes; {remedy}")
        self._others = {entry.name: entry for entry in entries}
        self._read_until = self.json_path.stat().st_mtime - _SLACK

    def _check_ids(self, entry: Entry) -> None:
        known = {category.id for category in self._categories.all}
        if not known.issuperset(info["category_id"] for info in entry.segments_info):
            raise OutputError(
                f"{self.png_folder / entry.name}.png: is a result of a network with other classes; give another "
                f"folder, or remove {self.png_folder}"
            )

    def __enter__(self) -> CocoPanopticWriter:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes the JSON, also after an exception."""
        if self._is_first and not self._gathered:
            self.flush()


class MapPng:
    """The PNG of a result: the map as a picture, and the result's part of the JSON as a text in it.

    Args:
        result: The prediction.
        name: Stem of the PNG's file name.
        source: File name of the image.
        origin: What `origin_of` returns for the image.
    """

    def __init__(self, result: PanopticResult, name: str, source: str, origin: str) -> None:
        self.entry = make_entry(result.panoptic, result.segments, name, source, result.frame)
        self.picture = map_picture(result.panoptic)
        self.info = PngInfo()
        self.info.add_itxt(_KEYWORD, json.dumps({"origin": origin, **self.entry._asdict()}), zip=True)


def origin_of(source: str | None, frame: int | None = None) -> str:
    """Returns a text that tells whether two results are of the same image; empty if it has no source."""
    if source is None:
        return ""
    where = source if is_address(source) or source.startswith("camera:") else os.path.realpath(source)
    digest = hashlib.sha256(os.fsencode(where)).hexdigest()[:16]
    return digest if frame is None else f"{digest}#{frame}"


def read_written(path: Path) -> Written | None:
    """Reads what a writer put into a PNG; None for other files."""
    try:
        with open_image(path) as image:
            fields = json.loads(str(image.info[_KEYWORD]))
        origin = fields.pop("origin")
        return Written(Entry(**{**fields, "name": path.stem}), origin)
    except (DataError, LookupError, TypeError, ValueError):
        return None
