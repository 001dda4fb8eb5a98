"""Panoptic quality of one image, in plain NumPy (Kirillov et al., CVPR 2019; panopticapi's rules).

It compares two panoptic maps. Crowd regions are not supported, because predictions have none.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

VOID = 0


class Quality(NamedTuple):
    """Means over the categories that occur, and the numbers of matched and unmatched segments."""

    pq: float
    sq: float
    rq: float
    true_positives: int
    false_positives: int
    false_negatives: int


def panoptic_quality(
    truth: npt.NDArray[Any],
    truth_categories: Mapping[int, Hashable],
    predicted: npt.NDArray[Any],
    predicted_categories: Mapping[int, Hashable],
) -> Quality:
    """Computes PQ.

    Args:
        truth: Segment ids [H, W], 0 = void.
        truth_categories: Category of each id; (isthing, class) distinguishes things from stuff.
        predicted: Segment ids [H, W], 0 = void.
        predicted_categories: Category of each id.

    Returns:
        The quality; 1 if neither map has a segment.

    Raises:
        KeyError: If an id occurs only in a map or only in its table.
    """
    truth_areas = _areas(truth, truth_categories)
    predicted_areas = _areas(predicted, predicted_categories)
    pairs, counts = np.unique(
        np.stack((truth.ravel(), predicted.ravel())).astype(np.int64), axis=1, return_counts=True
    )
    intersections = {(int(t), int(p)): int(n) for (t, p), n in zip(pairs.T, counts, strict=True)}

    ious: dict[Hashable, list[float]] = {}
    matched_truth, matched_predicted = set(), set()
    for (t, p), intersection in intersections.items():
        if VOID in (t, p) or truth_categories[t] != predicted_categories[p]:
            continue
        union = predicted_areas[p] + truth_areas[t] - intersection - intersections.get((VOID, p), 0)
        iou = intersection / union
        if iou > 0.5:
            ious.setdefault(truth_categories[t], []).append(iou)
            matched_truth.add(t)
            matched_predicted.add(p)

    missed = [truth_categories[t] for t in truth_areas if t not in matched_truth]
    wrong = [
        predicted_categories[p]
        for p, area in predicted_areas.items()
        if p not in matched_predicted and intersections.get((VOID, p), 0) / area <= 0.5
    ]
    categories = {*ious, *missed, *wrong}
    if not categories:
        return Quality(1.0, 1.0, 1.0, 0, 0, 0)
    rows = []
    for category in categories:
        found = ious.get(category, [])
        denominator = len(found) + 0.5 * wrong.count(category) + 0.5 * missed.count(category)
        sq = sum(found) / len(found) if found else 0.0
        rows.append((sum(found) / denominator, sq, len(found) / denominator))
    pq, sq, rq = np.mean(rows, axis=0)
    return Quality(float(pq), float(sq), float(rq), len(matched_truth), len(wrong), len(missed))


def _areas(ids: npt.NDArray[Any], categories: Mapping[int, Hashable]) -> dict[int, int]:
    areas = {int(i): int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True) if i != VOID}
    if areas.keys() != categories.keys():
        raise KeyError(f"ids {sorted(areas.keys() ^ categories.keys())} occur in the map or the table only")
    return areas
