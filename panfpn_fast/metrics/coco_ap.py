"""Box and mask average precision through pycocotools; masks are compared as run lengths and never pasted."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.data.categories import Categories
from panfpn_fast.data.sample import Sample, segment_boxes
from panfpn_fast.inference.result import Instances

_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class InstanceAP:
    """Collects detections and annotations, and lets pycocotools compare them.

    Args:
        categories: Of the data set.

    Raises:
        ImportError: pycocotools is not installed; says how to.

    Note:
        The annotations are a panoptic data set's, in which instances do not overlap: figures differ a little from
        those on COCO's instance annotations.
    """

    def __init__(self, categories: Categories) -> None:
        try:
            self._coco = importlib.import_module("pycocotools.coco").COCO
            self._evaluation = importlib.import_module("pycocotools.cocoeval").COCOeval
            self._mask = importlib.import_module("pycocotools.mask")
        except ImportError as error:
            raise ImportError(f"{error}. AP needs pycocotools: pip install pycocotools") from error
        self._ids = [category.id for category in categories.things]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []

    def add(self, sample: Sample, instances: Instances) -> None:
        """Adds an image: its annotation, and what was found in it, in its own pixels."""
        image = len(self._images) + 1
        height, width = sample.size
        self._images.append({"id": image, "height": height, "width": width})
        self._add_annotations(image, sample)
        masks = ops.paste_masks_rle(instances.mask_probs, instances.boxes, (height, width))
        for box, score, label, mask in zip(
            _xywh(instances.boxes), instances.scores.tolist(), instances.classes.tolist(), masks, strict=True
        ):
            self._detections.append(
                {
                    "image_id": image,
                    "category_id": self._ids[label],
                    "bbox": box,
                    "score": score,
                    "segmentation": mask,
                }
            )

    def _add_annotations(self, image: int, sample: Sample) -> None:
        boxes, areas = segment_boxes(sample.segments, len(sample.label))
        segments = sample.segments.numpy()
        for row in torch.nonzero(sample.isthing & (areas > 0))[:, 0].tolist():
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image,
                    "category_id": self._ids[int(sample.label[row])],
                    "bbox": _xywh(boxes[row : row + 1])[0],
                    "area": int(areas[row]),
                    "iscrowd": int(sample.crowd[row]),
                    "segmentation": self._mask.encode(_fortran(segments == row + 1)),
                }
            )

    def result(self) -> dict[str, float]:
        """Average precision of boxes and masks, over IoU 0.5 to 0.95 and at 0.5 and 0.75, and by size; from 0 to 1.

        Returns:
            "box_AP", "box_AP50", ..., "mask_AP", ...; NaN for a size that no annotation has.
        """
        figures: dict[str, float] = {}
        # pycocotools prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            truth = self._coco()
            truth.dataset = {
                "images": self._images,
                "annotations": self._annotations,
                "categories": [{"id": category} for category in self._ids],
            }
            truth.createIndex()
            found = truth.loadRes(self._detections) if self._detections else None
            for kind, name in (("bbox", "box"), ("segm", "mask")):
                if found is None:
                    figures |= {f"{name}_{figure}": 0.0 for figure in _NAMES}
                    continue
                evaluation = self._evaluation(truth, found, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                for figure, value in zip(_NAMES, evaluation.stats, strict=False):
                    figures[f"{name}_{figure}"] = float(value) if value >= 0 else float("nan")
        return figures


def _xywh(boxes: Tensor) -> list[list[float]]:
    return torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1).tolist()


def _fortran(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    return np.asfortranarray(mask, dtype=np.uint8)
