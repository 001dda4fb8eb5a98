"""Writes the results of a video: a video of the overlays, and JSON lines of the segments of its frames."""

from __future__ import annotations

import json
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from panfpn_fast._files import atomic_write
from panfpn_fast.data import Categories
from panfpn_fast.inference.coco_format import category_rows, score_field
from panfpn_fast.inference.coco_writer import origin_of
from panfpn_fast.inference.naming import Job, overlay_path, segments_path
from panfpn_fast.inference.result import PanopticResult
from panfpn_fast.inference.segment import regions
from panfpn_fast.inference.video import VideoWriter


class VideoResults:
    """Writes `NAME_segments.jsonl` and, if wanted, `NAME_overlay.mp4`.

    Use it as a context manager. Both files appear when the block ends, also after an exception, if there was a frame.
    The first line of the JSON lines describes the video; each other line is a frame.

    Args:
        out: Folder to write to.
        job: The video.
        categories: Categories of the segments.
        rate: Mean number of frames per second; None if it is unknown.
        overlay: Whether to write the video of the overlays.
    """

    def __init__(
        self, out: Path, job: Job, categories: Categories, rate: Fraction | None, overlay: bool
    ) -> None:
        self.frames = 0
        self._out = out
        self._job = job
        self._categories = categories
        self._rate = rate
        self._overlay = overlay
        self._files = ExitStack()
        self._lines: IO[bytes] | None = None
        self._video: VideoWriter | None = None

    @property
    def main_path(self) -> Path:
        """The file that a message names."""
        if self._overlay:
            return overlay_path(self._out, self._job.name, "mp4")
        return segments_path(self._out, self._job.name)

    def add(self, result: PanopticResult) -> None:
        """Writes a frame; frames come in their order."""
        if self._lines is None:
            self._open(result)
        self._write(
            {
                "frame": result.frame,
                "time": None if result.time is None else round(result.time, 6),
                "segments": [
                    {
                        "id": region.segment.id,
                        "category_id": region.segment.category_id,
                        "name": region.segment.name,
                        "isthing": int(region.segment.isthing),
                        "area": region.segment.area,
                        "bbox": list(region.box),
                        **score_field(region.segment),
                    }
                    for region in regions(result.panoptic, result.segments)
                ],
            }
        )
        if self._video is not None:
            time = Fraction(result.time or 0).limit_denominator(1_000_000)
            self._video.add(np.asarray(result.draw()), time)
        self.frames += 1

    def _open(self, result: PanopticResult) -> None:
        # Files are completed in the reverse order. A video without JSON lines would not be known as a result.
        if self._overlay:
            path = overlay_path(self._out, self._job.name, "mp4")
            self._video = self._files.enter_context(VideoWriter(path, self._rate))
        self._lines = self._files.enter_context(atomic_write(segments_path(self._out, self._job.name)))
        height, width = result.panoptic.shape
        self._write(
            {
                "file_name": self._job.source,
                "width": width,
                "height": height,
                "rate": None if self._rate is None else round(float(self._rate), 6),
                "categories": category_rows(self._categories),
                "origin": origin_of(str(self._job.place)),
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        assert self._lines is not None
        self._lines.write(json.dumps(line).encode() + b"\n")

    def __enter__(self) -> VideoResults:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the files."""
        self._files.close()  # without the exception, which would remove them
