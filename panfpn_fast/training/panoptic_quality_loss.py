"""A differentiable panoptic quality, used as the loss -log(PQ).

The panoptic quality of a class (Kirillov et al. 2019) is the sum of the IoU of its matched segments, divided by
TP + FP / 2 + FN / 2. This module replaces the steps by smooth functions:

- Stuff: the predicted segment of a class in an image is the softmax of the semantic branch at 1/4 of the resolution,
  without void pixels. The true segment consists of the pixels with that label.
- Things: the predicted segment of an instance is the probability of the mask head in each sampled box of the instance.
  The true segment is the mask target of that box. The IoU of an instance is the mean over its boxes.
- The IoU of a soft mask p and a true mask g is sum(p g) / sum(p + g - p g).
- PQ counts a pair as matched if IoU > 1/2. Here it is matched to the degree m = sigmoid((IoU - 1/2) / 0.1), scaled so
  that m = 1 at IoU 1. The rest, 1 - m, counts as a false positive and as a false negative, because both the prediction
  and the truth are unmatched. Each true segment therefore adds m times its IoU to the numerator, and
  m + (1 - m) / 2 + (1 - m) / 2 = 1 to the denominator.
- PQ is the mean over the classes in the batch.

Predictions where the class does not occur have no term of their own: probabilities sum to one, so they are missing
elsewhere. The classification loss is responsible for the classes of instances. In distributed training each rank uses
its own batch, because the logarithm of a mean is not the mean of logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from panfpn_fast.data.sample import IGNORE
from panfpn_fast.models.layers import at_least_float32

_SOFTNESS = 0.1
_TINY = 1e-6


class ClassQuality(NamedTuple):
    """The segments of each class in a batch.

    Attributes:
        quality: [classes], the sum of m * IoU over the true segments.
        segments: [classes], the number of true segments.
    """

    quality: Tensor
    segments: Tensor


def _quality(iou: Tensor) -> Tensor:
    """Returns IoU times the degree to which the pair is matched: 0 at IoU 0, 1 at IoU 1."""
    most = 1 / (1 + math.exp(-0.5 / _SOFTNESS))
    return iou * torch.sigmoid((iou - 0.5) / _SOFTNESS) / most


def stuff_quality(logits: Tensor, labels: Tensor) -> ClassQuality:
    """Compares the semantic branch with the labels.

    Args:
        logits: [N, 1 + stuff, h, w]; channel 0 is things.
        labels: int16 [N, h, w]: 0 = things, 1.. = stuff, -1 = void.

    Returns:
        The quality of each stuff class, with one segment for each image in which it occurs.
    """
    probabilities = logits.to(at_least_float32(logits.dtype)).softmax(1)[:, 1:]
    probabilities = probabilities * (labels != IGNORE)[:, None]
    number = torch.arange(1, logits.shape[1], device=logits.device)
    truth = labels[:, None] == number[:, None, None]
    shared = (probabilities * truth).sum((2, 3))
    area = truth.sum((2, 3))
    union = probabilities.sum((2, 3)) + area - shared
    # A class that does not occur in an image has no intersection and so adds nothing to the quality.
    return ClassQuality(_quality(shared / union.clamp(min=_TINY)).sum(0), (area > 0).sum(0))


def thing_quality(
    logits: Tensor, truth: Tensor, counted: Tensor, instance: Tensor, classes: Tensor, num_things: int
) -> ClassQuality:
    """Compares the mask head with the instances.

    Args:
        logits: [R, S, S], predictions for the sampled boxes.
        truth: [R, S, S], zeros and ones.
        counted: bool [R]; rows with False are ignored but must be finite.
        instance: int64 [R], the index of each box's instance in the batch.
        classes: int64 [G], the classes of the batch's instances.
        num_things: Number of thing classes.

    Returns:
        The quality of each thing class, with one segment for each instance that covers a part of a sampled box.
    """
    probabilities = logits.to(at_least_float32(logits.dtype)).sigmoid()
    truth = truth.to(probabilities)
    shared = (probabilities * truth).sum((1, 2))
    union = probabilities.sum((1, 2)) + truth.sum((1, 2)) - shared
    counted = counted & (truth.sum((1, 2)) > 0)
    belongs = counted[:, None] & (instance[:, None] == torch.arange(len(classes), device=logits.device))
    boxes = belongs.sum(0)  # [G]
    iou = (belongs * (shared / union.clamp(min=_TINY))[:, None]).sum(0) / boxes.clamp(min=1)
    of_class = (boxes > 0)[:, None] & (classes[:, None] == torch.arange(num_things, device=logits.device))
    return ClassQuality((of_class * _quality(iou)[:, None]).sum(0), of_class.sum(0))


def panoptic_quality_loss(parts: Sequence[ClassQuality]) -> Tensor:
    """Computes -log of the mean quality over classes: 0 without segments, at most 13.8.

    Args:
        parts: Qualities of stuff, of things, or of both.

    Returns:
        A scalar.
    """
    quality = torch.cat([part.quality for part in parts])
    segments = torch.cat([part.segments for part in parts])
    classes = (segments > 0).sum()
    mean = (quality / segments.clamp(min=1)).sum() / classes.clamp(min=1)
    return torch.where(classes > 0, -torch.log((mean + _TINY) / (1 + _TINY)), mean)
