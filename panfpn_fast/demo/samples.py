"""Predicts the sample images in the package with the network in the package."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from panfpn_fast._files import atomic_write, builtin_folder, prepare_file
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.images import save_png
from panfpn_fast.data.sample import Sample
from panfpn_fast.inference import PanopticResult, Predictor
from panfpn_fast.inference.drawing import draw_panoptic
from panfpn_fast.metrics.evaluation import evaluate

WEIGHTS = "builtin://nuclei"
"""Name of the network."""

_EDGE = 384
"""Height and width in which the gallery has each picture."""


def samples() -> CocoPanopticDataset:
    """Opens the sample images: fluorescence microscopy of nuclei (BBBC038, CC0), with their annotations."""
    folder = builtin_folder() / "nuclei"
    return CocoPanopticDataset(folder / "images", folder / "panoptic.json")


def predict_samples(out: Path, quiet: bool = False) -> dict[str, Any]:
    """Predicts the samples, compares the results with the annotations, and draws both.

    Args:
        out: Folder for NAME_overlay.png of each sample, gallery.png (input, truth, prediction) and metrics.json.
        quiet: Whether to print nothing.

    Returns:
        The content of metrics.json: PQ, SQ, RQ, things and stuff (their PQ, from 0 to 100), images, segments, and the
        seconds per image, which include reading and resizing.

    Raises:
        UserError: If a file cannot be written to `out`, before the first prediction.
    """
    for name in ("metrics.json", "gallery.png"):
        prepare_file(out / name, "out")
    predictor, dataset = Predictor(WEIGHTS), samples()
    annotated = [dataset.load(index) for index in range(len(dataset))]
    paths = [Path(sample.file_name) for sample in annotated]
    predictor(paths[0])  # the first call is slower
    begin = time.perf_counter()
    results = [predictor(path) for path in paths]
    seconds = (time.perf_counter() - begin) / len(paths)
    rows = [_pictures(sample, result, dataset) for sample, result in zip(annotated, results, strict=True)]
    for path, result, row in zip(paths, results, rows, strict=True):
        drawn = out / f"{path.stem}_overlay.png"
        save_png(row[-1], drawn)
        if not quiet:
            print(f"{path.name}: {result.summary()} -> {drawn}")
    save_png(_sheet(rows), out / "gallery.png")
    summary = evaluate(predictor, dataset, with_ap=False, quiet=True, workers=0)["summary"]
    metrics = {name: summary[name] for name in ("PQ", "SQ", "RQ")}
    metrics |= {"things": summary["PQ_things"], "stuff": summary["PQ_stuff"]}
    metrics |= {"images": len(paths), "segments": sum(len(result.segments) for result in results)}
    metrics["seconds"] = seconds
    with atomic_write(out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=1).encode())
    if not quiet:
        print(
            f"panoptic quality {metrics['PQ']:.1f}, of nuclei {metrics['things']:.1f}; "
            f"{1000 * seconds:.0f} ms per image; pictures (input, truth, prediction): {out / 'gallery.png'}"
        )
    return metrics


def _pictures(sample: Sample, result: PanopticResult, dataset: CocoPanopticDataset) -> list[Image.Image]:
    """Draws the input, the annotation and the prediction. Many of the images are dark, so all three are brightened."""
    pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
    bright = ImageOps.autocontrast(Image.fromarray(pixels), cutoff=0.1)
    draw = partial(draw_panoptic, np.asarray(bright), color_by="instance", labels=False)
    truth = list(enumerate(sample.classes(dataset.categories), 1))
    found = [(segment.id, result.category(segment)) for segment in result.segments]
    return [bright, draw(sample.segments.numpy(), truth), draw(result.panoptic.numpy(), found)]


def _sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pastes pictures in rows and columns."""
    small = [[ImageOps.contain(picture, (_EDGE, _EDGE)) for picture in row] for row in rows]
    heights = [row[0].height for row in small]
    sheet = Image.new("RGB", (_EDGE * len(small[0]), sum(heights)))
    for number, row in enumerate(small):
        for column, picture in enumerate(row):
            left = _EDGE * column + (_EDGE - picture.width) // 2
            sheet.paste(picture, (left, sum(heights[:number])))
    return sheet
