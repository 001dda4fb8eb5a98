"""Average precision against pycocotools with pasted masks and its own loadRes, and edge cases of its rules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from panfpn_fast import ops
from panfpn_fast.data import Categories, get_categories
from panfpn_fast.data.sample import Sample, segment_boxes
from panfpn_fast.inference import Instances
from panfpn_fast.metrics.coco_ap import AP_FIGURES, InstanceAP

mask_tools = pytest.importorskip("pycocotools.mask")
SYNTHETIC = get_categories("synthetic")
SIZE = (240, 320)


def sample_of(seed: int, crowds: bool = True) -> Sample:
    """Returns twelve overlapping rectangles of all sizes, some of them crowds, and one stuff segment."""
    random = np.random.default_rng(seed)
    segments = torch.zeros(SIZE, dtype=torch.int32)
    segments[200:] = 13
    for row in range(12):
        height, width = random.integers(8, 130, 2)
        y, x = random.integers(0, SIZE[0] - height), random.integers(0, SIZE[1] - width)
        segments[y : y + height, x : x + width] = row + 1
    return Sample(
        image=torch.zeros(3, *SIZE, dtype=torch.uint8),
        segments=segments,
        isthing=torch.arange(13) < 12,
        label=torch.from_numpy(random.integers(0, 4, 13)),
        crowd=torch.from_numpy(random.random(13) < 0.2) & (torch.arange(13) < 12) & crowds,
        area=torch.bincount(segments.flatten(), minlength=14)[1:],
        image_id=seed,
        file_name="",
    )


def detections_of(sample: Sample, seed: int, count: int) -> Instances:
    """Returns perturbed true boxes with soft masks; scores are multiples of 0.1, so many are equal."""
    random = torch.Generator().manual_seed(seed)
    boxes, areas = segment_boxes(sample.segments, 13)
    chosen = torch.nonzero(sample.isthing & (areas > 0))[:, 0]
    chosen = chosen[torch.randint(len(chosen), (count,), generator=random)]
    extent = (boxes[chosen, 2:] - boxes[chosen, :2]).repeat(1, 2)
    shaken = boxes[chosen] + 0.06 * extent * torch.randn(count, 4, generator=random)
    classes = sample.label[chosen].clone()
    classes[::7] = (classes[::7] + 1) % 4
    return Instances(
        boxes=shaken,
        scores=(torch.rand(count, generator=random) * 10).ceil() / 10,
        classes=classes,
        mask_probs=0.4 + 0.6 * torch.rand(count, 28, 28, generator=random),
    )


def pycocotools_figures(pairs: list[tuple[Sample, Instances]], categories: Categories) -> dict[str, float]:
    """Evaluates masks that pycocotools encodes; boxes and masks are loaded separately, as in detectron2's evaluator."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ids = [category.id for category in categories.things]
    truth: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []
    for image, (sample, found) in enumerate(pairs):
        corners, areas = segment_boxes(sample.segments, 13)
        for row in torch.nonzero(sample.isthing & (areas > 0))[:, 0].tolist():
            x1, y1, x2, y2 = corners[row].tolist()
            own = (sample.segments == row + 1).numpy().astype(np.uint8)
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image,
                    "category_id": ids[int(sample.label[row])],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(areas[row]),
                    "iscrowd": int(sample.crowd[row]),
                    "segmentation": mask_tools.encode(np.asfortranarray(own)),
                }
            )
        pasted = ops.paste_masks(found.mask_probs, found.boxes, SIZE).numpy().astype(np.uint8)
        for n, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
            common = {
                "image_id": image,
                "category_id": ids[int(found.classes[n])],
                "score": float(found.scores[n]),
            }
            boxes.append({**common, "bbox": [x1, y1, x2 - x1, y2 - y1]})
            masks.append({**common, "segmentation": mask_tools.encode(np.asfortranarray(pasted[n]))})
    table = COCO()
    table.dataset = {
        "images": [{"id": image, "height": SIZE[0], "width": SIZE[1]} for image in range(len(pairs))],
        "annotations": truth,
        "categories": [{"id": id_} for id_ in ids],
    }
    table.createIndex()
    figures: dict[str, float] = {}
    for name, kind, results in (("box", "bbox", boxes), ("mask", "segm", masks)):
        evaluation = COCOeval(table, table.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats = evaluation.stats[: len(AP_FIGURES)].tolist()
        figures |= {f"{name}_{figure}": value for figure, value in zip(AP_FIGURES, stats, strict=True)}
    return figures


def figures_of(pairs: list[tuple[Sample, Instances]]) -> dict[str, float]:
    collected = InstanceAP(SYNTHETIC)
    for number, (sample, found) in enumerate(pairs):
        collected.add(number, sample, found)
    return collected.result()


def test_equal_to_pycocotools() -> None:
    # Some class has more than 100 detections in an image.
    pairs = [(sample, detections_of(sample, n, 500)) for n, sample in enumerate(map(sample_of, range(3)))]
    assert max(torch.bincount(found.classes).max() for _, found in pairs) > 100
    expected = pycocotools_figures(pairs, SYNTHETIC)
    assert 0.05 < expected["mask_AP"] < 0.95
    assert expected["mask_APs"] != expected["box_APs"]
    assert figures_of(pairs) == pytest.approx(expected, abs=1e-12)


def test_order_of_images_does_not_matter() -> None:
    pairs = [(sample, detections_of(sample, n, 60)) for n, sample in enumerate(map(sample_of, range(4)))]
    parts = [InstanceAP(SYNTHETIC) for _ in range(2)]
    for number in (2, 0, 3, 1):
        parts[number % 2].add(number, *pairs[number])
    parts[1].merge(parts[0])
    assert parts[1].result() == figures_of(pairs)
    assert parts[1].result() == figures_of(pairs)  # result() does not change the state


def nothing() -> Instances:
    return Instances(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 28, 28)
    )


def test_no_detections_and_no_annotations() -> None:
    missed = figures_of([(sample_of(0, crowds=False), nothing())])
    assert missed["mask_AP"] == missed["box_AP50"] == 0
    empty: Any = sample_of(0)
    empty.segments = torch.zeros_like(empty.segments)
    assert all(math.isnan(value) for value in figures_of([(empty, nothing())]).values())
    found = figures_of([(empty, detections_of(sample_of(0), 0, 5))])
    assert all(math.isnan(value) for value in found.values())
