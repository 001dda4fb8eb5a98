"""Intersection over union of semantic label maps: the mean, weighted by frequency, and at the level of instances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Mean instance sizes in pixels of Cityscapes' training set, from cityscapesScripts'
# evalPixelLevelSemanticLabeling.py.
CITYSCAPES_INSTANCE_SIZES = {
    "bicycle": 4672.3249222261,
    "caravan": 36771.8241758242,
    "motorcycle": 6298.7200839748,
    "rider": 3930.4788056518,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "car": 12794.0202738185,
    "person": 3462.4756337644,
    "truck": 27855.1264367816,
    "trailer": 16926.9763313609,
}


class SemanticQuality:
    """Counts pixels of label maps and computes intersections over unions.

    Args:
        num_classes: Labels are 0..num_classes - 1.
        ignore_label: True pixels of this label do not count. A predicted pixel of any label outside of the classes
            counts as missed.
        instance_sizes: Mean instance size in pixels of each class that has instances; asks for iIoU.

    Note:
        The rules are cityscapesScripts' (evalPixelLevelSemanticLabeling.py). fIoU weighs each class's IoU with its
        share of the true pixels, as detectron2's SemSegEvaluator does.

    Example:
        >>> quality = SemanticQuality(2)
        >>> quality.add(torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 1, 1, 1]]))
        >>> quality.result()["iou"]
        [0.5, 0.5]
    """

    def __init__(
        self,
        num_classes: int,
        ignore_label: int = 255,
        instance_sizes: Mapping[int, float] | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.instance_sizes = dict(instance_sizes or {})
        # The last column is "any other label".
        self._pixels = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self._weighted_hits = torch.zeros(num_classes, dtype=torch.float64)
        self._weighted_misses = torch.zeros(num_classes, dtype=torch.float64)

    def add(self, truth: Tensor, predicted: Tensor, instances: Tensor | None = None) -> None:
        """Counts an image.

        Args:
            truth: Integer labels [H, W].
            predicted: The same for the prediction.
            instances: Integer [H, W], a number for each instance and 0 where there is none; for iIoU.

        Raises:
            ValueError: Sizes differ, or a true label is neither a class nor the ignored one.
        """
        if truth.shape != predicted.shape:
            raise ValueError(f"predicted: expected shape {list(truth.shape)}, got {list(predicted.shape)}")
        counted = truth != self.ignore_label
        true_label, label = truth[counted].long(), predicted[counted].long()
        if true_label.numel() == 0:
            return
        if not 0 <= int(true_label.min()) <= int(true_label.max()) < self.num_classes:
            raise ValueError(
                f"truth: expected labels 0..{self.num_classes - 1} or {self.ignore_label}, "
                f"got {int(true_label.min())}..{int(true_label.max())}"
            )
        label = torch.where((label >= 0) & (label < self.num_classes), label, self.num_classes)
        columns = self.num_classes + 1
        pixels = torch.bincount(true_label * columns + label, minlength=self.num_classes * columns)
        self._pixels += pixels.reshape(self.num_classes, columns).cpu()
        if instances is not None and self.instance_sizes:
            self._add_instances(true_label, label, instances[counted].long())

    def _add_instances(self, truth: Tensor, label: Tensor, instances: Tensor) -> None:
        for key in torch.unique(torch.stack([instances, truth]), dim=1).T.tolist():
            instance, label_of_instance = key
            if instance == 0 or label_of_instance not in self.instance_sizes:
                continue
            members = (instances == instance) & (truth == label_of_instance)
            size = int(members.sum())
            hits = int((label[members] == label_of_instance).sum())
            weight = self.instance_sizes[label_of_instance] / size
            self._weighted_hits[label_of_instance] += weight * hits
            self._weighted_misses[label_of_instance] += weight * (size - hits)

    def result(self) -> dict[str, Any]:
        """The figures so far.

        Returns:
            "iou", a list with each class's (NaN for one that occurs nowhere), "miou", their mean without NaN, "fiou",
            and, where instance sizes were given, "iiou" with the mean of the classes that have instances. From 0 to 1.
        """
        hits = self._pixels.diagonal().double()
        true_pixels = self._pixels.sum(1).double()
        wrong = self._pixels[:, : self.num_classes].sum(0).double() - hits
        union = true_pixels + wrong
        iou = torch.where(union > 0, hits / union, math.nan)
        share = true_pixels / true_pixels.sum()
        result: dict[str, Any] = {
            "iou": iou.tolist(),
            "miou": float(iou.nanmean()),
            "fiou": float((share * iou)[true_pixels > 0].sum()) if true_pixels.sum() > 0 else math.nan,
        }
        if self.instance_sizes:
            classes = sorted(self.instance_sizes)
            union_of_instances = self._weighted_hits + wrong + self._weighted_misses
            found = torch.where(union_of_instances > 0, self._weighted_hits / union_of_instances, math.nan)
            result["iiou"] = float(found[classes].nanmean())
        return result
