"""Intersection over union of semantic label maps: the mean, weighted by frequency, and at the level of instances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from panfpn_fast.metrics.panoptic_quality import count_pairs

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


def _pairs(truth: Tensor, predicted: Tensor) -> list[tuple[int, int, int]]:
    first, second = (
        map_.to(device="cpu", dtype=torch.int32).contiguous().numpy() for map_ in (truth, predicted)
    )
    return [(_signed(t), _signed(p), count) for t, p, count in count_pairs(first, second)]


def _signed(label: int) -> int:
    return label - 2**32 if label >= 2**31 else label


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
        # Of each class, the found pixels of each instance as a share of its size.
        self._shares: dict[int, list[float]] = {label: [] for label in self.instance_sizes}

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
        pairs = _pairs(truth, predicted)
        unknown = {t for t, _, _ in pairs if t != self.ignore_label and not 0 <= t < self.num_classes}
        if unknown:
            raise ValueError(
                f"truth: expected labels 0..{self.num_classes - 1} or {self.ignore_label}, got {sorted(unknown)}"
            )
        for true_label, label, count in pairs:
            if true_label != self.ignore_label:
                known = 0 <= label < self.num_classes
                self._pixels[true_label, label if known else self.num_classes] += count
        if instances is not None and self.instance_sizes:
            self._add_instances(truth, predicted, instances)

    def _add_instances(self, truth: Tensor, predicted: Tensor, instances: Tensor) -> None:
        within = (instances != 0) & (truth != self.ignore_label)
        key = torch.where(within, instances * self.num_classes + truth, 0)
        sizes: dict[int, int] = {}
        hits: dict[int, int] = {}
        for pair, label, count in _pairs(key, predicted):
            sizes[pair] = sizes.get(pair, 0) + count
            if label == pair % self.num_classes:
                hits[pair] = count
        for pair, size in sizes.items():
            instance, label_of_instance = divmod(pair, self.num_classes)
            if instance != 0 and label_of_instance in self.instance_sizes:
                self._shares[label_of_instance].append(hits.get(pair, 0) / size)

    def merge(self, other: SemanticQuality) -> None:
        """Adds the images of another one; the result does not depend on the order."""
        self._pixels += other._pixels
        for label, shares in other._shares.items():
            self._shares[label].extend(shares)

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
            result["iiou"] = self._instance_iou(wrong)
        return result

    def _instance_iou(self, wrong: Tensor) -> float:
        """iTP / (iTP + FP + iFN): every instance weighs as much as one of its class's mean size."""
        found = []
        for label, mean_size in self.instance_sizes.items():
            hits = mean_size * math.fsum(self._shares[label])
            misses = mean_size * math.fsum(1 - share for share in self._shares[label])
            union = hits + float(wrong[label]) + misses
            if union > 0:
                found.append(hits / union)
        return math.fsum(found) / len(found) if found else math.nan
