"""The losses of the instance branch (those of Mask R-CNN) and of the semantic branch, as in the paper.

Each loss is a sum over samples, divided by a count. In distributed training the count is the mean over the ranks, so
that the averaged gradients equal those of one process with all the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.data.sample import IGNORE
from panfpn_fast.distributed import mean_count
from panfpn_fast.models.boxes import encode_boxes
from panfpn_fast.training.matching import NEGATIVE, POSITIVE
from panfpn_fast.training.targets import SampledAnchors, SampledBoxes


class Masks(NamedTuple):
    """Mask predictions and targets for the sampled objects of a batch.

    Attributes:
        logits: [R, S, S], predictions for the true class.
        truth: [R, S, S], zeros and ones.
        counted: bool [R], whether the slot holds an object.
        instance: int64 [R], the index of the instance in the batch.
    """

    logits: Tensor
    truth: Tensor
    counted: Tensor
    instance: Tensor


def rpn_losses(
    logits: Sequence[Tensor], deltas: Sequence[Tensor], sampled: Sequence[SampledAnchors], samples: int
) -> dict[str, Tensor]:
    """Computes the losses of objectness and box regression over the sampled anchors.

    Args:
        logits: Objectness for each level, [N, M].
        deltas: Box deltas for each level, [N, M, 4].
        sampled: The sampled anchors of each image.
        samples: Number of anchors sampled in each image.

    Returns:
        loss_rpn_cls (binary cross-entropy) and loss_rpn_box (L1), both divided by the samples of all images.
    """
    all_logits, all_deltas = torch.cat(list(logits), dim=1), torch.cat(list(deltas), dim=1)
    classification, regression = [], []
    for logit, delta, chosen in zip(all_logits, all_deltas, sampled, strict=True):
        logit = logit[chosen.rows]
        loss = F.binary_cross_entropy_with_logits(
            logit, (chosen.label == POSITIVE).to(logit), reduction="none"
        )
        classification.append((loss * (chosen.label >= NEGATIVE)).sum())
        if chosen.deltas is not None:
            regression.append(_l1(delta[chosen.rows], chosen.deltas, chosen.label == POSITIVE))
    scale = 1.0 / (samples * len(sampled))
    zero = all_deltas.sum() * 0
    return {
        "loss_rpn_cls": torch.stack(classification).sum() * scale,
        "loss_rpn_box": (torch.stack(regression).sum() if regression else zero) * scale,
    }


def _l1(found: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """Sums absolute differences over the rows that count; the other rows may hold anything, even NaN."""
    difference = (found - torch.where(counted[:, None], wanted, found.detach())).abs()
    return torch.where(counted[:, None], difference, 0.0).sum()


def box_losses(
    logits: Tensor,
    deltas: Tensor,
    sampled: Sequence[SampledBoxes],
    num_things: int,
    weights: Sequence[float],
) -> dict[str, Tensor]:
    """Computes the losses of classification and box refinement over the sampled boxes.

    Args:
        logits: [K, things + 1].
        deltas: [K, things, 4], or [K, 1, 4] if all classes share them.
        sampled: The sampled boxes of each image; K slots in all.
        num_things: Number of thing classes, which is the label of background.
        weights: Scale of (dx, dy, dw, dh).

    Returns:
        loss_cls (cross-entropy) and loss_box (L1 on the deltas of the true class), both divided by the number of
        sampled boxes.
    """
    classes = torch.cat([image.classes for image in sampled])
    boxes = torch.cat([image.boxes for image in sampled])
    target_boxes = torch.cat([image.target_boxes for image in sampled])
    count = mean_count((classes >= 0).sum())
    is_object = (classes >= 0) & (classes < num_things)
    row = torch.arange(len(deltas), device=deltas.device)
    of_true_class = deltas[row, classes.clamp(0, deltas.shape[1] - 1)]
    wanted = encode_boxes(target_boxes, boxes, weights)
    return {
        "loss_cls": F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum") / count,
        "loss_box": _l1(of_true_class, wanted, is_object) / count,
    }


def mask_loss(masks: Masks) -> Tensor:
    """Computes the binary cross-entropy, averaged over the pixels of the objects."""
    loss = F.binary_cross_entropy_with_logits(masks.logits, masks.truth, reduction="none")
    pixels = mean_count(masks.counted.sum()) * loss.shape[-1] * loss.shape[-2]
    return (loss * masks.counted[:, None, None]).sum() / pixels


def semantic_loss(logits: Tensor, labels: Tensor, stride: int, count: Tensor | None = None) -> Tensor:
    """Computes the semantic cross-entropy at the input's resolution, averaged over the pixels that are not void.

    It is 0 if all pixels are void, where detectron2's loss is NaN.

    Args:
        logits: [N, K, H / stride, W / stride].
        labels: [N, H, W].
        stride: Input pixels per logit, 4.
        count: Number that the sum over the pixels is divided by; None for the number of pixels that are not void.
    """
    if count is None:
        count = mean_count((labels != IGNORE).sum())
    total: Tensor = ops.upsample_cross_entropy(logits, labels, stride, ignore_index=IGNORE, reduction="sum")
    return total / count
