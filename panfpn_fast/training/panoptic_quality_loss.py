"""A differentiable panoptic quality, as a loss: -log of it.

Panoptic quality (Kirillov et al. 2019) is, for a class, the sum of the IoU of its matched segments over
TP + FP / 2 + FN / 2. Here it is made smooth:

- Stuff: the segment that an image has of a class is the softmax of the semantic branch at 1/4 of the resolution, void
  left out; the true one is made of the pixels with that label.
- Things: the segment of an instance is the mask head's probability, in each sampled box that belongs to it; the true
  one is that box' mask target. The IoU of an instance is the mean over its boxes.
- The IoU of soft masks p and true ones g is sum(p g) / sum(p + g - p g).
- A pair is matched to the degree m = sigmoid((IoU - 1/2) / 0.1), scaled to m = 1 at IoU 1, where the measure asks
  whether IoU > 1/2. The rest, 1 - m, is a false positive and a false negative, because the prediction and the truth
  are both left alone. So each true segment adds m to the numerator, times its IoU, and m + (1 - m) / 2 + (1 - m) / 2,
  which is 1, to the denominator.
- PQ is the mean over the classes that the batch has.

What is predicted where there is nothing of the class is no term of its own: probabilities sum to one, so it is missing
elsewhere. Whether an instance gets the right class is left to the classification loss. In distributed training it is
each process' own batch that counts, because the logarithm of a mean is no mean of logarithms.
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
        quality: [classes], the sum of m IoU over them.
        segments: [classes], how many there are.
    """

    quality: Tensor
    segments: Tensor


def _quality(iou: Tensor) -> Tensor:
    """The IoU of pairs times the degree to which they are matched: 0 at 0, 1 at 1."""
    most = 1 / (1 + math.exp(-0.5 / _SOFTNESS))
    return iou * torch.sigmoid((iou - 0.5) / _SOFTNESS) / most


def stuff_quality(logits: Tensor, labels: Tensor) -> ClassQuality:
    """Compares the semantic branch with the labels.

    Args:
        logits: [N, 1 + stuff, h, w]; channel 0 is things.
        labels: uint8 [N, h, w]: 0 = things, 1.. = stuff, 255 = void.

    Returns:
        Of each stuff class; a segment for each image that has it.
    """
    probabilities = logits.to(at_least_float32(logits.dtype)).softmax(1)[:, 1:]
    probabilities = probabilities * (labels != IGNORE)[:, None]
    number = torch.arange(1, logits.shape[1], device=logits.device)
    truth = labels[:, None] == number[:, None, None]
    shared = (probabilities * truth).sum((2, 3))
    area = truth.sum((2, 3))
    union = probabilities.sum((2, 3)) + area - shared
    # A class that an image lacks has nothing shared, hence no quality.
    return ClassQuality(_quality(shared / union.clamp(min=_TINY)).sum(0), (area > 0).sum(0))


def thing_quality(
    logits: Tensor, truth: Tensor, counted: Tensor, instance: Tensor, classes: Tensor, num_things: int
) -> ClassQuality:
    """Compares the mask head with the instances.

    Args:
        logits: [R, S, S], of sampled boxes.
        truth: [R, S, S], zeros and ones.
        counted: bool [R]; the other rows may hold anything finite.
        instance: int64 [R], which of the batch's instances each belongs to.
        classes: int64 [G], of the batch's instances.
        num_things: How many classes there are.

    Returns:
        Of each thing class; a segment for each instance that has a sampled box with a part of it.
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
    """-log of the mean over classes; 0 where there is no segment, 13.8 at most.

    Args:
        parts: Of stuff, of things, or of both.

    Returns:
        A scalar.
    """
    quality = torch.cat([part.quality for part in parts])
    segments = torch.cat([part.segments for part in parts])
    classes = (segments > 0).sum()
    mean = (quality / segments.clamp(min=1)).sum() / classes.clamp(min=1)
    return torch.where(classes > 0, -torch.log((mean + _TINY) / (1 + _TINY)), mean)
