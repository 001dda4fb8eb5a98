"""Box and mask average precision by pycocotools; masks are compared as run lengths, without pasted bitmaps."""

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
        raise ImportError(f"{error}. Average precision needs pycocotools: pip install pycocotools") from error


class InstanceAP:
    """Collects detections and annotations and computes average precision with pycocotools.

    Args:
        categories: Categories of the data set.

    Raises:
        ImportError: If pycocotools is not installed; the message gives the command.

    Note:
        The rules are those of pycocotools (cocoeval.py): at most 100 detections of a class per image count, and
        detections on a crowd region do not count. The size class of a mask depends on its number of pixels, that of a
        box on the area of the box. The annotations come from a panoptic data set, in which instances do not overlap, so
        the figures differ slightly from those on COCO's instance annotations.
    """

    def __init__(self, categories: Categories) -> None:
        _pycocotools("mask")  # raises the ImportError now instead of at the end
        self._ids = [category.id for category in categories.things]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []

    def add(self, number: int, sample: Sample, instances: Instances) -> None:
        """Adds the annotation and the detections of one image, both in pixels of the image.

        Args:
            number: Unique number of the image; detections with equal scores are ranked by it.
            sample: The annotated image.
            instances: The detections.
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
        by_columns = np.asfortranarray(sample.segments.numpy())  # pycocotools encodes column by column
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
        """Adds the images of another object; the result does not depend on the order."""
        self._images += other._images
        self._annotations += other._annotations
        self._detections += other._detections

    def result(self) -> dict[str, float]:
        """Computes the average precision of boxes and masks: over IoU 0.5 to 0.95, at 0.5 and 0.75, and by size.

        Returns:
            A dictionary with "box_AP", "box_AP50", ..., "mask_AP", ...; values from 0 to 1, or NaN for a size that no
            annotation has.
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
            # Copies, because pycocotools modifies them. Ids start at 1, because pycocotools uses 0 for "no match".
            "annotations": [{**entry, "id": number} for number, entry in enumerate(entries, 1)],
            "categories": [{"id": category} for category in self._ids],
        }
        table.createIndex()
        return table


def _measures(entry: dict[str, Any], kind: str) -> dict[str, Any]:
    # pycocotools' loadRes would use the area of the box for the mask too.
    width, height = entry["bbox"][2:]
    area = width * height if kind == "bbox" else float(_pycocotools("mask").area(entry["segmentation"]))
    return {"area": area, "iscrowd": 0}


def _xywh(boxes: Tensor) -> list[list[float]]:
    return torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1).tolist()
