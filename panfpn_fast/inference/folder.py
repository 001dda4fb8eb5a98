"""Predicts many image files and writes the results to one folder, in one process or in all processes of torchrun."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from panfpn_fast._device import is_out_of_memory
from panfpn_fast.data.images import PHOTO_COMPRESS_LEVEL, ImageArray, read_image, save_png
from panfpn_fast.distributed import gather, rank_and_world_size
from panfpn_fast.inference.coco_writer import CocoPanopticWriter
from panfpn_fast.inference.predictor import Predictor
from panfpn_fast.inference.result import PanopticResult

Say = Callable[[str], None]


class _Job(NamedTuple):
    """One image, the name of its results (unique in this run), and its file name in the JSON."""

    path: Path
    name: str
    source: str


def predict_folder(
    predictor: Predictor,
    paths: Sequence[Path],
    out: Path,
    *,
    batch_size: int = 1,
    on_result: Say | None = None,
    on_failure: Say | None = None,
    progress: bool = True,
) -> int:
    """Predicts image files and writes overlays, panoptic PNGs and one COCO result file.

    In a process group, every process must call this function. Of W processes, rank r predicts every W-th image,
    starting at image r. A batch that does not fit in memory is predicted again image by image.

    Args:
        predictor: The predictor to use.
        paths: Image files, without duplicates.
        out: Folder to write to: `NAME_overlay.png`, `predictions/NAME.png` and `predictions.json`.
        batch_size: Images per pass through the network.
        on_result: Called with one line of text for each predicted image.
        on_failure: Called with one line of text for each image that cannot be read or does not fit in memory.
        progress: Whether rank 0 shows a progress bar if there are several images.

    Returns:
        On rank 0, the number of failed images of all processes; 0 on the other ranks.

    Raises:
        OSError: If a result cannot be written.
        ImportError: If the native ops did not load; the message contains a remedy.
    """
    rank, world_size = rank_and_world_size()
    jobs = _name_jobs(paths, out)
    run = _Run(predictor, out, on_result or _ignore, on_failure or _ignore)
    failed = 0
    with CocoPanopticWriter(out, predictor.categories, rank=rank) as writer:
        mine = jobs[rank::world_size]
        with tqdm(total=len(mine), unit="image", disable=not progress or rank > 0 or len(jobs) < 2) as bar:
            for batch in _batches(mine, batch_size):
                failed += run.predict(batch, writer)
                bar.update(len(batch))
        writer.gather([job.name for job in jobs])
    return sum(gather(failed))


def _ignore(_: str) -> None:
    pass


class _Run(NamedTuple):
    """Settings that are the same for all images of a run."""

    predictor: Predictor
    out: Path
    on_result: Say
    on_failure: Say

    def predict(self, batch: Sequence[_Job], writer: CocoPanopticWriter) -> int:
        """Predicts and writes a batch; returns the number of images that failed."""
        started = time.perf_counter()
        images = [(job, image) for job in batch if (image := self.read(job.path)) is not None]
        predicted = self.predict_together(images)
        shared = (time.perf_counter() - started) / max(1, len(predicted))
        for job, image, result in predicted:
            started = time.perf_counter()
            overlay = _write(writer, job, image, result, self.out)
            seconds = shared + time.perf_counter() - started
            self.on_result(f"{job.path.name}: {result.summary()} -> {overlay} ({seconds:.2f} s)")
        return len(batch) - len(predicted)

    def read(self, path: Path) -> ImageArray | None:
        """Reads an image, or reports why it cannot be read."""
        try:
            return read_image(path)
        except OSError as error:  # the message names the file
            self.on_failure(str(error))
            return None

    def predict_together(
        self, images: list[tuple[_Job, ImageArray]]
    ) -> list[tuple[_Job, ImageArray, PanopticResult]]:
        """Predicts images in one pass, or one by one if they do not fit in memory together."""
        try:
            results = self.predictor([image for _, image in images])
            return [(job, image, result) for (job, image), result in zip(images, results, strict=True)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(images) == 1:
                path, device = images[0][0].path, self.predictor.device
                self.on_failure(f"{path}: not enough memory on {device}; try a smaller --short-edge")
                return []
        return [done for one in images for done in self.predict_together([one])]


def _write(
    writer: CocoPanopticWriter, job: _Job, image: ImageArray, result: PanopticResult, out: Path
) -> Path:
    overlay = out / f"{job.name}_overlay.png"
    writer.add(result, job.name, source=job.source)
    save_png(result.draw(image), overlay, PHOTO_COMPRESS_LEVEL)
    return overlay


def _name_jobs(paths: Sequence[Path], out: Path) -> list[_Job]:
    """Gives each image a unique name, so that no result overwrites another result or an input image."""
    inputs = {path.resolve() for path in paths}
    taken: set[str] = set()
    jobs = []
    for path in paths:
        for count in itertools.count(1):
            name = _fitting(path.stem, "" if count == 1 else f"_{count}")
            outputs = {
                (out / f"{name}_overlay.png").resolve(),
                (out / "predictions" / f"{name}.png").resolve(),
            }
            # Some file systems do not distinguish upper from lower case.
            if name.casefold() not in taken and not outputs & inputs:
                break
        taken.add(name.casefold())
        jobs.append(_Job(path, name, source=path.name if count == 1 else path.as_posix()))
    return jobs


def _fitting(stem: str, suffix: str) -> str:
    """Joins stem and suffix, and shortens the stem until the longest file name with it has at most 255 bytes."""
    while len(os.fsencode(f"{stem}{suffix}_overlay.png")) > 255:
        stem = stem[:-1]
    return stem + suffix


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[Sequence[_Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]
