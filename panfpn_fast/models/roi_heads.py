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


class PaddedDetections(NamedTuple):
    """A batch's detections, each image's by descending score, and zeros behind them."""

    boxes: Tensor  # [N, D, 4], pixels of the network's input
    scores: Tensor  # [N, D]
    classes: Tensor  # [N, D], int64
    found: Tensor  # [N, D], bool: a detection
    overflow: Tensor  # [N], bool: candidates that were too many to be looked at could have been detections


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

    def detect_padded(
        self,
        logits: Tensor,
        deltas: Tensor,
        proposals: Tensor,
        proposed: Tensor,
        size: tuple[int, int],
        max_candidates: int,
    ) -> PaddedDetections:
        """Detects as :meth:`detect` does, in shapes that do not depend on what there is; no host sync.

        Args:
            logits: [N * L, things + 1] as :meth:`forward` returns them.
            deltas: [N * L, things, 4] or [N * L, 1, 4].
            proposals: [N, L, 4].
            proposed: bool [N, L], which of them are proposals and no padding.
            size: every image's height and width without padding.
            max_candidates: how many of the classes of an image's proposals may enter NMS, the best ones.

        Returns:
            Room for ``detections_per_image`` of every image.
        """
        batch, rows = proposed.shape
        scores = logits.softmax(dim=1)
        boxes = decode_boxes(deltas, proposals.flatten(0, 1)[:, None], self.weights, self.clamp_shrinking)
        usable = _finite(boxes, scores) & proposed.flatten()
        scores = scores[:, :-1]
        things, kinds = scores.shape[1], boxes.shape[1]
        wanted = ((scores > self.score_threshold) & usable[:, None]).reshape(batch, rows * things)
        # Probabilities add up to one, so that no more classes of a proposal than this are above the threshold; a part
        # in a thousand is more than softmax's rounding.
        most = things if self.score_threshold == 0 else int(1.001 / self.score_threshold)
        limit = min(rows * min(things, most), max_candidates)
        # No probability is as low as what is not wanted.
        ranked = scores.reshape(batch, rows * things).masked_fill(~wanted, -1)
        # Back in the order of `detect`, because it decides between equal scores.
        index = ranked.topk(limit, dim=1, sorted=False).indices.sort(dim=1).values
        scores, valid = ranked.gather(1, index), wanted.gather(1, index)
        classes = index % things
        places = index // things * kinds + (classes if kinds > 1 else 0)
        boxes = boxes.reshape(batch, rows * kinds, 4).gather(1, places[..., None].expand(-1, -1, 4))
        boxes = clip_boxes(boxes, size).masked_fill(~valid[..., None], 0)
        groups = torch.zeros_like(classes) if self.class_agnostic_nms else classes
        keep, _ = ops.nms_padded(boxes, scores, groups, self.nms_threshold, self.detections_per_image)
        index = keep.clamp(min=0)
        found = (keep >= 0) & valid.gather(1, index)
        kept = scores.gather(1, index)
        # Whether NMS lets a candidate pass depends on better ones alone. So none that was left out matters if there are
        # enough detections, all of them better than it.
        least = torch.where(found.all(dim=1), kept[:, -1], -1)
        overflow = (wanted.sum(dim=1) > limit) & (least <= scores.amin(dim=1))
        return PaddedDetections(
            boxes.gather(1, index[..., None].expand(-1, -1, 4)).masked_fill(~found[..., None], 0),
            kept.masked_fill(~found, 0),
            classes.gather(1, index).masked_fill(~found, 0),
            found,
            overflow,
        )

    def _select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """Each class of a proposal that scores high enough is a candidate; NMS follows, within classes or over all."""
        finite = _finite(boxes, scores)
        scores = scores[:, :-1]
        boxes = boxes.expand(-1, scores.shape[1], -1)
        rows, classes = ((scores > self.score_threshold) & finite[:, None]).nonzero(as_tuple=True)
        candidates = clip_boxes(boxes[rows, classes], size)
        candidate_scores = scores[rows, classes]
        groups = torch.zeros_like(classes) if self.class_agnostic_nms else classes
        keep = ops.batched_nms(candidates, candidate_scores, groups, self.nms_threshold)
        keep = keep[: self.detections_per_image]
        return Detections(candidates[keep], candidate_scores[keep], classes[keep])


def _finite(boxes: Tensor, scores: Tensor) -> Tensor:
    """Whether all that was predicted for a proposal is finite: bool [K] of boxes [K, C, 4] and scores [K, D]."""
    return boxes.isfinite().flatten(1).all(dim=1) & scores.isfinite().all(dim=1)


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
