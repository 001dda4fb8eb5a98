"""Panoptic quality (Kirillov et al., CVPR 2019) by the rules of panopticapi."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from panfpn_fast import _load
from panfpn_fast.data.files import check_folder, read_segment_ids
from panfpn_fast.data.panoptic_json import Annotation, PanopticJson, check_area

VOID = 0
_PathLike = str | os.PathLike[str]
Labels = npt.NDArray[Any]
Segment = Mapping[str, Any]


@dataclass
class Tally:
    """Matched and unmatched segments of one category.

    Attributes:
        iou: Sum of the intersections over unions of the matched pairs.
        tp: Matched pairs.
        fp: Predicted segments without a match.
        fn: True segments without a match.
    """

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def quality(self) -> dict[str, float] | None:
        """Returns PQ, SQ and RQ, or None if there are no segments."""
        if self.tp + self.fp + self.fn == 0:
            return None
        size = self.tp + 0.5 * self.fp + 0.5 * self.fn
        sq = self.iou / self.tp if self.tp else 0.0
        return {"pq": self.iou / size, "sq": sq, "rq": self.tp / size}


def _total(tallies: Sequence[Tally]) -> Tally:
    return Tally(
        # fsum rounds once, so the result does not depend on the order of the images.
        iou=math.fsum(tally.iou for tally in tallies),
        tp=sum(tally.tp for tally in tallies),
        fp=sum(tally.fp for tally in tallies),
        fn=sum(tally.fn for tally in tallies),
    )


def count_pairs(truth: Labels, predicted: Labels) -> list[tuple[int, int, int]]:
    """Counts the pixels of each pair of labels in two maps, int32 [H, W] or uint8 [H, W, 3].

    Returns:
        `(first label, second label, number of pixels)` in ascending order; negative labels are converted to uint32.
    """
    _load.native(torch.device("cpu"))  # raises an ImportError with the reason if there is no _C
    from panfpn_fast import _C

    pairs: list[tuple[int, int, int]] = _C.count_label_pairs(truth, predicted)
    return pairs


def _predicted_segments(
    pairs: Iterable[tuple[int, int, int]],
    segments: Sequence[Segment],
    categories: Mapping[int, Any],
    image: object,
) -> dict[int, tuple[int, int]]:
    """Returns (category, area in the map) of each predicted segment; map and table must have the same segments."""
    areas: dict[int, int] = {}
    for _, label, count in pairs:
        areas[label] = areas.get(label, 0) + count
    table = {int(segment["id"]): int(segment["category_id"]) for segment in segments}
    if VOID not in table:  # panopticapi evaluates a predicted segment 0 like any other
        areas.pop(VOID, None)
    for label in areas:
        if label not in table:
            raise KeyError(
                f"image {image}: the predicted map has a segment {label} that its segments_info lacks"
            )
    for label, category in table.items():
        if category not in categories:
            raise KeyError(f"image {image}: predicted segment {label} has the unknown category {category}")
        if label not in areas:
            raise KeyError(f"image {image}: the predicted map lacks segment {label} of its segments_info")
    return {label: (table[label], area) for label, area in areas.items()}


def _check_true_areas(
    pairs: Iterable[tuple[int, int, int]], segments: Mapping[int, Segment], where: str
) -> None:
    pixels: dict[int, int] = {}
    for label, _, count in pairs:
        pixels[label] = pixels.get(label, 0) + count
    for label, segment in segments.items():
        check_area(where, label, segment["area"], pixels.get(label, 0))


def match_segments(
    truth: Labels,
    truth_segments: Sequence[Segment],
    predicted: Labels,
    predicted_segments: Sequence[Segment],
    categories: Mapping[int, Any],
    image: object = "",
    file: object = "",
) -> dict[int, Tally]:
    """Matches the segments of one image.

    A predicted and a true segment of the same category match if their intersection over union is above 0.5. Pixels that
    are void in the truth do not count for the union, and the area of a true segment is its `area`. A predicted segment
    does not count as an error if more than half of it is on void or on the last crowd region of its category.

    Args:
        truth: Segment ids, int32 [H, W], or COCO colours, uint8 [H, W, 3]; 0 is void. Must be C-contiguous.
        truth_segments: `id`, `category_id`, `area` and optionally `iscrowd` of each true segment. An area may have a
            fraction.
        predicted: Segment ids or colours of the prediction, like `truth`.
        predicted_segments: `id` and `category_id` of each predicted segment. The pixels with the id 0 are one if it is
            listed, otherwise void.
        categories: Mapping whose keys are the ids of all categories.
        image: Name of the image in error messages.
        file: Name of the file with the areas in error messages.

    Returns:
        The tally of each category that occurs in the image.

    Raises:
        KeyError: If a predicted segment is only in the map or only in the table, or its category is unknown.
        ValueError: If the maps differ in size or have the wrong dtype or shape, or the `area` of a true segment is
            below its number of pixels in the map.
    """
    try:
        pairs = count_pairs(truth, predicted)
    except ValueError as error:
        raise ValueError(f"image {image}: {error}: got {truth.shape} and {predicted.shape}") from None
    mine = _predicted_segments(pairs, predicted_segments, categories, image)
    theirs = {int(segment["id"]): segment for segment in truth_segments}
    intersections = {(t, p): count for t, p, count in pairs}
    _check_true_areas(pairs, theirs, f"{file}: image {image}" if file else f"image {image}")
    tallies: dict[int, Tally] = {}

    matched: set[tuple[str, int]] = set()
    for (t, p), intersection in intersections.items():
        if t not in theirs or p not in mine:
            continue
        segment, (category, area) = theirs[t], mine[p]
        if segment.get("iscrowd", 0) == 1 or int(segment["category_id"]) != category:
            continue
        union = area + segment["area"] - intersection - intersections.get((VOID, p), 0)
        iou = intersection / union
        if iou > 0.5:
            tally = tallies.setdefault(category, Tally())
            tally.tp += 1
            tally.iou += iou
            matched |= {("true", t), ("predicted", p)}

    crowds: dict[int, int] = {}
    for t, segment in theirs.items():
        category = int(segment["category_id"])
        if ("true", t) in matched:
            continue
        if segment.get("iscrowd", 0) == 1:
            crowds[category] = t
        else:
            tallies.setdefault(category, Tally()).fn += 1
    for p, (category, area) in mine.items():
        if ("predicted", p) in matched:
            continue
        excused = intersections.get((VOID, p), 0)
        if category in crowds:
            excused += intersections.get((crowds[category], p), 0)
        if not excused / area > 0.5:
            tallies.setdefault(category, Tally()).fp += 1
    return tallies


class PanopticQuality:
    """Accumulates panoptic quality over images.

    Args:
        categories: For each category id, whether the category is a thing.

    Example:
        >>> import numpy as np
        >>> quality = PanopticQuality({1: True, 2: False})
        >>> truth = np.array([[1, 1, 2, 2]], dtype=np.int32)
        >>> segments = [{"id": 1, "category_id": 1, "area": 2}, {"id": 2, "category_id": 2, "area": 2}]
        >>> quality.add(match_segments(truth, segments, truth, segments, quality.categories))
        >>> quality.result()["All"]
        {'pq': 1.0, 'sq': 1.0, 'rq': 1.0, 'n': 2}
    """

    def __init__(self, categories: Mapping[int, bool]) -> None:
        self.categories = dict(categories)
        self._tallies: dict[int, list[Tally]] = {category: [] for category in categories}

    def add(self, tallies: Mapping[int, Tally]) -> None:
        """Adds the tallies that `match_segments` returned for an image."""
        for category, tally in tallies.items():
            self._tallies.setdefault(category, []).append(tally)

    def merge(self, other: PanopticQuality) -> None:
        """Adds the images of another object. The result is bit-identical for any order."""
        for category, tallies in other._tallies.items():
            self._tallies.setdefault(category, []).extend(tallies)

    def tallies(self) -> dict[int, Tally]:
        """Returns the tally of each category over all images."""
        return {category: _total(tallies) for category, tallies in self._tallies.items()}

    def result(self) -> dict[str, Any]:
        """Computes the quality of each category and the means over all categories, things and stuff.

        Returns:
            `{"All": ..., "Things": ..., "Stuff": ..., "per_class": {category: {"pq", "sq", "rq"}}}`. The first three
            contain "pq", "sq" and "rq", from 0 to 1, averaged over the "n" categories that occur; they are 0 if no
            category occurs.
        """
        tallies = self.tallies()
        per_class = {category: tallies[category].quality() for category in self.categories}
        result: dict[str, Any] = {}
        for name, isthing in (("All", None), ("Things", True), ("Stuff", False)):
            found = [
                quality
                for category, quality in per_class.items()
                if quality is not None and isthing in (None, bool(self.categories[category]))
            ]
            count = len(found)
            mean = {key: sum(q[key] for q in found) / count if count else 0.0 for key in ("pq", "sq", "rq")}
            result[name] = {**mean, "n": count}
        nothing = {"pq": 0.0, "sq": 0.0, "rq": 0.0}
        result["per_class"] = {category: quality or dict(nothing) for category, quality in per_class.items()}
        return result


def pq_compute(
    gt_json_file: _PathLike,
    pred_json_file: _PathLike,
    gt_folder: _PathLike | None = None,
    pred_folder: _PathLike | None = None,
) -> dict[str, Any]:
    """Computes panoptic quality from files, like the function of the same name in panopticapi.

    Args:
        gt_json_file: JSON file of the truth in COCO's panoptic format.
        pred_json_file: JSON file of the prediction; must contain every image of the truth.
        gt_folder: Directory of the truth's PNG files; by default the path of the JSON file without its suffix.
        pred_folder: Directory of the prediction's PNG files, with the corresponding default.

    Returns:
        `{"All", "Things", "Stuff", "per_class"}`, see `PanopticQuality.result`. Unlike panopticapi, it prints nothing.

    Raises:
        FileNotFoundError: If a file or directory is missing.
        KeyError: If an image has no prediction, or a predicted segment is only in the map or only in the table.
        ValueError: If a file is damaged, a field of a JSON file has a wrong value, a category is unknown, a prediction
            and its image differ in size, or the area of a true segment is below its number of pixels; names the file or
            the image.

    Note:
        The rules are those of panopticapi (evaluation.py): the area of a true segment is taken from the JSON file, that
        of a predicted segment, whose id may be 0, is counted in the map. A match needs an intersection over union
        strictly above 0.5. Only the last crowd region of a category excuses predictions. Label pairs are counted in
        C++, and images are processed in parallel; the result does not depend on the number of threads.

    Example:
        >>> pq_compute("panoptic_val2017.json", "predictions.json")["All"]["pq"]  # doctest: +SKIP
        0.415
    """
    truth_json, predicted_json = Path(gt_json_file), Path(pred_json_file)
    truth_folder = truth_json.with_suffix("") if gt_folder is None else Path(gt_folder)
    predicted_folder = predicted_json.with_suffix("") if pred_folder is None else Path(pred_folder)
    for folder in (truth_folder, predicted_folder):
        check_folder(folder, "panoptic PNGs")
    truth, predicted = PanopticJson(truth_json), PanopticJson(predicted_json)
    categories = truth.kinds()
    predictions = {annotation.image_id: annotation for annotation in predicted.annotations}

    def match(annotation: Annotation) -> dict[int, Tally]:
        image_id = annotation.image_id
        if image_id not in predictions:
            raise KeyError(f"image {image_id}: {predicted_json} has no prediction for it")
        prediction = predictions[image_id]
        found = predicted.segments(prediction, categories, predicted=True)
        return match_segments(
            read_segment_ids(truth_folder / annotation.file_name),
            [segment._asdict() for segment in truth.segments(annotation, categories)],
            read_segment_ids(predicted_folder / prediction.file_name),
            [segment._asdict() for segment in found],
            categories,
            image_id,
            truth_json,
        )

    quality = PanopticQuality(categories)
    # Decoding and counting release the GIL, so threads suffice and nothing needs to be pickled.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for tallies in pool.map(match, truth.annotations):
            quality.add(tallies)
    return quality.result()
