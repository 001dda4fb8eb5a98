"""The Panoptic FPN in eager PyTorch, with torchvision's ops and detectron2's algorithms.

The algorithms follow the behaviour of detectron2's proposal_utils.py, fast_rcnn.py, mask_head.py and panoptic_fpn.py:
all anchors are decoded before the best are selected, NMS is torchvision's `batched_nms`, regions are pooled level by
level, the mask head predicts the masks of every class, and logits are upsampled to the image before the arg max.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.models import PanopticFPN, PanopticFPNConfig
from panfpn_fast.models.boxes import clip_boxes, decode_boxes, nonempty
from panfpn_fast.models.fpn import FPN
from panfpn_fast.models.outputs import InstanceOutput, PanopticOutput
from panfpn_fast.models.panoptic_fpn import Wanted
from panfpn_fast.models.roi_heads import BoxHead, Detections, MaskHead
from panfpn_fast.models.rpn import RPN
from panfpn_fast.models.semantic_head import SemanticHead
from panfpn_fast.ops import PanopticSegments

from ..harness.inputs import PYRAMID_SCALES
from ..harness.peers import detectron2_merge, detectron2_pooler, in_float32, torchvision_ops
from .eager_head import eager_head


def _pool(features: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
    pooler = detectron2_pooler if features[0].dtype == torch.float32 else in_float32(detectron2_pooler)
    return pooler(features[:4], boxes, size, PYRAMID_SCALES)


class EagerFPN(FPN):
    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        merged = [self.lateral[name](c) for name, c in zip(self.lateral, features, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            merged[level] = merged[level] + F.interpolate(merged[level + 1], scale_factor=2.0, mode="nearest")
        outputs = [self.output[name](x) for name, x in zip(self.output, merged, strict=True)]
        return [*outputs, F.max_pool2d(outputs[-1], 1, stride=2)]


class EagerRPN(RPN):
    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = [], []
        for feature in features:
            hidden = F.relu(self.conv(feature))
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1).float())
            moves = self.deltas(hidden).permute(0, 2, 3, 1)
            deltas.append(moves.reshape(len(moves), -1, 4).float())
        return logits, deltas

    def propose(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        boxes, scores, levels = [], [], []
        for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            decoded = decode_boxes(delta, anchor.expand_as(delta), self.box_weights)
            score, index = logit.topk(min(self.pre_nms_topk, logit.shape[1]), dim=1)
            boxes.append(decoded[torch.arange(len(logit), device=logit.device)[:, None], index])
            scores.append(score)
            levels.append(torch.full_like(score[0], level, dtype=torch.int64))
        return [
            self._select(image_boxes, image_scores, torch.cat(levels), size)
            for image_boxes, image_scores, size in zip(
                torch.cat(boxes, dim=1), torch.cat(scores, dim=1), sizes, strict=True
            )
        ]

    def _select(self, boxes: Tensor, scores: Tensor, levels: Tensor, size: tuple[int, int]) -> Tensor:
        finite = boxes.isfinite().all(dim=1) & scores.isfinite()
        if not finite.all():
            boxes, scores, levels = boxes[finite], scores[finite], levels[finite]
        boxes = clip_boxes(boxes, size)
        keep = nonempty(boxes)
        if keep.sum().item() != len(boxes):
            boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        keep = torchvision_ops().batched_nms(boxes, scores, levels, self.nms_threshold)
        return boxes[keep[: self.post_nms_topk]]


class EagerBoxHead(BoxHead):
    def forward(self, features: Sequence[Tensor], proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.classify(_pool(features, proposals, self.pool_size).flatten(1))

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts class logits and deltas from pooled features [K, C * 49]."""
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        logits, deltas = self.class_logits(x).float(), self.box_deltas(x).float()
        return logits, deltas.reshape(-1, deltas.shape[1] // 4, 4)

    def _select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        finite = boxes.flatten(1).isfinite().all(dim=1) & scores.isfinite().all(dim=1)
        if not finite.all():
            boxes, scores = boxes[finite], scores[finite]
        scores = scores[:, :-1]
        boxes = clip_boxes(boxes, size)  # the boxes of all classes, before most are dropped
        mask = scores > self.score_threshold
        classes = mask.nonzero()[:, 1]
        boxes, scores = boxes[mask], scores[mask]
        keep = torchvision_ops().batched_nms(boxes, scores, classes, self.nms_threshold)
        keep = keep[: self.detections_per_image]
        return Detections(boxes[keep], scores[keep], classes[keep])


class EagerMaskHead(MaskHead):
    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor], classes: Tensor) -> Tensor:
        masks = self.all_masks(_pool(features, boxes, self.pool_size))
        return masks[torch.arange(len(masks), device=masks.device), classes].float()

    def all_masks(self, x: Tensor) -> Tensor:
        """Predicts the masks of all classes from pooled features [K, C, 14, 14]."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.logits(F.relu(self.deconv(x)))

    def predict(
        self, features: Sequence[Tensor], detections: Sequence[Detections], counts: Sequence[int]
    ) -> list[Tensor]:
        """Predicts the masks of all images in one pass, as detectron2 does; `counts` must be the detections'."""
        classes = torch.cat([found.classes for found in detections])
        masks = self(features, [found.boxes for found in detections], classes).sigmoid()
        return list(torch.split(masks, list(counts)))


class EagerSemanticHead(SemanticHead):
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return eager_head(self, list(features[:4]))

    def label(
        self, logits: Tensor, sizes: Sequence[tuple[int, int]], output_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        upsampled = F.interpolate(logits.float(), scale_factor=4.0, mode="bilinear", align_corners=False)
        labels = []
        for of_image, (height, width), size in zip(upsampled, sizes, output_sizes, strict=True):
            of_image = of_image[None, :, :height, :width]
            of_image = F.interpolate(of_image, size=size, mode="bilinear", align_corners=False)
            labels.append(of_image[0].argmax(dim=0))
        return labels


class EagerPanopticFPN(PanopticFPN):
    """Accepts the weights of a `PanopticFPN` and makes the same predictions."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        config: PanopticFPNConfig = self.config
        self.fpn = EagerFPN(self.backbone.out_channels, config.fpn_channels)
        self.rpn = EagerRPN(config)
        self.box_head = EagerBoxHead(config)
        self.mask_head = EagerMaskHead(config)
        self.semantic_head = EagerSemanticHead(config)

    def features(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, list[Tensor]]:
        """Computes the input of the branches with PyTorch's convolutions; the backbone would use `ops.conv3x3`."""
        with ops.winograd(False):
            return super().features(images, tasks)

    @torch.no_grad()
    def forward(
        self,
        images: Sequence[Tensor],
        output_sizes: Sequence[tuple[int, int]] | None = None,
        instances: Wanted = "all",
    ) -> list[PanopticOutput]:
        """Predicts images; computes the masks of all instances, as detectron2 does, whichever are wanted."""
        batch, sizes = self.prepare_outputs(images, output_sizes)
        features = self.features(batch.images)
        found = self.instances(features, batch.sizes, sizes)
        labels = self.labels(features, batch.sizes, sizes)
        return [self.merge(*each) for each in zip(found, labels, strict=True)]

    def merge(self, instances: InstanceOutput, semantic: Tensor) -> PanopticOutput:
        config = self.config
        panoptic, segments = detectron2_merge(
            instances.mask_probs,
            instances.boxes,
            instances.scores,
            instances.classes,
            semantic,
            (semantic.shape[0], semantic.shape[1]),
            config.instance_score_threshold,
            config.overlap_threshold,
            config.stuff_area_threshold,
        )
        return PanopticOutput(panoptic, _table(segments), *instances, semantic)


def _table(segments: list[tuple[bool, int]]) -> PanopticSegments:
    """Converts detectron2's list of segments to our table; scores, areas and instances are left at zero."""
    isthing = torch.tensor([thing for thing, _ in segments], dtype=torch.bool)
    label = torch.tensor([label for _, label in segments], dtype=torch.int64)
    id = torch.arange(1, len(segments) + 1, dtype=torch.int32)
    return PanopticSegments(
        id, isthing, label, torch.zeros(len(id)), torch.zeros_like(label), torch.zeros_like(label)
    )
