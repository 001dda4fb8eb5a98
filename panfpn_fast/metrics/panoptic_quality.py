"""Panoptic quality (Kirillov et al., CVPR 2019) by panopticapi's rules."""

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
from panfpn_fast.data.files import read_panoptic_json, read_rgb

VOID = 0
_PathLike = str | os.PathLike[str]
Labels = npt.NDArray[Any]
Segment = Mapping[str, Any]


@dataclass
class Tally:
    """What was matched in one category.

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
        """PQ, SQ and RQ, or None where there is nothing to judge."""
        if self.tp + self.fp + self.fn == 0:
            return None
        size = self.tp + 0.5 * self.fp + 0.5 * self.fn
        sq = self.iou / self.tp if self.tp else 0.0
        return {"pq": self.iou / size, "sq": sq, "rq": self.tp / size}


def _total(tallies: Sequence[Tally]) -> Tally:
    return Tally(
        # Rounded once, so that the order of the images does not matter.
        iou=math.fsum(tally.iou for tally in tallies),
        tp=sum(tally.tp for tally in tallies),
        fp=sum(tally.fp for tally in tallies),
        fn=sum(tally.fn for tally in tallies),
    )


def count_pairs(truth: Labels, predicted: Labels) -> list[tuple[int, int, int]]:
    """Which labels meet in two maps, int32 [H, W] or uint8 [H, W, 3], and in how many pixels; in ascending order.

    Negative labels come back as uint32.
    """
    _load.native(torch.device("cpu"))  # says why, where there is no _C
    from panfpn_fast import _C

    pairs: list[tuple[int, int, int]] = _C.count_label_pairs(truth, predicted)
    return pairs


def _predicted_segments(
    pairs: Iterable[tuple[int, int, int]],
    segments: Sequence[Segment],
    categories: Mapping[int, Any],
    image: object,
) -> dict[int, tuple[int, int]]:
    """(category, area in the map) of each predicted segment; the map and the table must name the same ones."""
    areas: dict[int, int] = {}
    for _, label, count in pairs:
        areas[label] = areas.get(label, 0) + count
    areas.pop(VOID, None)
    table = {int(segment["id"]): int(segment["category_id"]) for segment in segments}
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


def match_segments(
    truth: Labels,
    truth_segments: Sequence[Segment],
    predicted: Labels,
    predicted_segments: Sequence[Segment],
    categories: Mapping[int, Any],
    image: object = "",
) -> dict[int, Tally]:
    """Matches the segments of one image.

    A predicted and a true segment of one category match where their intersection over union is above 0.5; pixels
    that are void in the truth do not count for the union, and the true segment's area is its `area`. A predicted
    segment of which more than half lies on void, or on the last crowd region of its category, is no error.

    Args:
        truth: Segment ids, int32 [H, W], or COCO's colours, uint8 [H, W, 3]; 0 is void. C-contiguous.
        truth_segments: `id`, `category_id`, `area` and optionally `iscrowd` of each.
        predicted: The same for the prediction.
        predicted_segments: `id` and `category_id` of each.
        categories: Its keys are the categories there are.
        image: Named in errors.

    Returns:
        A tally for each category that occurs.

    Raises:
        KeyError: A predicted segment is in the map or in the table only, or its category is unknown.
        ValueError: The maps are of different size or of the wrong kind.
    """
    try:
        pairs = count_pairs(truth, predicted)
    except ValueError as error:
        raise ValueError(f"image {image}: {error}: got {truth.shape} and {predicted.shape}") from None
    mine = _predicted_segments(pairs, predicted_segments, categories, image)
    theirs = {int(segment["id"]): segment for segment in truth_segments}
    intersections = {(t, p): count for t, p, count in pairs}
    tallies: dict[int, Tally] = {}

    matched: set[tuple[str, int]] = set()
    for (t, p), intersection in intersections.items():
        if t not in theirs or p not in mine:
            continue
        segment, (category, area) = theirs[t], mine[p]
        if segment.get("iscrowd", 0) == 1 or int(segment["category_id"]) != category:
            continue
        union = area + int(segment["area"]) - intersection - intersections.get((VOID, p), 0)
        if union <= 0:
            raise ValueError(
                f"image {image}: true segment {t} has the area {segment['area']}, less than it covers in the map"
            )
        if intersection > 0.5 * union:
            tally = tallies.setdefault(category, Tally())
            tally.tp += 1
            tally.iou += intersection / union
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
    """Panoptic quality over images.

    Args:
        categories: Whether each category is a thing.

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
        """Adds what `match_segments` found in an image."""
        for category, tally in tallies.items():
            self._tallies.setdefault(category, []).append(tally)

    def merge(self, other: PanopticQuality) -> None:
        """Adds the images of another one; the result does not depend on the order, to the last bit."""
        for category, tallies in other._tallies.items():
            self._tallies.setdefault(category, []).extend(tallies)

    def tallies(self) -> dict[int, Tally]:
        """What was matched in each category, over all images."""
        return {category: _total(tallies) for category, tallies in self._tallies.items()}

    def result(self) -> dict[str, Any]:
        """The means of all categories, of things and of stuff, and each category's own.

        Returns:
            `{"All": ..., "Things": ..., "Stuff": ..., "per_class": {category: {"pq", "sq", "rq"}}}`; the first three
            have "pq", "sq" and "rq", from 0 to 1, averaged over the "n" categories that occur. With none that occurs
            they are 0.
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
    """Computes panoptic quality from files, as panopticapi's function of the same name does.

    Args:
        gt_json_file: The truth in COCO's panoptic format.
        pred_json_file: The prediction; must have every image of the truth.
        gt_folder: Folder of the truth's PNGs; by default the JSON's name without its suffix.
        pred_folder: The same for the prediction.

    Returns:
        `{"All", "Things", "Stuff", "per_class"}`, see `PanopticQuality.result`. Nothing is printed.

    Raises:
        FileNotFoundError: A file or folder is missing.
        KeyError: An image has no prediction, a segment is in the map or in the table only, or its category is unknown.
        ValueError: A file is damaged, or a prediction's size is not its image's; names the file or the image.

    Note:
        panopticapi's rules (evaluation.py): a true segment's area is its JSON's, a predicted one's is counted; a match
        needs an intersection over union strictly above 0.5; only the last crowd region of a category excuses
        predictions. Pairs of labels are counted natively, images in parallel; the result does not depend on the number
        of threads.

    Example:
        >>> pq_compute("panoptic_val2017.json", "predictions.json")["All"]["pq"]  # doctest: +SKIP
        0.415
    """
    truth_json, predicted_json = Path(gt_json_file), Path(pred_json_file)
    truth_folder = truth_json.with_suffix("") if gt_folder is None else Path(gt_folder)
    predicted_folder = predicted_json.with_suffix("") if pred_folder is None else Path(pred_folder)
    for folder in (truth_folder, predicted_folder):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    truth, predicted = read_panoptic_json(truth_json), read_panoptic_json(predicted_json)
    categories = {int(category["id"]): bool(category["isthing"]) for category in truth["categories"]}
    predictions = {annotation["image_id"]: annotation for annotation in predicted["annotations"]}

    def match(annotation: dict[str, Any]) -> dict[int, Tally]:
        image_id = annotation["image_id"]
        if image_id not in predictions:
            raise KeyError(f"image {image_id}: {predicted_json} has no prediction for it")
        prediction = predictions[image_id]
        return match_segments(
            read_rgb(truth_folder / annotation["file_name"]),
            annotation["segments_info"],
            read_rgb(predicted_folder / prediction["file_name"]),
            prediction["segments_info"],
            categories,
            image_id,
        )

    quality = PanopticQuality(categories)
    # Decoding and counting leave Python alone, so threads suffice and nothing is pickled.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for tallies in pool.map(match, truth["annotations"]):
            quality.add(tallies)
    return quality.result()
