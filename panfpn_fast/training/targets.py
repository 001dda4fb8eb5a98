"""Training targets: sampled anchors and boxes, their classes and deltas, mask targets, and padded semantic labels.

Nothing here needs a gradient, and on CUDA nothing waits for the device: shapes do not depend on values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.data.sample import IGNORE, Target
from panfpn_fast.models.boxes import encode_boxes
from panfpn_fast.models.rpn import RPN
from panfpn_fast.training.matching import NEGATIVE, POSITIVE, SampledRows, match, sample

_PRE_NMS, _POST_NMS = 2000, 1000


class SampledAnchors(NamedTuple):
    """The anchors of one image that the RPN learns from.

    Attributes:
        rows: int64 [S], indices into the anchors of all levels.
        label: int64 [S], 1 for objects, 0 for background, -1 for unused slots.
        deltas: [S, 4], from the anchor to its instance; None for an image without instances.
    """

    rows: Tensor
    label: Tensor
    deltas: Tensor | None


class SampledBoxes(NamedTuple):
    """The boxes of one image that the box and mask heads learn from.

    Attributes:
        boxes: [S, 4], objects first.
        classes: int64 [S], the class of an object; the number of things for background; -1 for unused slots.
        instance: int64 [S], the index of an object's instance.
        target_boxes: [S, 4], the box of that instance.
        positives: Number of slots at the front that may hold objects.
    """

    boxes: Tensor
    classes: Tensor
    instance: Tensor
    target_boxes: Tensor
    positives: int


@torch.no_grad()
def sample_anchors(rpn: RPN, anchors: Tensor, target: Target, samples: int, seed: int) -> SampledAnchors:
    """Chooses the anchors of an image for the RPN's losses; at most half of them are objects.

    An anchor is an object from an overlap of 0.7 with an instance on, or if no anchor overlaps an instance more. Below
    0.3 it is background.

    Args:
        rpn: The region proposal network.
        anchors: [M, 4], the anchors of all levels.
        target: The image's annotation.
        samples: Number of anchors to choose.
        seed: Seed of the choice.
    """
    matches = match(anchors, target.boxes, 0.3, 0.7, keep_best=True)
    chosen = sample(matches.label, samples, samples // 2, seed)
    if len(target.boxes) == 0:
        return SampledAnchors(chosen.rows, chosen.label, None)
    instances = target.boxes[matches.instance[chosen.rows]]
    deltas = encode_boxes(instances, anchors[chosen.rows], rpn.box_weights)
    return SampledAnchors(chosen.rows, chosen.label, deltas)


@torch.no_grad()
def propose(
    rpn: RPN,
    anchors: Sequence[Tensor],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Makes proposals for training: the best 2000 of each level before NMS, 1000 after it, in static shapes.

    Returns:
        Boxes [N, 1000, 4], and bool [N, 1000], True where a slot holds a box.
    """
    return rpn.propose_padded(anchors, logits, deltas, sizes, _PRE_NMS, _POST_NMS)


@torch.no_grad()
def sample_boxes(
    boxes: Tensor, valid: Tensor, target: Target, num_things: int, seed: int, samples: int = 512
) -> SampledBoxes:
    """Chooses the boxes of an image for the heads; at most a quarter of them overlap an instance by half or more.

    Args:
        boxes: Proposals [P, 4].
        valid: bool [P], True where a slot holds a proposal.
        target: The image's annotation; its own boxes are candidates too.
        num_things: Number of thing classes, which is the label of background.
        seed: Seed of the choice.
        samples: Number of boxes to choose.
    """
    candidates = torch.cat((boxes, target.boxes.to(boxes)))
    matches = match(candidates, target.boxes.to(boxes), 0.5, 0.5, keep_best=False)
    usable = torch.cat((valid, valid.new_ones(len(target.boxes))))
    label = torch.where(usable, matches.label, -1)
    chosen = sample(label, samples, samples // 4, seed)
    if boxes.device.type == "cpu":  # on the CPU, counting costs nothing and unused slots would cost time
        keep = chosen.label >= NEGATIVE
        chosen = SampledRows(chosen.rows[keep], chosen.label[keep])
        positives = int((chosen.label == POSITIVE).sum())
    else:
        positives = samples // 4
    instance = matches.instance[chosen.rows]
    background = torch.where(chosen.label == NEGATIVE, num_things, -1)
    if len(target.boxes) == 0:
        return SampledBoxes(candidates[chosen.rows], background, instance, candidates[chosen.rows], positives)
    classes = torch.where(chosen.label == POSITIVE, target.classes[instance], background)
    return SampledBoxes(
        candidates[chosen.rows], classes, instance, target.boxes.to(boxes)[instance], positives
    )


@torch.no_grad()
def mask_targets(target: Target, boxes: Tensor, instance: Tensor, size: int) -> Tensor:
    """Crops the mask of an instance to each box, at the mask head's resolution.

    Args:
        target: The image's annotation.
        boxes: [P, 4].
        instance: int64 [P], the instance of each box.
        size: Side of the masks.

    Returns:
        float32 [P, size, size] of zeros and ones: 1 where the instance covers at least half of a bin (ROIAlign with
        adaptive sampling, aligned, as in detectron2's BitMasks.crop_and_resize).
    """
    count = len(target.boxes)
    if count == 0:
        return torch.zeros(len(boxes), size, size, device=boxes.device)
    number = torch.arange(1, count + 1, device=boxes.device, dtype=target.instances.dtype)
    masks = (target.instances[None] == number[:, None, None]).to(torch.float32)[:, None]
    rois = torch.cat((instance[:, None].to(boxes), boxes), dim=1)
    covered: Tensor = ops.roi_align(masks, rois, size, 1.0, 0, True)
    return (covered[:, 0] >= 0.5).to(torch.float32)


def semantic_labels(targets: Sequence[Target], height: int, width: int) -> Tensor:
    """Returns the images' semantic labels, padded right and bottom with void: int16 [N, height, width]."""
    semantic = targets[0].semantic.new_full((len(targets), height, width), IGNORE)
    for image, target in zip(semantic, targets, strict=True):
        image[: target.semantic.shape[0], : target.semantic.shape[1]] = target.semantic
    return semantic
