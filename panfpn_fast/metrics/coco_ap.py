"""Box and mask average precision through pycocotools; masks are compared as run lengths and never pasted."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.data.categories import Categories
from panfpn_fast.data.sample import Sample, segment_boxes
from panfpn_fast.inference.result import Instances

AP_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def _pycocotools(module: str) -> Any:
    try:
        return importlib.import_module(f"pycocotools.{module}")
    except ImportError as error:
        raise ImportError(f"{error}. AP needs pycocotools: pip install pycocotools") from error


class InstanceAP:
    """Collects detections and annotations, and lets pycocotools compare them.

    Args:
        categories: Of the data set.

    Raises:
        ImportError: pycocotools is not installed; says how to.

    Note:
        pycocotools' rules (cocoeval.py): at most 100 detections of a class in an image; detections on a crowd region do
        not count; a mask's size class goes by its pixels, a box's by the box. The annotations are a panoptic data
        set's, in which instances do not overlap: figures differ a little from those on COCO's instance annotations.
    """

    def __init__(self, categories: Categories) -> None:
        _pycocotools("mask")  # fails now rather than at the end
        self._ids = [category.id for category in categories.things]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []

    def add(self, number: int, sample: Sample, instances: Instances) -> None:
        """Adds an image: its annotation, and what was found in it, in its own pixels.

        Args:
            number: Of the image, unique; equal scores are ranked by it.
            sample: The annotation.
            instances: What was found.
        """
        height, width = sample.size
        self._images.append({"id": number, "height": height, "width": width})
        self._add_annotations(number, sample)
        masks = ops.paste_masks_rle(instances.mask_probs, instances.boxes, (height, width))
        for box, score, label, mask in zip(
            _xywh(instances.boxes), instances.scores.tolist(), instances.classes.tolist(), masks, strict=True
        ):
            self._detections.append(
                {
                    "image_id": number,
                    "category_id": self._ids[label],
                    "bbox": box,
                    "score": score,
                    "segmentation": mask,
                }
            )

    def _add_annotations(self, number: int, sample: Sample) -> None:
        boxes, areas = segment_boxes(sample.segments, len(sample.label))
        by_columns = np.asfortranarray(sample.segments.numpy())  # as pycocotools' run lengths go
        for row in torch.nonzero(sample.isthing & (areas > 0))[:, 0].tolist():
            self._annotations.append(
                {
                    "image_id": number,
                    "category_id": self._ids[int(sample.label[row])],
                    "bbox": _xywh(boxes[row : row + 1])[0],
                    "area": int(areas[row]),
                    "iscrowd": int(sample.crowd[row]),
                    "segmentation": _pycocotools("mask").encode((by_columns == row + 1).view(np.uint8)),
                }
            )

    def merge(self, other: InstanceAP) -> None:
        """Adds the images of another one; the result does not depend on the order."""
        self._images += other._images
        self._annotations += other._annotations
        self._detections += other._detections

    def result(self) -> dict[str, float]:
        """Average precision of boxes and masks, over IoU 0.5 to 0.95 and at 0.5 and 0.75, and by size; from 0 to 1.

        Returns:
            "box_AP", "box_AP50", ..., "mask_AP", ...; NaN for a size that no annotation has.
        """
        figures: dict[str, float] = {}
        # pycocotools prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            truth = self._table(self._annotations)
            for kind, name in (("bbox", "box"), ("segm", "mask")):
                found = self._table([{**entry, **_measures(entry, kind)} for entry in self._detections])
                evaluation = _pycocotools("cocoeval").COCOeval(truth, found, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                for figure, value in zip(AP_FIGURES, evaluation.stats, strict=False):
                    figures[f"{name}_{figure}"] = float(value) if value >= 0 else float("nan")
        return figures

    def _table(self, entries: list[dict[str, Any]]) -> Any:
        table = _pycocotools("coco").COCO()
        table.dataset = {
            "images": self._images,
            # Copies, because pycocotools writes into them; from 1, because 0 is its "no match".
            "annotations": [{**entry, "id": number} for number, entry in enumerate(entries, 1)],
            "categories": [{"id": category} for category in self._ids],
        }
        table.createIndex()
        return table


def _measures(entry: dict[str, Any], kind: str) -> dict[str, Any]:
    # pycocotools' own loadRes would take the box's area for the mask's too.
    width, height = entry["bbox"][2:]
    area = width * height if kind == "bbox" else float(_pycocotools("mask").area(entry["segmentation"]))
    return {"area": area, "iscrowd": 0}


def _xywh(boxes: Tensor) -> list[list[float]]:
    return torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1).tolist()
