"""The losses of the instance branch (Mask R-CNN's) and of the semantic branch, as in the paper.

Each is a sum over what was sampled, divided by a count. In distributed training counts are means over the processes,
so that averaged gradients are those of one process with all the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.data.sample import IGNORE, Target
from panfpn_fast.models.boxes import encode_boxes
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.models.rpn import RPN
from panfpn_fast.training.matching import NEGATIVE, POSITIVE, Samples, match, sample

_PRE_NMS, _POST_NMS = 2000, 1000


class Sampled(NamedTuple):
    """An image's boxes for the box and mask heads.

    Attributes:
        boxes: [S, 4]; objects first.
        classes: int64 [S]: of objects; background is the number of things; -1 marks slots that were left over.
        instance: int64 [S], of objects: which one.
        target_boxes: [S, 4], of objects: that instance's.
        positives: How many slots at the front may hold objects.
    """

    boxes: Tensor
    classes: Tensor
    instance: Tensor
    target_boxes: Tensor
    positives: int


class Masks(NamedTuple):
    """A batch's sampled boxes in the mask head.

    Attributes:
        logits: [R, S, S], of the true class.
        truth: [R, S, S], zeros and ones.
        counted: bool [R], whether it holds an object.
        instance: int64 [R], which one of the batch's instances.
    """

    logits: Tensor
    truth: Tensor
    counted: Tensor
    instance: Tensor


def averaged(count: Tensor) -> Tensor:
    """A count, averaged over the processes of distributed training, and at least one of all of them."""
    processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        count = count.clone()
        torch.distributed.all_reduce(count)
    return count.clamp(min=1) / processes


def rpn_losses(
    rpn: RPN,
    anchors: Sequence[Tensor],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    targets: Sequence[Target],
    seeds: Sequence[int],
    samples: int = 256,
) -> dict[str, Tensor]:
    """Objectness and box regression of sampled anchors.

    Args:
        rpn: The region proposal network.
        anchors: Per level, [M, 4].
        logits: Per level, [N, M].
        deltas: Per level, [N, M, 4].
        targets: Per image.
        seeds: Per image, of the sampling.
        samples: Anchors to look at in each image, of which half at most are objects.

    Returns:
        loss_rpn_cls (binary cross-entropy) and loss_rpn_box (L1), both divided by the samples of all images: 0.3 and
        0.7 are the overlaps for background and objects.
    """
    all_anchors = torch.cat(list(anchors))
    all_logits, all_deltas = torch.cat(list(logits), dim=1), torch.cat(list(deltas), dim=1)
    classification, regression = [], []
    for image, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
        with torch.no_grad():
            matches = match(all_anchors, target.boxes, 0.3, 0.7, keep_best=True)
            chosen = sample(matches.label, samples, samples // 2, seed)
        logit = all_logits[image][chosen.rows]
        loss = F.binary_cross_entropy_with_logits(
            logit, (chosen.label == POSITIVE).to(logit), reduction="none"
        )
        classification.append((loss * (chosen.label >= NEGATIVE)).sum())
        if len(target.boxes) > 0:
            near = target.boxes[matches.instance[chosen.rows]]
            wanted = encode_boxes(near, all_anchors[chosen.rows], rpn.box_weights)
            regression.append(_l1(all_deltas[image][chosen.rows], wanted, chosen.label == POSITIVE))
    scale = 1.0 / (samples * len(targets))
    nothing = all_deltas.sum() * 0
    return {
        "loss_rpn_cls": torch.stack(classification).sum() * scale,
        "loss_rpn_box": (torch.stack(regression).sum() if regression else nothing) * scale,
    }


def _l1(found: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """Sum of absolute differences over the rows that count; the others may hold anything, NaN too."""
    difference = (found - torch.where(counted[:, None], wanted, found.detach())).abs()
    return torch.where(counted[:, None], difference, 0.0).sum()


@torch.no_grad()
def propose(
    rpn: RPN,
    anchors: Sequence[Tensor],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Proposals for training: 2000 of each level before NMS, 1000 after, in static shapes.

    Returns:
        Boxes [N, 1000, 4] and bool [N, 1000], whether each slot holds one.
    """
    return rpn.propose_padded(anchors, logits, deltas, sizes, _PRE_NMS, _POST_NMS)


@torch.no_grad()
def sample_boxes(
    boxes: Tensor, valid: Tensor, target: Target, num_things: int, seed: int, samples: int = 512
) -> Sampled:
    """Chooses an image's boxes for the heads, of which at most a quarter overlap an instance by half or more.

    Args:
        boxes: Proposals [P, 4].
        valid: bool [P], which slots hold one.
        target: The image's; its own boxes are candidates too.
        num_things: The label of background.
        seed: Of the choice.
        samples: How many boxes to choose.
    """
    candidates = torch.cat((boxes, target.boxes.to(boxes)))
    matches = match(candidates, target.boxes.to(boxes), 0.5, 0.5, keep_best=False)
    usable = torch.cat((valid, valid.new_ones(len(target.boxes))))
    label = torch.where(usable, matches.label, -1)
    chosen = sample(label, samples, samples // 4, seed)
    if boxes.device.type == "cpu":  # where asking how many there are costs nothing, and empty slots would
        keep = chosen.label >= NEGATIVE
        chosen = Samples(chosen.rows[keep], chosen.label[keep])
        positives = int((chosen.label == POSITIVE).sum())
    else:
        positives = samples // 4
    instance = matches.instance[chosen.rows]
    background = torch.where(chosen.label == NEGATIVE, num_things, -1)
    if len(target.boxes) == 0:
        return Sampled(candidates[chosen.rows], background, instance, candidates[chosen.rows], positives)
    classes = torch.where(chosen.label == POSITIVE, target.classes[instance], background)
    return Sampled(candidates[chosen.rows], classes, instance, target.boxes.to(boxes)[instance], positives)


def box_losses(
    logits: Tensor, deltas: Tensor, sampled: Sequence[Sampled], num_things: int, weights: Sequence[float]
) -> dict[str, Tensor]:
    """Classification (cross-entropy) and refinement (L1 on the true class' deltas) of the sampled boxes.

    Args:
        logits: [K, things + 1].
        deltas: [K, things, 4], or [K, 1, 4] for all classes alike.
        sampled: Per image; K slots in all.
        num_things: The label of background.
        weights: Scale of (dx, dy, dw, dh).

    Returns:
        loss_cls and loss_box, both divided by the number of sampled boxes.
    """
    classes = torch.cat([image.classes for image in sampled])
    boxes = torch.cat([image.boxes for image in sampled])
    target_boxes = torch.cat([image.target_boxes for image in sampled])
    count = averaged((classes >= 0).sum())
    is_object = (classes >= 0) & (classes < num_things)
    own = deltas[torch.arange(len(deltas), device=deltas.device), classes.clamp(0, deltas.shape[1] - 1)]
    wanted = encode_boxes(target_boxes, boxes, weights)
    return {
        "loss_cls": F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum") / count,
        "loss_box": _l1(own, wanted, is_object) / count,
    }


def mask_targets(target: Target, boxes: Tensor, instance: Tensor, size: int) -> Tensor:
    """Each box' part of its instance's mask, at the mask head's size.

    Args:
        target: The image's.
        boxes: [P, 4].
        instance: int64 [P].
        size: Side of the masks.

    Returns:
        float32 [P, size, size] of zeros and ones: whether the instance covers half of a cell or more (ROIAlign with
        adaptive sampling, aligned, as detectron2's BitMasks.crop_and_resize).
    """
    count = len(target.boxes)
    number = torch.arange(1, count + 1, device=boxes.device, dtype=torch.int32)
    masks = (target.instances[None] == number[:, None, None]).to(torch.float32)[:, None]
    rois = torch.cat((instance[:, None].to(boxes), boxes), dim=1)
    covered: Tensor = ops.roi_align(masks, rois, size, 1.0, 0, True)
    return (covered[:, 0] >= 0.5).to(torch.float32)


def predict_masks(
    model: PanopticFPN, features: Sequence[Tensor], targets: Sequence[Target], sampled: Sequence[Sampled]
) -> Masks:
    """Predicts the true class' masks of the sampled objects."""
    boxes = [image.boxes[: image.positives] for image in sampled]
    classes = torch.cat([image.classes[: image.positives] for image in sampled])
    counted = (classes >= 0) & (classes < model.config.num_things)
    logits = model.mask_head(features, boxes, classes.clamp(0, model.config.num_things - 1))
    wanted, instances, before = [], [], 0
    for target, image, image_boxes in zip(targets, sampled, boxes, strict=True):
        instance = image.instance[: image.positives]
        if len(target.boxes) == 0:
            wanted.append(logits.new_zeros(len(image_boxes), *logits.shape[1:]))
        else:
            wanted.append(mask_targets(target, image_boxes, instance, logits.shape[-1]))
        instances.append(instance + before)
        before += len(target.boxes)
    return Masks(logits, torch.cat(wanted).to(logits), counted, torch.cat(instances))


def mask_loss(masks: Masks) -> Tensor:
    """Binary cross-entropy, averaged over the objects' pixels."""
    loss = F.binary_cross_entropy_with_logits(masks.logits, masks.truth, reduction="none")
    pixels = averaged(masks.counted.sum()) * loss.shape[-1] * loss.shape[-2]
    return (loss * masks.counted[:, None, None]).sum() / pixels


def semantic_labels(targets: Sequence[Target], height: int, width: int) -> Tensor:
    """The images' semantic labels, padded right and bottom with void: uint8 [N, height, width]."""
    semantic = targets[0].semantic.new_full((len(targets), height, width), IGNORE)
    for image, target in zip(semantic, targets, strict=True):
        image[: target.semantic.shape[0], : target.semantic.shape[1]] = target.semantic
    return semantic


def semantic_loss(logits: Tensor, labels: Tensor, stride: int) -> Tensor:
    """Cross-entropy of the semantic branch at the input's resolution, averaged over the pixels that are not void.

    Args:
        logits: [N, K, H / stride, W / stride].
        labels: [N, H, W].
        stride: 4.
    """
    count = averaged((labels != IGNORE).sum())
    total: Tensor = ops.upsample_cross_entropy(logits, labels, stride, ignore_index=IGNORE, reduction="sum")
    return total / count
