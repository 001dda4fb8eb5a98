"""A network together with its losses: what an optimiser, or DistributedDataParallel, is put around."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from panfpn_fast.data.sample import Target
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training import losses

INSTANCE_LOSSES = ("loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask")
SEMANTIC_LOSSES = ("loss_semantic",)


class TrainingNetwork(nn.Module):
    """Computes the losses of a batch.

    Args:
        model: The network.
        lambda_instance: Weight of the instance branch's losses (the paper's lambda_i).
        lambda_semantic: Weight of the semantic branch's loss (lambda_s).

    Note:
        L = lambda_i (L_cls + L_box + L_mask + L_rpn) + lambda_s L_sem (Kirillov et al. 2019, section 3.2). No host sync
        on CUDA: the number of anchors, proposals and masks that are looked at is fixed.
    """

    def __init__(
        self, model: PanopticFPN, lambda_instance: float = 1.0, lambda_semantic: float = 0.5
    ) -> None:
        super().__init__()
        self.model = model
        self.lambda_instance = lambda_instance
        self.lambda_semantic = lambda_semantic

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
            those of the branches asked for.

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
        if "instance" in branches:
            found |= self._instance_losses(features["instance"], batch.sizes, targets, seeds)
        if "semantic" in branches:
            found["loss_semantic"] = losses.semantic_loss(model, features["semantic"], targets)
        weights = dict.fromkeys(INSTANCE_LOSSES, self.lambda_instance)
        weights |= dict.fromkeys(SEMANTIC_LOSSES, self.lambda_semantic)
        return {name: weights[name] * loss for name, loss in found.items()}

    def _instance_losses(
        self,
        features: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
        seeds: Sequence[int],
    ) -> dict[str, Tensor]:
        model, things = self.model, self.model.config.num_things
        logits, deltas = model.rpn(features)
        anchors = model.rpn.anchors(features)
        found = losses.rpn_losses(model.rpn, anchors, logits, deltas, targets, seeds)
        boxes, valid = losses.propose(model.rpn, anchors, logits, deltas, sizes)
        sampled = [
            # Other random numbers than the anchors'.
            losses.sample_boxes(image_boxes, image_valid, target, things, ~seed)
            for image_boxes, image_valid, target, seed in zip(boxes, valid, targets, seeds, strict=True)
        ]
        class_logits, box_deltas = model.box_head(features, [image.boxes for image in sampled])
        found |= losses.box_losses(class_logits, box_deltas, sampled, things, model.box_head.weights)
        found["loss_mask"] = losses.mask_loss(model, features, targets, sampled)
        return found


def total(found: dict[str, Tensor]) -> Tensor:
    """The sum that is differentiated."""
    return torch.stack(list(found.values())).sum()
