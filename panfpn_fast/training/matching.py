"""Matches predictions with instances by overlap, and samples them. Static shapes, no host sync."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


class Matches(NamedTuple):
    """The instance and the label that each box was matched with.

    Attributes:
        instance: int64 [M], the instance that the box overlaps most; 0 without instances.
        label: int64 [M], 1 for an object, 0 for background, -1 for neither.
    """

    instance: Tensor
    label: Tensor


class SampledRows(NamedTuple):
    """A fixed number of boxes that enter a loss.

    Attributes:
        rows: int64 [count], indices of the boxes.
        label: int64 [count], 1 or 0, and -1 for unused slots.
    """

    rows: Tensor
    label: Tensor


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Computes the IoU of all pairs of boxes [M, 4] and others [G, 4]: [M, G]; 0 where a box is empty.

    Example:
        >>> pairwise_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 2, 1], [5.0, 5, 6, 6]]))
        tensor([[0.5000, 0.0000]])
    """
    overlap = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    overlap = (overlap - torch.maximum(boxes[:, None, :2], others[None, :, :2])).clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    other_areas = (others[:, 2:] - others[:, :2]).prod(-1)
    union = areas[:, None] + other_areas[None] - overlap
    return torch.where(overlap > 0, overlap / union, 0.0)


def match(boxes: Tensor, instances: Tensor, low: float, high: float, keep_best: bool) -> Matches:
    """Matches boxes with instances.

    Args:
        boxes: [M, 4].
        instances: [G, 4]; G may be 0.
        low: Below this overlap with every instance, a box is background.
        high: From this overlap on, a box is an object. In between it is neither.
        keep_best: Whether the boxes that overlap an instance most are objects, however small the overlap, so that every
            instance has one.

    Returns:
        The matches, by the rules of detectron2's Matcher.
    """
    if len(instances) == 0:
        nothing = boxes.new_zeros(len(boxes), dtype=torch.int64)
        return Matches(nothing, nothing.clone())
    iou = pairwise_iou(boxes, instances)
    best, instance = iou.max(dim=1)
    label = torch.full_like(instance, IGNORED)
    label = torch.where(best < low, NEGATIVE, label)
    label = torch.where(best >= high, POSITIVE, label)
    if keep_best:
        most = iou.amax(dim=0)
        label = torch.where(((iou == most) & (most > 0)).any(dim=1), POSITIVE, label)
    return Matches(instance, label)


def random_keys(count: int, seed: int, device: torch.device) -> Tensor:
    """Returns random numbers, float64 [count] in [0, 1), that depend only on the seed, not on device or history.

    A run that is resumed, or distributed over other processes, therefore draws the same samples.
    """
    # The finalizer of SplitMix64 (Steele et al. 2014), on the numbers 1, 2, 3... times its odd constant.
    x = torch.arange(1, count + 1, device=device, dtype=torch.int64)
    x = x * -7046029254386353131 + (seed * 2862933555777941757 + 3037000493) % 2**62
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shifted(x, shift)) * factor
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() / 2**53


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shifts right logically; torch's shift keeps the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def sample(label: Tensor, count: int, most_positive: int, seed: int) -> SampledRows:
    """Chooses boxes at random.

    Args:
        label: [M], as returned by `match`.
        count: Number of boxes to choose.
        most_positive: Limit for the number of objects; background fills the rest.
        seed: Seed of the choice.

    Returns:
        `count` slots: objects first, then background, then unused slots.
    """
    total = len(label)
    slots = min(count, total)
    key = random_keys(total, seed, label.device)
    positive = torch.where(label == POSITIVE, key, -1.0)
    chosen = torch.zeros_like(label, dtype=torch.bool)
    value, index = positive.topk(min(most_positive, total))
    chosen[index] = value >= 0
    rank = torch.where(chosen, 2.0 + key, torch.where(label == NEGATIVE, key, -1.0))
    value, index = rank.topk(slots)
    found = torch.where(value >= 2, POSITIVE, torch.where(value >= 0, NEGATIVE, IGNORED))
    missing = count - slots
    return SampledRows(
        torch.cat((index, index.new_zeros(missing))), torch.cat((found, found.new_full((missing,), IGNORED)))
    )
