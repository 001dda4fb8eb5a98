"""A network together with its losses: the module that an optimizer or DistributedDataParallel wraps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from panfpn_fast.data.sample import Target
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training import losses
from panfpn_fast.training.panoptic_quality_loss import (
    ClassQuality,
    panoptic_quality_loss,
    stuff_quality,
    thing_quality,
)
from panfpn_fast.training.targets import (
    SampledBoxes,
    mask_targets,
    propose,
    sample_anchors,
    sample_boxes,
    semantic_labels,
)

INSTANCE_LOSSES = ("loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask")
SEMANTIC_LOSSES = ("loss_semantic",)


class TrainingNetwork(nn.Module):
    """Computes the losses of a batch: proposals, then targets, then predictions, then losses.

    Args:
        model: The network.
        lambda_instance: Weight of the instance branch's losses (the paper's lambda_i).
        lambda_semantic: Weight of the semantic branch's loss (lambda_s).
        lambda_panoptic: Weight of `panfpn_fast.training.panoptic_quality_loss`, computed only if above 0.
        rpn_samples: Anchors of each image that the region proposal network learns from.
        box_samples: Proposals of each image that the heads learn from.

    Note:
        L = lambda_i (L_cls + L_box + L_mask + L_rpn) + lambda_s L_sem (Kirillov et al. 2019, section 3.2). No host sync
        on CUDA: the number of anchors, proposals and masks is fixed.
    """

    def __init__(
        self,
        model: PanopticFPN,
        lambda_instance: float = 1.0,
        lambda_semantic: float = 0.5,
        lambda_panoptic: float = 0.0,
        rpn_samples: int = 256,
        box_samples: int = 512,
    ) -> None:
        super().__init__()
        self.model = model
        self.lambda_instance = lambda_instance
        self.lambda_semantic = lambda_semantic
        self.lambda_panoptic = lambda_panoptic
        self.rpn_samples = rpn_samples
        self.box_samples = box_samples

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target],
        seeds: Sequence[int],
        branches: Sequence[str] = ("instance", "semantic"),
        labelled_pixels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the weighted losses.

        Args:
            images: RGB [3, h, w], values from 0 to 255; they may differ in size.
            targets: One annotation per image, on the network's device.
            seeds: One seed per image, for sampling anchors and proposals.
            branches: The branches that learn in this step; those that the network lacks are ignored.
            labelled_pixels: Number that the semantic loss is divided by; None for the pixels of these images (the mean
                over the processes) that are not void.

        Returns:
            Scalars whose sum is the loss: loss_rpn_cls, loss_rpn_box, loss_cls, loss_box, loss_mask and loss_semantic,
            as far as their branches were asked for, and loss_panoptic if it has a weight.

        Raises:
            ValueError: If the network has none of the branches.
        """
        model = self.model
        branches = [branch for branch in branches if branch in model.config.tasks]
        if not branches:
            raise ValueError(f"branches: expected some of the network's, {model.config.tasks}, got none")
        batch = model.prepare(images)
        features = model.features(batch.images, branches)
        found: dict[str, Tensor] = {}
        qualities: list[ClassQuality] = []
        if "instance" in branches:
            found |= self._instance_losses(features["instance"], batch.sizes, targets, seeds, qualities)
        if "semantic" in branches:
            found |= self._semantic_losses(features["semantic"], targets, qualities, labelled_pixels)
        if qualities:
            found["loss_panoptic"] = panoptic_quality_loss(qualities)
        weights = dict.fromkeys(INSTANCE_LOSSES, self.lambda_instance)
        weights |= dict.fromkeys(SEMANTIC_LOSSES, self.lambda_semantic)
        weights["loss_panoptic"] = self.lambda_panoptic
        return {name: weights[name] * loss for name, loss in found.items()}

    def _instance_losses(
        self,
        pyramid: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
        seeds: Sequence[int],
        qualities: list[ClassQuality],
    ) -> dict[str, Tensor]:
        model, things = self.model, self.model.config.num_things
        logits, deltas = model.rpn(pyramid)
        anchors = model.rpn.anchors(pyramid)
        all_anchors = torch.cat(list(anchors))
        sampled_anchors = [
            sample_anchors(model.rpn, all_anchors, target, self.rpn_samples, seed)
            for target, seed in zip(targets, seeds, strict=True)
        ]
        boxes, valid = propose(model.rpn, anchors, logits, deltas, sizes)
        sampled = [
            # The complement gives other random numbers than those of the anchors.
            sample_boxes(image_boxes, image_valid, target, things, ~seed, self.box_samples)
            for image_boxes, image_valid, target, seed in zip(boxes, valid, targets, seeds, strict=True)
        ]
        class_logits, box_deltas = model.box_head(pyramid, [image.boxes for image in sampled])
        masks = predict_masks(model, pyramid, targets, sampled)
        if self.lambda_panoptic > 0:
            classes = torch.cat([target.classes for target in targets])
            qualities.append(thing_quality(*masks, classes, things))
        return {
            **losses.rpn_losses(logits, deltas, sampled_anchors, self.rpn_samples),
            **losses.box_losses(class_logits, box_deltas, sampled, things, model.box_head.weights),
            "loss_mask": losses.mask_loss(masks),
        }

    def _semantic_losses(
        self,
        pyramid: Sequence[Tensor],
        targets: Sequence[Target],
        qualities: list[ClassQuality],
        labelled_pixels: Tensor | None,
    ) -> dict[str, Tensor]:
        head = self.model.semantic_head
        logits, stride = head(pyramid), head.stride
        labels = semantic_labels(targets, logits.shape[2] * stride, logits.shape[3] * stride)
        if self.lambda_panoptic > 0:
            # The pixel in the middle of each stride x stride square.
            qualities.append(stuff_quality(logits, labels[:, stride // 2 :: stride, stride // 2 :: stride]))
        return {"loss_semantic": losses.semantic_loss(logits, labels, stride, labelled_pixels)}


def predict_masks(
    model: PanopticFPN,
    features: Sequence[Tensor],
    targets: Sequence[Target],
    sampled: Sequence[SampledBoxes],
) -> losses.Masks:
    """Predicts the masks of the sampled objects for their true classes, and crops their targets."""
    boxes = [image.boxes[: image.positives] for image in sampled]
    classes = torch.cat([image.classes[: image.positives] for image in sampled])
    counted = (classes >= 0) & (classes < model.config.num_things)
    logits = model.mask_head(features, boxes, classes.clamp(0, model.config.num_things - 1))
    truth, instances, before = [], [], 0
    for target, image, image_boxes in zip(targets, sampled, boxes, strict=True):
        instance = image.instance[: image.positives]
        truth.append(mask_targets(target, image_boxes, instance, logits.shape[-1]))
        instances.append(instance + before)
        before += len(target.boxes)
    return losses.Masks(logits, torch.cat(truth).to(logits), counted, torch.cat(instances))


def total(found: dict[str, Tensor]) -> Tensor:
    """Returns the sum of the losses, which is differentiated."""
    return torch.stack(list(found.values())).sum()
