"""Region proposal network (Ren et al. 2015) over a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models.boxes import Size, clip_boxes, decode_boxes, nonempty
from panfpn_fast.models.config import FPN_STRIDES, PanopticFPNConfig
from panfpn_fast.models.conv_fusion import conv1x1_of_both, conv2d
from panfpn_fast.models.layers import ExactConstants, at_least_float32, init_normal


def cell_anchors(size: float, ratios: Sequence[float]) -> list[list[float]]:
    """Returns the anchors of one position, centred on (0, 0).

    Each anchor has the area `size**2` and one of `ratios` as height / width. Size 32 and ratio 1 give
    (-16, -16, 16, 16).
    """
    anchors = []
    for ratio in ratios:
        width = math.sqrt(size**2 / ratio)
        height = ratio * width
        anchors.append([-width / 2, -height / 2, width / 2, height / 2])
    return anchors


def grid_anchors(cell: Tensor, shape: tuple[int, int], stride: int) -> Tensor:
    """Places the anchors of one position on every position of a feature map.

    The centre of the first position is the corner (0, 0) of the image, as in detectron2 (offset 0).

    Args:
        cell: Anchors [A, 4] around (0, 0).
        shape: Height and width of the map.
        stride: Distance of positions in pixels of the image.

    Returns:
        Anchors [height * width * A, 4] in the order row, column, anchor, in the dtype and on the device of `cell`.
    """
    height, width = shape
    y = torch.arange(height, dtype=cell.dtype, device=cell.device) * stride
    x = torch.arange(width, dtype=cell.dtype, device=cell.device) * stride
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack((shift_x, shift_y, shift_x, shift_y), dim=-1)  # [H, W, 4]
    return (shifts[:, :, None] + cell).reshape(-1, 4)


class RPN(ExactConstants):
    """Predicts a score and deltas for every anchor.

    Args:
        config: The settings of the network.
    """

    cells: Tensor  # [levels, A, 4]
    box_weights = (1.0, 1.0, 1.0, 1.0)

    def __init__(self, config: PanopticFPNConfig) -> None:
        super().__init__()
        self.pre_nms_topk = config.rpn_pre_nms_topk
        self.post_nms_topk = config.rpn_post_nms_topk
        self.nms_threshold = config.rpn_nms_threshold
        self.by_probability = config.rpn_ranking == "probability"
        self.clamp_shrinking = config.clamp_shrinking
        anchors = len(config.anchor_ratios)
        self.conv = nn.Conv2d(config.branch_channels, config.branch_channels, 3, padding=1)
        self.objectness = nn.Conv2d(config.branch_channels, anchors, 1)
        self.deltas = nn.Conv2d(config.branch_channels, anchors * 4, 1)
        self.apply(partial(init_normal, std=0.01))
        self.add_constant("cells", [cell_anchors(size, config.anchor_ratios) for size in config.anchor_sizes])

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predicts scores and deltas on every level.

        Args:
            features: P2 to P6, each [N, C, h, w].

        Returns:
            Objectness logits [N, h * w * A] and deltas [N, h * w * A, 4] per level, in the order of `grid_anchors`,
            in float32 (float64 for float64 features).
        """
        logits, deltas = [], []
        for feature in features:
            hidden = conv2d(self.conv, feature, relu=True)
            # [N, A, h, w] and [N, A * 4, h, w]
            objectness, moves = conv1x1_of_both(self.objectness, self.deltas, hidden)
            dtype = at_least_float32(objectness.dtype)
            logits.append(objectness.permute(0, 2, 3, 1).flatten(1).to(dtype))
            deltas.append(moves.permute(0, 2, 3, 1).reshape(len(moves), -1, 4).to(dtype))
        return logits, deltas

    def anchors(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns the anchors [h * w * A, 4] of each level for the shapes of the feature maps."""
        return [
            grid_anchors(cell, (feature.shape[-2], feature.shape[-1]), stride)
            for cell, feature, stride in zip(self.cells, features, FPN_STRIDES, strict=True)
        ]

    def propose(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Converts predictions to proposals.

        The best anchors of each level are decoded and clipped to the image. NMS then suppresses within each level.

        Args:
            anchors: Anchors [M, 4] of each level.
            logits: Objectness logits [N, M] of each level.
            deltas: Deltas [N, M, 4] of each level.
            sizes: Height and width of each image without padding.

        Returns:
            Boxes [at most `rpn_post_nms_topk`, 4] of each image, by descending score.
        """
        boxes, scores, levels = self._candidates(anchors, logits, deltas, self.pre_nms_topk)
        return [
            self._select(image_boxes, image_scores, levels, size)
            for image_boxes, image_scores, size in zip(boxes, scores, sizes, strict=True)
        ]

    def propose_padded(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]] | Tensor,
        pre_nms_topk: int | None = None,
        post_nms_topk: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Proposes as `propose` does, with static shapes and without a host sync.

        Args:
            anchors: Anchors [M, 4] of each level.
            logits: Objectness logits [N, M] of each level.
            deltas: Deltas [N, M, 4] of each level.
            sizes: Height and width of each image without padding, or an integer tensor [N, 2].
            pre_nms_topk: Number of best anchors per level that enter NMS; None for the configuration's.
            post_nms_topk: Largest number L of proposals per image; None for the configuration's.

        Returns:
            Boxes [N, L, 4], for each image the proposals in the order of `propose`, then zeros; and bool [N, L], true
            for proposals.
        """
        boxes, scores, levels = self._candidates(anchors, logits, deltas, pre_nms_topk or self.pre_nms_topk)
        per_image = [_clip(*image) for image in zip(boxes, scores, sizes, strict=True)]
        clipped, valid = (torch.stack(parts) for parts in zip(*per_image, strict=True))
        clipped = clipped.masked_fill(~valid[..., None], 0)
        # Invalid boxes come last and have no area, so they suppress nothing.
        keep, _ = ops.nms_padded(
            clipped,
            scores.masked_fill(~valid, -torch.inf),
            levels.expand(len(scores), -1),
            self.nms_threshold,
            post_nms_topk or self.post_nms_topk,
        )
        index = keep.clamp(min=0)
        proposed = (keep >= 0) & valid.gather(1, index)
        found = clipped.gather(1, index[..., None].expand(-1, -1, 4))
        return found.masked_fill(~proposed[..., None], 0), proposed

    def _candidates(
        self, anchors: Sequence[Tensor], logits: Sequence[Tensor], deltas: Sequence[Tensor], topk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decodes the best anchors of each level; returns boxes [N, K, 4], scores [N, K] and levels [K]."""
        moves, places, scores, levels = [], [], [], []
        for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            if self.by_probability:
                logit = logit.sigmoid()
            score, index = logit.topk(min(topk, logit.shape[1]), dim=1)  # [N, k]
            moves.append(delta.gather(1, index[..., None].expand(-1, -1, 4)))
            places.append(anchor[index])
            scores.append(score)
            levels.append(torch.full_like(score[0], level, dtype=torch.int64))
        boxes = decode_boxes(
            torch.cat(moves, dim=1), torch.cat(places, dim=1), self.box_weights, self.clamp_shrinking
        )
        return boxes, torch.cat(scores, dim=1), torch.cat(levels)

    def _select(self, boxes: Tensor, scores: Tensor, levels: Tensor, size: tuple[int, int]) -> Tensor:
        """Drops boxes that are empty or not finite, then applies NMS within each level."""
        clipped, valid = _clip(boxes, scores, size)
        clipped, scores, levels = clipped[valid], scores[valid], levels[valid]
        keep = ops.batched_nms(clipped, scores, levels, self.nms_threshold)
        return clipped[keep[: self.post_nms_topk]]


def _clip(boxes: Tensor, scores: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Clips boxes [..., 4] to the image; returns them and whether each is valid: finite, scored and not empty."""
    clipped = clip_boxes(boxes, size)
    # Checked before clipping, which would hide an infinite coordinate.
    return clipped, boxes.isfinite().all(dim=-1) & scores.isfinite() & nonempty(clipped)
