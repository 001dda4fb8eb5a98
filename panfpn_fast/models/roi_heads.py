"""The instance branch's heads (Mask R-CNN, He et al. 2017): boxes with classes, and a mask for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models.boxes import clip_boxes, decode_boxes
from panfpn_fast.models.config import FPN_STRIDES, PanopticFPNConfig
from panfpn_fast.models.fusion import conv2d
from panfpn_fast.models.layers import at_least_float32, init_msra, init_normal, init_xavier

_SCALES = [1.0 / stride for stride in FPN_STRIDES[:4]]


class Detections(NamedTuple):
    """One image's detections by descending score."""

    boxes: Tensor  # [N, 4], pixels of the network's input
    scores: Tensor  # [N]
    classes: Tensor  # [N], int64


def _pool(features: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
    """Pools every box from the level that suits its size, out of P2..P5."""
    pooled: Tensor = ops.multiscale_roi_align(
        list(features[:4]), list(boxes), size, _SCALES, sampling_ratio=0, aligned=True
    )
    return pooled


class BoxHead(nn.Module):
    """Classifies proposals and refines their boxes, class by class or for all classes alike.

    Args:
        config: the network's settings.
    """

    def __init__(self, config: PanopticFPNConfig) -> None:
        super().__init__()
        self.pool_size = config.box_pool_size
        self.weights = config.box_weights
        self.score_threshold = config.score_threshold
        self.nms_threshold = config.nms_threshold
        self.class_agnostic_nms = config.class_agnostic_nms
        self.clamp_shrinking = config.clamp_shrinking
        self.detections_per_image = config.detections_per_image
        hidden = config.box_head_channels
        self.fc1 = nn.Linear(config.branch_channels * config.box_pool_size**2, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.class_logits = nn.Linear(hidden, config.num_things + 1)
        self.box_deltas = nn.Linear(hidden, 4 if config.class_agnostic_boxes else config.num_things * 4)
        self.fc1.apply(init_xavier)
        self.fc2.apply(init_xavier)
        self.class_logits.apply(partial(init_normal, std=0.01))
        self.box_deltas.apply(partial(init_normal, std=0.001))

    def forward(self, features: Sequence[Tensor], proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Predicts for every proposal of every image.

        Args:
            features: P2..P5 (P6 may follow), each [N, C, h, w].
            proposals: per image, [L, 4].

        Returns:
            Class logits [K, things + 1], the background last, and deltas [K, things, 4] ([K, 1, 4] for all classes
            alike), for the K proposals of all images in order, in float32 (float64 for float64 features).
        """
        x = _pool(features, proposals, self.pool_size).flatten(1)
        x = F.relu_(self.fc1(x))
        x = F.relu_(self.fc2(x))
        logits: Tensor = self.class_logits(x)
        deltas: Tensor = self.box_deltas(x)
        dtype = at_least_float32(logits.dtype)
        return logits.to(dtype), deltas.to(dtype).reshape(-1, deltas.shape[1] // 4, 4)

    def detect(
        self, logits: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Turns predictions into detections.

        Args:
            logits: [K, things + 1] as :meth:`forward` returns them.
            deltas: [K, things, 4] or [K, 1, 4].
            proposals: per image, [L, 4].
            sizes: each image's height and width without padding.

        Returns:
            Per image, at most ``detections_per_image`` detections.
        """
        scores = logits.softmax(dim=1)
        boxes = decode_boxes(deltas, torch.cat(list(proposals))[:, None], self.weights, self.clamp_shrinking)
        counts = [len(p) for p in proposals]
        return [
            self._select(image_boxes, image_scores, size)
            for image_boxes, image_scores, size in zip(
                torch.split(boxes, counts), torch.split(scores, counts), sizes, strict=True
            )
        ]

    def _select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """Each class of a proposal that scores high enough is a candidate; NMS follows, within classes or over all."""
        finite = boxes.isfinite().flatten(1).all(dim=1) & scores.isfinite().all(dim=1)
        scores = scores[:, :-1]
        boxes = boxes.expand(-1, scores.shape[1], -1)
        rows, classes = ((scores > self.score_threshold) & finite[:, None]).nonzero(as_tuple=True)
        candidates = clip_boxes(boxes[rows, classes], size)
        candidate_scores = scores[rows, classes]
        groups = torch.zeros_like(classes) if self.class_agnostic_nms else classes
        keep = ops.batched_nms(candidates, candidate_scores, groups, self.nms_threshold)
        keep = keep[: self.detections_per_image]
        return Detections(candidates[keep], candidate_scores[keep], classes[keep])


class MaskHead(nn.Module):
    """Predicts a mask, twice the pooled size, inside each detected box.

    Args:
        config: the network's settings.
    """

    def __init__(self, config: PanopticFPNConfig) -> None:
        super().__init__()
        self.pool_size = config.mask_pool_size
        channels = config.mask_head_channels
        self.convs = nn.ModuleList()
        for i in range(config.mask_head_convs):
            self.convs.append(nn.Conv2d(channels if i else config.branch_channels, channels, 3, padding=1))
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.class_agnostic = config.class_agnostic_masks
        self.logits = nn.Conv2d(channels, 1 if self.class_agnostic else config.num_things, 1)
        self.apply(init_msra)
        self.logits.apply(partial(init_normal, std=0.001))

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor], classes: Tensor) -> Tensor:
        """Predicts the mask logits of one class per box.

        Args:
            features: P2..P5 (P6 may follow), each [N, C, h, w].
            boxes: per image, [L, 4]; K in all.
            classes: int64 [K], the class of each box; class-agnostic masks do not depend on it.

        Returns:
            [K, 28, 28] in float32 (float64 for float64 features).
        """
        x = _pool(features, boxes, self.pool_size)
        for conv in self.convs:
            x = conv2d(conv, x, relu=True)
        x = F.relu_(self.deconv(x))  # [K, C, 28, 28]
        # The last 1x1 convolution for the one class that is wanted, instead of for all of them.
        rows = torch.zeros_like(classes) if self.class_agnostic else classes
        weight = self.logits.weight.flatten(1)[rows]  # [K, C]
        bias = self.logits.bias[rows] if self.logits.bias is not None else weight.new_zeros(len(weight))
        logits = torch.baddbmm(bias[:, None, None], weight[:, None], x.flatten(2))  # [K, 1, 28 * 28]
        return logits.reshape(len(x), x.shape[2], x.shape[3]).to(at_least_float32(logits.dtype))
