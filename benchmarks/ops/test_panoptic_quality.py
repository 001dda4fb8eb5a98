"""The panoptic quality of one image: segments matched by panopticapi's rules, compared with the rules in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from panfpn_fast.inference import encode_panoptic
from panfpn_fast.metrics import match_segments

from ..harness import inputs
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row

Map = npt.NDArray[Any]
Segments = list[dict[str, int]]

THINGS = 14
COCO = {category: category < 100 for category in range(200)}


def _ids(labels: Map) -> Map:
    """Converts labels to ids as large as those in COCO's files, which encode colours."""
    return np.where(labels == 0, 0, labels * 70_001 % 2**24).astype(np.int32)


def _maps(size: tuple[int, int], colours: bool) -> Arguments:
    """Makes a map of 6 stuff classes and 14 things, and a prediction.

    The prediction is shifted, misses two things and has the wrong class for two.
    """
    height, width = size
    labels = inputs.semantic_labels(size).numpy() % 7
    y, x = np.indices(size)
    for n, (x1, y1, x2, y2) in enumerate(inputs.boxes(THINGS, size).tolist()):
        inside = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
        labels[inside] = 7 + n
    shifted = np.roll(labels, (height // 120, width // 160), (0, 1))
    shifted[np.isin(shifted, (8, 11))] = 0
    tables: list[Segments] = []
    for map_ in (labels, shifted):
        found, areas = np.unique(map_[map_ > 0], return_counts=True)
        tables.append(
            [
                {
                    "id": int(_ids(label)),
                    "category_id": int(label % 5 if label > 6 else 100 + label),
                    "area": int(area),
                    "iscrowd": int(label == 9 and map_ is labels),
                }
                for label, area in zip(found, areas, strict=True)
            ]
        )
    for segment in tables[1][-2:]:
        segment["category_id"] += 1
    truth, predicted = (encode_panoptic(_ids(m)) if colours else _ids(m) for m in (labels, shifted))
    return truth, tables[0], predicted, tables[1], COCO


def numpy_matching(
    truth: Map,
    truth_segments: Segments,
    predicted: Map,
    predicted_segments: Segments,
    categories: Mapping[int, Any],
) -> dict[int, tuple[float, int, int, int]]:
    """Returns the sum of IoUs, true positives, false positives and false negatives of each category."""
    if truth.ndim == 3:
        weights = np.array([1, 256, 65536])
        truth, predicted = (map_.astype(np.int64) @ weights for map_ in (truth, predicted))
    labels, areas = np.unique(predicted, return_counts=True)
    area = dict(zip(labels.tolist(), areas.tolist(), strict=True))
    pairs, counts = np.unique(truth.astype(np.int64) << 24 | predicted, return_counts=True)
    shared = {(p >> 24, p & 0xFFFFFF): n for p, n in zip(pairs.tolist(), counts.tolist(), strict=True)}
    true = {segment["id"]: segment for segment in truth_segments}
    found = {segment["id"]: segment["category_id"] for segment in predicted_segments}
    crowds = {s["category_id"]: s["id"] for s in truth_segments if s["iscrowd"]}
    tallies: dict[int, list[Any]] = {}
    matched = set()
    for (t, p), n in shared.items():
        if t in true and p in found and not true[t]["iscrowd"] and true[t]["category_id"] == found[p]:
            iou = n / (true[t]["area"] + area[p] - n - shared.get((0, p), 0))
            if iou > 0.5:
                tally = tallies.setdefault(found[p], [0.0, 0, 0, 0])
                tally[0] += iou
                tally[1] += 1
                matched |= {(0, t), (1, p)}
    for p, category in found.items():
        excused = shared.get((0, p), 0) + shared.get((crowds.get(category, -1), p), 0)
        if (1, p) not in matched and not excused / area[p] > 0.5:
            tallies.setdefault(category, [0.0, 0, 0, 0])[2] += 1
    for t, segment in true.items():
        if (0, t) not in matched and not segment["iscrowd"]:
            tallies.setdefault(segment["category_id"], [0.0, 0, 0, 0])[3] += 1
    return {category: tuple(tally) for category, tally in tallies.items()}


def _same_tallies(ours: Any, theirs: Any) -> None:
    counted = {category: (tally.iou, tally.tp, tally.fp, tally.fn) for category, tally in ours.items()}
    assert counted.keys() == theirs.keys(), f"categories {list(counted)} and {list(theirs)}"
    for category, tally in counted.items():
        assert tally == pytest.approx(theirs[category]), (
            f"category {category}: {tally} and {theirs[category]}"
        )


COMPARISON = Comparison(
    op="panoptic_quality",
    ours=match_segments,
    peers=[Peer("NumPy", numpy_matching)],
    cases=[
        Case("20 segments, 480 x 640", partial(_maps, (480, 640), False)),
        Case("20 segments, 480 x 640, colours", partial(_maps, (480, 640), True)),
        Case("20 segments, 1024 x 2048", partial(_maps, (1024, 2048), False), highlight=True),
        Case("20 segments, 1024 x 2048, colours", partial(_maps, (1024, 2048), True)),
    ],
    agree=_same_tallies,
    cost=lambda arguments, output: Cost(arguments[0].nbytes + arguments[2].nbytes, 0),
    devices=("cpu",),
)


@COMPARISON.rows()
def test_panoptic_quality(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
