"""Names the results of a run, so that none replaces a file of the user or the result of another image."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from panfpn_fast.inference.coco_writer import origin_of, read_written
from panfpn_fast.inference.download import is_address
from panfpn_fast.inference.finding import Place, camera_number, file_name, is_video


class Job(NamedTuple):
    """A file to predict, its number in the run, the name of its results, and its file name in the JSON."""

    number: int
    place: Place
    name: str
    source: str

    @property
    def is_video(self) -> bool:
        """Whether it is a video or a camera."""
        return is_video(self.place)


def overlay_path(out: Path, name: str, kind: str) -> Path:
    """Returns the path of an overlay; `kind` is its suffix without the dot."""
    return out / f"{name}_overlay.{kind}"


def segments_path(out: Path, name: str) -> Path:
    """Returns the path of the JSON lines of a video."""
    return out / f"{name}_segments.jsonl"


class Names:
    """Chooses names of results in a folder.

    A name is free if no other result of this run has it, its files are no inputs of this run, and a result of that name
    that is in the folder already is of the same image.

    Args:
        places: All inputs of the run.
        out: The folder.
        overlay: Suffix of the overlays of images, without the dot.
    """

    def __init__(self, places: Sequence[Place], out: Path, overlay: str) -> None:
        self._out = out
        self._overlay = overlay
        self._inputs = {place.resolve() for place in places if isinstance(place, Path)}
        self._taken: set[str] = set()
        self.jobs = [self._job(number, place) for number, place in enumerate(places)]

    def frame(self, job: Job, frame: int) -> str:
        """Returns the name of a frame's results, such as "NAME_0001"."""
        # Frames of two jobs differ in their names already. An image may be called like a frame.
        for suffix in _suffixes(f"_{frame:0{6 if job.is_video else 4}d}"):
            name = _fitting(job.name, suffix)
            if name.casefold() not in self._taken and self._fits(name, str(job.place), frame):
                return name
        raise AssertionError  # there is always another suffix

    def _job(self, number: int, place: Place) -> Job:
        camera = camera_number(place)
        stem = Path(file_name(place)).stem if camera is None else f"camera_{camera}"
        for suffix in _suffixes(""):
            name = _fitting(stem.replace(":", "_") if is_address(place) else stem, suffix)
            # Some file systems do not distinguish upper from lower case.
            if name.casefold() in self._taken:
                continue
            if self._fits_video(name, str(place)) if is_video(place) else self._fits(name, str(place), None):
                break
        self._taken.add(name.casefold())
        whole = place.as_posix() if isinstance(place, Path) else place
        return Job(number, place, name, file_name(place) if not suffix else whole)

    def _fits(self, name: str, source: str, frame: int | None) -> bool:
        panoptic = self._out / "predictions" / f"{name}.png"
        outputs = {panoptic.resolve(), overlay_path(self._out, name, self._overlay).resolve()}
        if outputs & self._inputs:
            return False
        if not os.path.lexists(panoptic):
            return True
        written = read_written(panoptic)
        return written is not None and written.origin == origin_of(source, frame)

    def _fits_video(self, name: str, source: str) -> bool:
        overlay, segments = overlay_path(self._out, name, "mp4"), segments_path(self._out, name)
        if {overlay.resolve(), segments.resolve()} & self._inputs:
            return False
        # What a camera showed in an earlier run cannot be predicted again.
        if os.path.lexists(segments):
            return camera_number(source) is None and read_origin(segments) == origin_of(source)
        return not os.path.lexists(overlay)


def read_origin(segments: Path) -> str | None:
    """Reads which video JSON lines were made of; None for other files."""
    try:
        with open(segments, encoding="utf-8") as lines:
            return str(json.loads(lines.readline())["origin"])
    except (OSError, LookupError, TypeError, ValueError):
        return None


def _suffixes(first: str) -> itertools.chain[str]:
    return itertools.chain([first], (f"{first}_{count}" for count in itertools.count(2)))


def _fitting(stem: str, suffix: str) -> str:
    """Joins stem and suffix, and shortens the stem until the longest file name with it has at most 255 bytes."""
    while len(os.fsencode(f"{stem}{suffix}_segments.jsonl")) > 255:
        stem = stem[:-1]
    return stem + suffix
