"""The heads of the instance branch (Mask R-CNN, He et al. 2017): boxes with classes, and a mask for each box."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models.boxes import Size, clip_boxes, decode_boxes
from panfpn_fast.models.config import FPN_STRIDES, PanopticFPNConfig
from panfpn_fast.models.conv_fusion import conv2d, is_hooked
from panfpn_fast.models.layers import at_least_float32, init_msra, init_normal, init_xavier

_SCALES = [1.0 / stride for stride in FPN_STRIDES[:4]]

# Boxes per pass of the mask head. A CPU takes as long for many small passes as for one, a GPU does not.
_CPU_GROUP, _GPU_GROUP = 16, 64


class Detections(NamedTuple):
    """The detections in one image, by descending score."""

    boxes: Tensor  # [N, 4], pixels of the network's input
    scores: Tensor  # [N]
    classes: Tensor  # [N], int64


class PaddedDetections(NamedTuple):
    """The detections in a batch: for each image by descending score, then zeros."""

    boxes: Tensor  # [N, D, 4], pixels of the network's input
    scores: Tensor  # [N, D]
    classes: Tensor  # [N, D], int64
    found: Tensor  # [N, D], bool: whether the row is a detection
    overflow: Tensor  # [N], bool: whether candidates beyond the limit could have been detections


def _pool(features: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
    """Pools every box from the level of P2 to P5 that fits its size."""
    pooled: Tensor = ops.multiscale_roi_align(
        list(features[:4]), list(boxes), size, _SCALES, sampling_ratio=0, aligned=True
    )
    return pooled


class BoxHead(nn.Module):
    """Classifies proposals and refines their boxes, with deltas per class or for all classes.

    Args:
        config: The settings of the network.
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
        """Predicts class logits and deltas for every proposal.

        Args:
            features: P2 to P5, each [N, C, h, w]; P6 may follow.
            proposals: Boxes [L, 4] of each image.

        Returns:
            Class logits [K, things + 1], background last, and deltas [K, things, 4] ([K, 1, 4] if class-agnostic), for
            the K proposals of all images in order, in float32 (float64 for float64 features).
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
        """Converts predictions to detections.

        Args:
            logits: Class logits [K, things + 1] from `forward`.
            deltas: Deltas [K, things, 4] or [K, 1, 4] from `forward`.
            proposals: Boxes [L, 4] of each image.
            sizes: Height and width of each image without padding.

        Returns:
            At most `detections_per_image` detections for each image.
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
        size: Size,
        max_candidates: int,
    ) -> PaddedDetections:
        """Detects as `detect` does, with static shapes and without a host sync.

        Args:
            logits: Class logits [N * L, things + 1] from `forward`.
            deltas: Deltas [N * L, things, 4] or [N * L, 1, 4] from `forward`.
            proposals: Boxes [N, L, 4].
            proposed: Bool [N, L], true for proposals and false for padding.
            size: Height and width of all images without padding, or an integer tensor [N, 1, 2] with those of each.
            max_candidates: Largest number of (proposal, class) pairs per image that enter NMS; the best are selected.

        Returns:
            `detections_per_image` rows for every image.
        """
        batch, rows = proposed.shape
        scores = logits.softmax(dim=1)
        boxes = decode_boxes(deltas, proposals.flatten(0, 1)[:, None], self.weights, self.clamp_shrinking)
        usable = _finite(boxes, scores) & proposed.flatten()
        scores = scores[:, :-1]
        things, kinds = scores.shape[1], boxes.shape[1]
        wanted = ((scores > self.score_threshold) & usable[:, None]).reshape(batch, rows * things)
        # Probabilities sum to 1, so at most this many classes of a proposal exceed the threshold. The margin of 0.001
        # exceeds the rounding error of softmax.
        most = things if self.score_threshold == 0 else int(1.001 / self.score_threshold)
        limit = min(rows * min(things, most), max_candidates)
        # Unwanted entries get -1, which is below any probability.
        ranked = scores.reshape(batch, rows * things).masked_fill(~wanted, -1)
        # Restore the order of `detect`, which decides between equal scores.
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
        # Only better candidates can suppress a candidate. Omitted candidates therefore do not matter if the number of
        # detections is reached and all detections score higher.
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
        """Selects candidates by score, then applies NMS within classes or over all classes."""
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
    """Returns whether boxes [K, C, 4] and scores [K, D] of each proposal are all finite, as bool [K]."""
    return boxes.isfinite().flatten(1).all(dim=1) & scores.isfinite().all(dim=1)


def _upsampled_logits(x: Tensor, deconv: nn.ConvTranspose2d, weight: Tensor, bias: Tensor) -> Tensor:
    """Applies a 2x2 transposed convolution with stride 2, ReLU and one row of a 1x1 convolution.

    The four outputs of a pixel stay together until they have a single channel, so nothing wider is rearranged.

    Args:
        x: [K, C, h, w].
        deconv: The transposed convolution, with D output channels.
        weight: Rows of the 1x1 convolution, [K, D].
        bias: [K, 1, 1].

    Returns:
        [K, 2 * h, 2 * w].
    """
    boxes, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a view in channels-last
    product = deconv.weight.permute(0, 2, 3, 1).flatten(1)  # [C, 2 * 2 * D]
    shift = product.new_zeros(weight.shape[1]) if deconv.bias is None else deconv.bias
    hidden = F.relu_(torch.addmm(shift.repeat(4), pixels, product))
    hidden = hidden.reshape(boxes, height * width * 4, weight.shape[1])
    logits = torch.baddbmm(bias, hidden, weight[:, :, None]).reshape(boxes, height, width, 2, 2)
    return logits.transpose(2, 3).reshape(boxes, 2 * height, 2 * width)


class MaskHead(nn.Module):
    """Predicts a mask of twice the pooled size inside each detected box.

    Args:
        config: The settings of the network.
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
            features: P2 to P5, each [N, C, h, w]; P6 may follow.
            boxes: Boxes [L, 4] of each image, K in total.
            classes: Class of each box, int64 [K]. Class-agnostic masks do not depend on it.

        Returns:
            Mask logits [K, 28, 28] in float32 (float64 for float64 features).
        """
        x = _pool(features, boxes, self.pool_size)
        for conv in self.convs:
            x = conv2d(conv, x, relu=True)
        # The last 1x1 convolution is computed for the class of each box alone.
        rows = torch.zeros_like(classes) if self.class_agnostic else classes
        weight = self.logits.weight.flatten(1)[rows]  # [K, C]
        bias = self.logits.bias[rows] if self.logits.bias is not None else weight.new_zeros(len(weight))
        bias = bias[:, None, None]
        if self._trains_by_products(x):
            logits = _upsampled_logits(x, self.deconv, weight, bias)
        else:
            x = F.relu_(self.deconv(x))  # [K, C, 28, 28]
            logits = torch.baddbmm(bias, weight[:, None], x.flatten(2))  # [K, 1, 28 * 28]
            logits = logits.reshape(len(x), x.shape[2], x.shape[3])
        return logits.to(at_least_float32(logits.dtype))

    def _trains_by_products(self, x: Tensor) -> bool:
        """Whether matrix products replace the transposed convolution, whose gradient is slow on the CPU."""
        deconv = self.deconv
        return (
            torch.is_grad_enabled()
            and x.device.type == "cpu"
            and type(deconv) is nn.ConvTranspose2d
            and not is_hooked(deconv)
        )

    def predict(
        self, features: Sequence[Tensor], detections: Sequence[Detections], counts: Sequence[int]
    ) -> list[Tensor]:
        """Predicts the masks of the first detections of each image.

        Args:
            features: P2 to P5, each [N, C, h, w]; P6 may follow.
            detections: The detections of each image.
            counts: The number of masks to predict for each image.

        Returns:
            Mask probabilities [count, 28, 28] of each image.

        Note:
            The head runs on groups of boxes. A group is computed as a whole if one of its masks is wanted, so a mask
            has the same bits for every count and every batch.
        """
        size = _CPU_GROUP if features[0].device.type == "cpu" else _GPU_GROUP
        masks = []
        for i, (found, count) in enumerate(zip(detections, counts, strict=True)):
            levels = [level[i : i + 1] for level in features]
            # Without masks, one pass without boxes gives a tensor of the right shape and dtype.
            starts = range(0, count, size) if count else (len(found.boxes),)
            groups = [slice(start, start + size) for start in starts]
            passes = [self(levels, [found.boxes[group]], found.classes[group]).sigmoid() for group in groups]
            masks.append(torch.cat(passes)[:count])
        return masks
