"""Intersection over union of semantic label maps: the mean, frequency-weighted, and instance-level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfpn_fast.data.sample import runs_of
from panfpn_fast.metrics.panoptic_quality import count_pairs

# Mean instance sizes in pixels in the training set of Cityscapes, from evalPixelLevelSemanticLabeling.py of
# cityscapesScripts.
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
    first, second = (_int32(map_).contiguous().numpy() for map_ in (truth, predicted))
    return [(_signed(t), _signed(p), count) for t, p, count in count_pairs(first, second)]


def _int32(labels: Tensor) -> Tensor:
    """Converts labels to int32; those beyond its range, which are no classes, become its ends."""
    labels = labels.cpu()
    if labels.dtype == torch.int64:
        limits = torch.iinfo(torch.int32)
        labels = labels.clamp(limits.min, limits.max)
    return labels.to(torch.int32)


def _signed(label: int) -> int:
    return label - 2**32 if label >= 2**31 else label


class SemanticQuality:
    """Counts the pixels of label maps and computes intersections over unions.

    Args:
        num_classes: Number of classes; labels are 0..num_classes - 1.
        ignore_label: Pixels with this true label do not count; must not be a class. A pixel that is predicted with a
            label outside of the classes counts as missed.
        instance_sizes: Mean instance size in pixels of each class that has instances; if given, iIoU is computed.

    Raises:
        ValueError: If there are no classes, or `ignore_label` is a class.

    Note:
        The rules are those of cityscapesScripts (evalPixelLevelSemanticLabeling.py). As in detectron2's
        SemSegEvaluator, fIoU weights the IoU of each class by its share of the true pixels.

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
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        if 0 <= ignore_label < num_classes:
            raise ValueError(
                f"ignore_label: expected a label that is not one of the {num_classes} classes, such as -1, "
                f"got {ignore_label}"
            )
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.instance_sizes = dict(instance_sizes or {})
        # The last column counts all other predicted labels.
        self._pixels = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device="cpu")
        # For each class, the share of found pixels of each instance.
        self._shares: dict[int, list[float]] = {label: [] for label in self.instance_sizes}

    def add(self, truth: Tensor, predicted: Tensor, instances: Tensor | None = None) -> None:
        """Adds an image.

        Args:
            truth: True labels, integer [H, W].
            predicted: Predicted labels, integer [H, W].
            instances: Number of the instance at each pixel, integer [H, W], 0 for no instance; needed for iIoU.

        Raises:
            ValueError: If sizes differ, or a true label is neither a class nor `ignore_label`.
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
        truth = truth.to("cpu", torch.int64)
        runs = runs_of(instances.to("cpu", torch.int64).numpy())
        # The instances of the image are numbered, so that a number and a class fit into one int32.
        instance, number = np.unique(runs.value, return_inverse=True)
        numbers = torch.from_numpy(runs.map_of(number, (truth.shape[0], truth.shape[1])))
        key = torch.where(truth != self.ignore_label, numbers * self.num_classes + truth, -1)
        sizes: dict[int, int] = {}
        hits: dict[int, int] = {}
        for pair, label, count in _pairs(key, predicted):
            sizes[pair] = sizes.get(pair, 0) + count
            if label == pair % self.num_classes:
                hits[pair] = count
        for pair, size in sizes.items():
            row, label_of_instance = divmod(pair, self.num_classes)
            if row >= 0 and instance[row] != 0 and label_of_instance in self.instance_sizes:
                self._shares[label_of_instance].append(hits.get(pair, 0) / size)

    def merge(self, other: SemanticQuality) -> None:
        """Adds the images of another object; the result does not depend on the order."""
        self._pixels += other._pixels
        for label, shares in other._shares.items():
            self._shares[label].extend(shares)

    def result(self) -> dict[str, Any]:
        """Computes the metrics over all images so far.

        Returns:
            A dictionary with values from 0 to 1: "iou", a list with the IoU of each class (NaN for a class that does
            not occur); "miou", the mean of "iou" without NaN, in which a class that is only predicted counts as 0, as
            in cityscapesScripts; "miou_annotated", the mean over the classes with true pixels, as in detectron2's
            SemSegEvaluator; "fiou"; and, if instance sizes were given, "iiou", the mean over the classes that have
            instances.
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
            "miou_annotated": float(iou[true_pixels > 0].mean()),
            "fiou": float((share * iou)[true_pixels > 0].sum()) if true_pixels.sum() > 0 else math.nan,
        }
        if self.instance_sizes:
            result["iiou"] = self._instance_iou(wrong)
        return result

    def _instance_iou(self, wrong: Tensor) -> float:
        """Mean of iTP / (iTP + FP + iFN); every instance has the weight of an instance of mean size of its class."""
        found = []
        for label, mean_size in self.instance_sizes.items():
            hits = mean_size * math.fsum(self._shares[label])
            misses = mean_size * math.fsum(1 - share for share in self._shares[label])
            union = hits + float(wrong[label]) + misses
            if union > 0:
                found.append(hits / union)
        return math.fsum(found) / len(found) if found else math.nan
