"""Predicts images and videos and writes the results to one folder, in one process or in all processes of torchrun."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from panfpn_fast._device import is_out_of_memory
from panfpn_fast.distributed import broadcast, gather, rank_and_world_size
from panfpn_fast.inference.coco_writer import CocoPanopticWriter
from panfpn_fast.inference.finding import file_name, place_of
from panfpn_fast.inference.naming import Job, Names, overlay_path
from panfpn_fast.inference.predictor import Predictor
from panfpn_fast.inference.result import PanopticResult
from panfpn_fast.inference.sources import Photograph, read_frames
from panfpn_fast.inference.video import VideoFacts, video_facts
from panfpn_fast.inference.video_results import VideoResults

Say = Callable[[str], None]
Frame = tuple[Job, Photograph]

OVERLAYS = ("png", "jpg", "none")


def predict_folder(
    predictor: Predictor,
    sources: Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    batch_size: int = 1,
    overlay: str = "png",
    frame_maps: bool = False,
    every: int = 1,
    max_frames: int | None = None,
    on_result: Say | None = None,
    on_failure: Say | None = None,
    progress: bool = True,
) -> int:
    """Predicts image files and videos, and writes overlays, panoptic maps and segments.

    An image gives `NAME_overlay.png` and `predictions/NAME.png`, and `predictions.json` lists its segments. The frames
    of an image file with several are images with the names `NAME_0001`, `NAME_0002` and so on. A video gives
    `NAME_overlay.mp4`, and `NAME_segments.jsonl` with a line for each frame.

    The results of earlier runs in the folder stay, and the JSON lists them too. A result of the same image is replaced.

    In a process group, every process must call this function; the sources of rank 0 count. Of W processes, rank r
    predicts every W-th file, starting at file r. A batch that does not fit in memory is predicted again image by image.

    Args:
        predictor: The predictor to use.
        sources: Image and video files, addresses and cameras, without duplicates.
        out: Folder to write to.
        batch_size: Images per pass through the network.
        overlay: Format of the overlays of images, "png" or "jpg"; "none" for no overlays, also of videos.
        frame_maps: Whether the frames of videos have maps in `predictions` and `predictions.json`, too.
        every: Predicts each `every`-th frame of videos.
        max_frames: Predicts at most so many frames of each video; None for all.
        on_result: Called with one line of text for each predicted image and each video.
        on_failure: Called with one line of text for each file that cannot be read or does not fit in memory.
        progress: Whether rank 0 shows a progress bar for several images, and for each video.

    Returns:
        On rank 0, the number of failed files of all processes; 0 on the other ranks.

    Raises:
        ValueError: If `overlay` is another word.
        OSError: If a result cannot be written, or `out` has results of another network's classes.
        ImportError: If the native ops did not load, or a video needs PyAV; the message contains a remedy.
    """
    if overlay not in OVERLAYS:
        raise ValueError(f"overlay: expected one of {', '.join(OVERLAYS)}, got {overlay!r}")
    rank, world_size = rank_and_world_size()
    names = broadcast(Names([place_of(source) for source in sources], out, overlay) if rank == 0 else None)
    assert names is not None
    run = _Run(
        predictor,
        names,
        out,
        batch_size=batch_size,
        overlay=overlay,
        every=every,
        max_frames=max_frames,
        on_result=on_result or _ignore,
        on_failure=on_failure or _ignore,
        progress=progress and rank == 0,
    )
    images = [job for job in names.jobs if not job.is_video]
    with ExitStack() as stack:
        # Videos alone need no JSON, which would be empty.
        writer = None
        if images or frame_maps:
            writer = stack.enter_context(CocoPanopticWriter(out, predictor.categories, rank=rank))
        mine = names.jobs[rank::world_size]
        if writer is not None:
            run.predict_images([job for job in mine if not job.is_video], writer)
        for job in mine:
            if job.is_video:
                run.predict_video(job, writer if frame_maps else None)
        if writer is not None:
            writer.gather()
    return sum(gather(len(run.failed)))


def _ignore(_: str) -> None:
    pass


@dataclass
class _Run:
    """Settings that are the same for all files of a run, and the numbers of the files that failed."""

    predictor: Predictor
    names: Names
    out: Path
    _: KW_ONLY
    batch_size: int
    overlay: str
    every: int
    max_frames: int | None
    on_result: Say
    on_failure: Say
    progress: bool
    failed: set[int] = field(default_factory=set)

    def predict_images(self, jobs: Sequence[Job], writer: CocoPanopticWriter) -> None:
        """Predicts image files, and the frames of those that have several."""
        hidden = not self.progress or len(self.names.jobs) < 2
        with tqdm(total=len(jobs), unit="image", disable=hidden) as bar:
            started = time.perf_counter()
            for batch in _batches(self._read_all(jobs, bar), self.batch_size):
                predicted = self._predict_together(batch)
                for (job, photograph), result in predicted:
                    written = self._write_image(job, result, writer)
                    seconds = (time.perf_counter() - started) / len(batch)
                    label = _label(job, photograph.frame)
                    self.on_result(f"{label}: {result.summary()} -> {written} ({seconds:.2f} s)")
                started = time.perf_counter()

    def predict_video(self, job: Job, writer: CocoPanopticWriter | None) -> None:
        """Predicts the frames of a video; `writer` writes their maps."""
        started = time.perf_counter()
        facts = self._facts(job)
        if facts is None:
            return
        rate = None if facts.rate is None else facts.rate / self.every
        total = None if facts.frames is None else math.ceil(facts.frames / self.every)
        if self.max_frames is not None:
            total = self.max_frames if total is None else min(total, self.max_frames)
        with (
            VideoResults(self.out, job, self.predictor.categories, rate, self.overlay != "none") as video,
            tqdm(total=total, unit="frame", desc=job.name, disable=not self.progress) as bar,
        ):
            frames = itertools.islice(self._read(job), self.max_frames)
            for batch in _batches(frames, self.batch_size):
                predicted = self._predict_together(batch)
                for _, result in predicted:
                    video.add(result)
                    if writer is not None:
                        self._write_map(job, result, writer)
                bar.update(len(predicted))
                if len(predicted) < len(batch):  # the next frames do not fit in memory either
                    break
        seconds = time.perf_counter() - started
        if video.frames:
            self.on_result(f"{_label(job)}: {video.frames} frames -> {video.main_path} ({seconds:.2f} s)")
        elif job.number not in self.failed:
            self._fail(job, f"{job.place}: has no frames")

    def _facts(self, job: Job) -> VideoFacts | None:
        if not isinstance(job.place, Path):
            return VideoFacts(None, None)
        try:
            return video_facts(job.place)
        except OSError as error:
            self._fail(job, str(error))
            return None

    def _read_all(self, jobs: Iterable[Job], bar: tqdm[Any]) -> Iterator[Frame]:
        for job in jobs:
            yield from self._read(job)
            bar.update()

    def _read(self, job: Job) -> Iterator[Frame]:
        """Reads the images of a file, and reports why one cannot be read."""
        try:
            for photograph in read_frames(job.place, self.every if job.is_video else 1):
                yield job, photograph
        except OSError as error:  # the message names the file
            self._fail(job, str(error))

    def _fail(self, job: Job, message: str) -> None:
        self.failed.add(job.number)
        self.on_failure(message)

    def _predict_together(self, frames: list[Frame]) -> list[tuple[Frame, PanopticResult]]:
        """Predicts images in one pass, or one by one if they do not fit in memory together."""
        try:
            results = self.predictor.stream([photograph for _, photograph in frames], len(frames))
            return list(zip(frames, results, strict=True))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(frames) == 1:
                job, device = frames[0][0], self.predictor.device
                self._fail(job, f"{job.place}: not enough memory on {device}; try a smaller --short-edge")
                return []
        return [done for frame in frames for done in self._predict_together([frame])]

    def _write_image(self, job: Job, result: PanopticResult, writer: CocoPanopticWriter) -> Path:
        """Writes the map and the overlay of an image; returns the path of the overlay, or of the map without one."""
        name = self._write_map(job, result, writer)
        if self.overlay != "none":
            path = overlay_path(self.out, name, self.overlay)
            try:
                result.save(path)
                return path
            except OSError:
                raise
            except ValueError as error:  # a format with a limit of size
                self._fail(job, f"{job.place}: {error}")
        return writer.png_folder / f"{name}.png"

    def _write_map(self, job: Job, result: PanopticResult, writer: CocoPanopticWriter) -> str:
        name = job.name if result.frame is None else self.names.frame(job, result.frame)
        writer.add(result, name, job.source, (job.number, result.frame or 0))
        return name


def _label(job: Job, frame: int | None = None) -> str:
    name = file_name(job.place)
    return name if frame is None else f"{name}, frame {frame}"


def _batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    while batch := list(itertools.islice(frames, size)):
        yield batch
