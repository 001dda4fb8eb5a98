"""A network together with its losses: what an optimiser, or DistributedDataParallel, is put around."""

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

INSTANCE_LOSSES = ("loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask")
SEMANTIC_LOSSES = ("loss_semantic",)


class TrainingNetwork(nn.Module):
    """Computes the losses of a batch.

    Args:
        model: The network.
        lambda_instance: Weight of the instance branch's losses (the paper's lambda_i).
        lambda_semantic: Weight of the semantic branch's loss (lambda_s).
        lambda_panoptic: Weight of :mod:`panfpn_fast.training.panoptic_quality_loss`; 0: it is not computed.
        rpn_samples: Anchors of each image that the region proposal network learns from.
        box_samples: Proposals of each image that the heads learn from.

    Note:
        L = lambda_i (L_cls + L_box + L_mask + L_rpn) + lambda_s L_sem (Kirillov et al. 2019, section 3.2). No host sync
        on CUDA: the number of anchors, proposals and masks that are looked at is fixed.
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
    ) -> dict[str, Tensor]:
        """Computes the weighted losses.

        Args:
            images: RGB [3, h, w], values from 0 to 255; they may differ in size.
            targets: One for each, on the network's device.
            seeds: One for each, of the sampling of anchors and proposals.
            branches: Which ones learn in this step, of those that the network has.

        Returns:
            Scalars whose sum is the loss: loss_rpn_cls, loss_rpn_box, loss_cls, loss_box, loss_mask, loss_semantic, or
            those of the branches asked for; and loss_panoptic of these, if it has a weight.

        Raises:
            ValueError: The network has none of the branches.
        """
        model = self.model
        branches = [branch for branch in branches if branch in model.config.tasks]
        if not branches:
            raise ValueError(f"branches: expected some of the network's, {model.config.tasks}, got none")
        batch = model.prepare(images)
        features = model.features(batch.images, branches)
        found: dict[str, Tensor] = {}
        parts: list[ClassQuality] = []
        if "instance" in branches:
            pyramid = features["instance"]
            sampled = self._sample(pyramid, batch.sizes, targets, seeds, found)
            class_logits, box_deltas = model.box_head(pyramid, [image.boxes for image in sampled])
            things = model.config.num_things
            found |= losses.box_losses(class_logits, box_deltas, sampled, things, model.box_head.weights)
            masks = losses.predict_masks(model, pyramid, targets, sampled)
            found["loss_mask"] = losses.mask_loss(masks)
            if self.lambda_panoptic > 0:
                classes = torch.cat([target.classes for target in targets])
                parts.append(thing_quality(*masks, classes, things))
        if "semantic" in branches:
            logits, stride = model.semantic_head(features["semantic"]), model.semantic_head.stride
            labels = losses.semantic_labels(targets, logits.shape[2] * stride, logits.shape[3] * stride)
            found["loss_semantic"] = losses.semantic_loss(logits, labels, stride)
            if self.lambda_panoptic > 0:
                # The pixel in the middle of each cell.
                parts.append(stuff_quality(logits, labels[:, stride // 2 :: stride, stride // 2 :: stride]))
        if parts:
            found["loss_panoptic"] = panoptic_quality_loss(parts)
        weights = dict.fromkeys(INSTANCE_LOSSES, self.lambda_instance)
        weights |= dict.fromkeys(SEMANTIC_LOSSES, self.lambda_semantic)
        weights["loss_panoptic"] = self.lambda_panoptic
        return {name: weights[name] * loss for name, loss in found.items()}

    def _sample(
        self,
        features: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
        seeds: Sequence[int],
        found: dict[str, Tensor],
    ) -> list[losses.Sampled]:
        """Chooses boxes for the heads, and adds the RPN's losses to those found."""
        model, things = self.model, self.model.config.num_things
        logits, deltas = model.rpn(features)
        anchors = model.rpn.anchors(features)
        found |= losses.rpn_losses(model.rpn, anchors, logits, deltas, targets, seeds, self.rpn_samples)
        boxes, valid = losses.propose(model.rpn, anchors, logits, deltas, sizes)
        return [
            # Other random numbers than the anchors'.
            losses.sample_boxes(image_boxes, image_valid, target, things, ~seed, self.box_samples)
            for image_boxes, image_valid, target, seed in zip(boxes, valid, targets, seeds, strict=True)
        ]


def total(found: dict[str, Tensor]) -> Tensor:
    """The sum that is differentiated."""
    return torch.stack(list(found.values())).sum()
