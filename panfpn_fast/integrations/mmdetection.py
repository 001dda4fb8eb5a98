"""Replacements for functions of mmdetection and of mmcv, which contains mmdetection's ops.

A panoptic prediction of mmdetection holds the panoptic map only. In mmdetection's own Panoptic FPN, the replacements
therefore neither paste masks nor upsample logits for it. `predict` of the network asks the mask head and the semantic
head to defer this work, and the fusion head computes the map from the deferred masks and logits.

Results equal those of mmdetection's own functions. Half-precision inputs therefore go to our ops only where mmdetection
computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.integrations._calls import (
    MAX_LABELS,
    Function,
    attempt,
    drop_negative_areas,
    integer_threshold,
    is_framework_class,
    pasting_agrees,
    score_order,
    served,
)
from panfpn_fast.integrations.patching import Framework, Replacement, servable

# mmcv's kernels compute positions in the dtype of the features.
_EXACT = (torch.float32, torch.float64)
# Attribute that marks a fusion head's function as one that accepts deferred masks and logits.
_FUSES_DEFERRED = "panfpn_fast_fuses_deferred"
# Whether the heads may defer pasting and upsampling, because only the fusion head uses their results.
_DEFER: ContextVar[bool] = ContextVar("panfpn_fast_defer", default=False)


@dataclass(frozen=True)
class _UnpastedMasks:
    """Masks that the mask head returns instead of pasted masks when pasting is deferred.

    Attributes:
        masks: Probabilities, float32 [N, M, M].
        boxes: [N, 4], in pixels of the image.
        size: (height, width) of the image.
        threshold: A pixel is set if its probability is at least this.
    """

    masks: Tensor
    boxes: Tensor
    size: tuple[int, int]
    threshold: float

    def __len__(self) -> int:
        return len(self.masks)

    def pasted(self) -> Tensor:
        return ops.paste_masks(self.masks, self.boxes, self.size, self.threshold)


@dataclass(frozen=True)
class _CoarseLogits:
    """Logits of one image that the semantic head returns instead of upsampled logits when upsampling is deferred.

    Attributes:
        logits: [1, C, H, W].
        padded: (height, width) of the network's input, which is padded.
        crop: (height, width) of the resized image within the input.
        size: (height, width) of the original image.
    """

    logits: Tensor
    padded: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]

    def upsampled(self) -> Tensor:
        padded = F.interpolate(self.logits, size=self.padded, mode="bilinear", align_corners=False)
        cropped = padded[:, :, : self.crop[0], : self.crop[1]]
        return F.interpolate(cropped, size=self.size, mode="bilinear", align_corners=False)[0]

    def labels(self) -> Tensor | None:
        """Returns the arg max [height, width] of the upsampled logits, or None if our op does not support them."""
        factor = _factor(self.logits.shape[2:], self.padded)
        if factor is None or self.logits.dtype != torch.float32 or not servable(self.logits):
            return None
        return ops.upsample_argmax(self.logits, factor, crop=self.crop, size=self.size)[0]


def _factor(small: Sequence[int], large: Sequence[int]) -> int | None:
    """Returns the integer factor from `small` to `large`, or None if height and width do not share one."""
    if min(small) < 1 or large[0] % small[0] or large[1] % small[1]:
        return None
    factor = large[0] // small[0]
    return factor if factor >= 1 and factor == large[1] // small[1] else None


def _float32(value: float) -> float:
    """Rounds a threshold to float32, as mmcv's compiled functions receive it."""
    return float(np.float32(value))


@served
def _nms(boxes: Any, scores: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """Replaces mmcv's nms; batched_nms calls it too, once for shifted boxes or, for many boxes, once per group."""
    names = ("iou_threshold", "offset", "score_threshold", "max_num")
    settings = {"offset": 0, "score_threshold": 0, "max_num": -1} | dict(zip(names, args, strict=False))
    settings |= kwargs
    if len(args) > len(names) or settings.keys() != set(names):
        return None
    if not _suits_nms(boxes, scores, **settings):
        return None
    return _suppress(boxes, scores, **settings)


def _suits_nms(boxes: Any, scores: Any, offset: int = 0, **_: Any) -> bool:
    return (
        servable(boxes, scores)
        and boxes.dtype == scores.dtype == torch.float32
        and boxes.shape == (*scores.shape, 4)
        and offset == 0
        and not torch.compiler.is_compiling()
    )


def _suppress(
    boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int, score_threshold: float, max_num: int
) -> tuple[Tensor, Tensor]:
    """Runs the steps of mmcv's nms with our op: filters by score, suppresses, keeps the first `max_num` boxes.

    Equal scores keep the order of mmcv's unstable sort.
    """
    order = scores.detach().sort(0, descending=True)[1]
    if score_threshold > 0:
        above = (scores > score_threshold).nonzero()[:, 0]
        order = above[scores.detach()[above].sort(0, descending=True)[1]]
    kept = order[ops.nms(boxes.detach()[order], scores.detach()[order], _float32(iou_threshold))]
    if max_num > 0:
        kept = kept[:max_num]
    return torch.cat([boxes[kept], scores[kept, None]], dim=1), kept


@served
def _roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    pool_mode: str = "avg",
    aligned: bool = True,
) -> Tensor | None:
    if pool_mode != "avg" or not servable(input, rois) or not rois.dtype == input.dtype in _EXACT:
        return None
    return ops.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned).contiguous()


@served
def _extractor_forward(
    self: Any, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
) -> Tensor | None:
    arguments = _pooling(self, feats, rois) if roi_scale_factor is None else None
    return None if arguments is None else ops.multiscale_roi_align(*arguments).contiguous()


def _pooling(self: Any, feats: Sequence[Tensor], rois: Tensor) -> tuple[Any, ...] | None:
    """Returns the arguments of `ops.multiscale_roi_align`, or None for an extractor or inputs it does not support."""
    layers = list(self.roi_layers)[: len(feats)]
    if not is_framework_class(self, "mmdet", "SingleRoIExtractor") or len(feats) != len(layers) or not layers:
        return None
    if not all(
        is_framework_class(layer, "mmcv", "RoIAlign") and layer.pool_mode == "avg" for layer in layers
    ):
        return None
    settings = {(tuple(layer.output_size), layer.sampling_ratio, layer.aligned) for layer in layers}
    if len(settings) != 1 or not servable(*feats, rois) or torch.compiler.is_compiling():
        return None
    if any(feat.dtype != torch.float32 for feat in feats) or rois.dim() != 2 or rois.shape[1] != 5:
        return None
    if feats[0].shape[1] != self.out_channels:
        return None
    finest = layers[0].spatial_scale
    if math.frexp(finest)[0] != 0.5:
        return None
    # In pixels of the finest map, mmdetection's rule for levels equals our op's rule with canonical level 0. `finest`
    # is a power of two, so the scaling does not change any rounding.
    rois = rois.to(torch.float32)
    rois = torch.cat([rois[:, :1], rois[:, 1:] * finest], dim=1)
    ((output_size, sampling_ratio, aligned),) = settings
    return (
        list(feats),
        drop_negative_areas(rois) if len(feats) > 1 else rois,
        output_size,
        [layer.spatial_scale / finest for layer in layers],
        sampling_ratio,
        aligned,
        self.finest_scale * finest,
        0,
        1e-6,
    )


@served
def _masks_of_image(
    self: Any,
    mask_preds: Tensor,
    bboxes: Tensor,
    labels: Tensor,
    img_meta: dict[str, Any],
    rcnn_test_cfg: Any,
    rescale: bool = False,
    activate_map: bool = False,
) -> Any:
    if activate_map or not servable(mask_preds, bboxes, labels):
        return None
    unpasted = _unpasted(self, mask_preds, bboxes, labels, img_meta, rcnn_test_cfg, rescale)
    if unpasted is None:
        return None
    masks = unpasted if _DEFER.get() else unpasted.pasted()
    bboxes.copy_(unpasted.boxes)  # mmdetection also scales this tensor in place, and its callers use it
    return masks


def _unpasted(
    self: Any,
    mask_preds: Tensor,
    bboxes: Tensor,
    labels: Tensor,
    img_meta: dict[str, Any],
    rcnn_test_cfg: Any,
    rescale: bool,
) -> _UnpastedMasks | None:
    """Returns the masks of the predicted classes, or None where mmdetection's pasting differs from `ops.paste_masks`.

    For a box without width or height mmdetection paints a stripe, `ops.paste_masks` nothing. The check for such boxes
    costs one host sync.
    """
    threshold = rcnn_test_cfg.mask_thr_binary
    if bboxes.dtype != torch.float32 or len(bboxes) == 0 or not pasting_agrees(mask_preds, threshold):
        return None
    if (threshold < 0 and _DEFER.get()) or len(img_meta["scale_factor"]) != 2:
        return None
    scale_x, scale_y = img_meta["scale_factor"]
    height, width = img_meta["ori_shape"][:2]
    boxes = bboxes
    if rescale:
        boxes = bboxes / bboxes.new_tensor([[scale_x, scale_y, scale_x, scale_y]])
    else:
        factors = bboxes.new_tensor([scale_x, scale_y])
        height, width = np.round(height * factors[1].item()), np.round(width * factors[0].item())
    if not bool(torch.isfinite(boxes).all() & (boxes[:, 2:] > boxes[:, :2]).all()):
        return None
    rows = torch.arange(len(mask_preds), device=mask_preds.device)
    masks = mask_preds[:, 0] if self.class_agnostic else mask_preds[rows, labels]
    return _UnpastedMasks(masks.sigmoid().float(), boxes, (int(height), int(width)), threshold)


def _semantic_loss(original: Function) -> Function:
    def loss_of_batch(self: Any, x: Any, batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        predictions = self(x)["seg_preds"]
        targets = torch.stack([sample.gt_sem_seg.sem_seg for sample in batch_data_samples])
        loss = attempt(_upsampled_loss, self, predictions, targets)
        if loss is not None:
            return {"loss_seg": loss}
        others: dict[str, Tensor] = original(_PrecomputedHead(self, predictions), x, batch_data_samples)
        return others

    return loss_of_batch


class _PrecomputedHead:
    """A semantic head with stored predictions, so that mmdetection's loss does not run the head a second time."""

    def __init__(self, head: Any, predictions: Tensor) -> None:
        self._head = head
        self._predictions = predictions

    def __call__(self, x: Any) -> dict[str, Tensor]:
        return {"seg_preds": self._predictions}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


def _upsampled_loss(self: Any, predictions: Tensor, targets: Tensor) -> Tensor | None:
    """Returns the loss of the semantic head, or None for settings or inputs that our op does not support."""
    criterion = self.loss_seg
    if (
        not is_framework_class(criterion, "mmdet", "CrossEntropyLoss")
        or criterion.use_sigmoid
        or criterion.use_mask
    ):
        return None
    if criterion.reduction != "mean" or not servable(predictions, targets):
        return None
    # On a GPU, autocast computes cross-entropy in float32.
    if predictions.dtype != torch.float32 and not (
        predictions.is_cuda and torch.is_autocast_enabled(predictions.device.type)
    ):
        return None
    if self.seg_rescale_factor != 1.0:
        targets = F.interpolate(targets.float(), scale_factor=self.seg_rescale_factor, mode="nearest")
    targets = self._set_things_to_void(targets)
    if targets.dim() == 4:
        targets = targets.squeeze(1)
    factor = _factor(predictions.shape[2:], targets.shape[1:])
    if factor is None:
        return None
    ignored = -100 if criterion.ignore_index is None else criterion.ignore_index
    weight = None
    if criterion.class_weight is not None:
        weight = predictions.new_tensor(criterion.class_weight, dtype=torch.float32)
    total = ops.upsample_cross_entropy(predictions, targets, factor, ignored, weight, reduction="sum")
    # mmdetection divides by the number of all pixels, including ignored ones, unless avg_non_ignore is set.
    count: Any = targets.numel()
    if criterion.avg_non_ignore:
        count = (targets != ignored).sum() + torch.finfo(torch.float32).eps
    loss: Tensor = criterion.loss_weight * (total / count)
    return loss


def _semantic_predict(original: Function) -> Function:
    def predict(self: Any, x: Any, batch_img_metas: list[dict[str, Any]], rescale: bool = False) -> Any:
        if not _DEFER.get():
            return original(self, x, batch_img_metas, rescale)
        logits = self.forward(x)["seg_preds"]
        height, width = batch_img_metas[0]["batch_input_shape"]
        return [
            _CoarseLogits(
                logits[i : i + 1], (height, width), tuple(meta["img_shape"][:2]), tuple(meta["ori_shape"][:2])
            )
            for i, meta in enumerate(batch_img_metas)
        ]

    return predict


def _fuse(original: Function) -> Function:
    def predict(self: Any, mask_results: Any, seg_preds: Any, **kwargs: Any) -> Any:
        if not isinstance(seg_preds, _CoarseLogits):
            return original(self, mask_results, seg_preds, **kwargs)
        framework = original.__globals__  # type: ignore[attr-defined]
        fused = attempt(_fused, self, mask_results, seg_preds, framework["INSTANCE_OFFSET"])
        if fused is not None:
            return framework["PixelData"](sem_seg=fused[None])
        if isinstance(mask_results.masks, _UnpastedMasks):
            mask_results.masks = mask_results.masks.pasted()
        return original(self, mask_results, seg_preds.upsampled(), **kwargs)

    vars(predict)[_FUSES_DEFERRED] = True
    return predict


def _fused(self: Any, results: Any, coarse: _CoarseLogits, offset: int) -> Tensor | None:
    """Returns the panoptic map int32 [height, width] in mmdetection's encoding, or None where our op would differ."""
    classes = coarse.logits.shape[1]
    if classes != self.num_stuff_classes + 1 or classes > MAX_LABELS:
        return None
    masks, boxes, scores = results.masks, results.bboxes, results.scores
    if isinstance(masks, _UnpastedMasks):
        size, threshold, masks = masks.size, masks.threshold, masks.masks
    elif len(masks) == 0:
        size, threshold = coarse.size, 0.5
    else:
        return None
    if size != coarse.size or not servable(masks, boxes, scores, results.labels):
        return None
    labels = coarse.labels()
    if labels is None or scores.dtype != torch.float32:
        return None
    order = score_order(scores)
    panoptic, segments = ops.panoptic_merge(
        masks[order],
        boxes[order],
        scores[order],
        results.labels[order],
        (labels.to(torch.int16) + 1) % classes,  # things: mmdetection's last channel, our op's label 0
        size,
        score_threshold=-math.inf,
        overlap_threshold=self.test_cfg.mask_overlap,
        stuff_area_threshold=integer_threshold(self.test_cfg.stuff_area_limit),
        mask_threshold=threshold,
        rule="mmdetection",
    )
    encoding = torch.full(
        (len(segments.id) + 1,), self.num_classes, dtype=torch.int32, device=panoptic.device
    )
    of_things, of_stuff = segments.label + offset * segments.id, segments.label + self.num_things_classes - 1
    encoding[1:] = torch.where(segments.isthing, of_things, of_stuff)
    return encoding[panoptic.long()]


def _panoptic_predict(original: Function) -> Function:
    def predict(self: Any, batch_inputs: Tensor, batch_data_samples: Any, rescale: bool = True) -> Any:
        token = _DEFER.set(rescale and servable(batch_inputs) and _can_defer(self))
        try:
            return original(self, batch_inputs, batch_data_samples, rescale)
        finally:
            _DEFER.reset(token)

    return predict


def _can_defer(self: Any) -> bool:
    """Whether all parts of a network are mmdetection's own, so that only the fusion head uses masks and logits."""
    fusion_head: Any = getattr(self, "panoptic_fusion_head", None)
    roi_head = self.roi_head
    parts = (
        (self, "PanopticFPN"),
        (roi_head, "StandardRoIHead"),
        (getattr(roi_head, "mask_head", None), "FCNMaskHead"),
        (getattr(self, "semantic_head", None), "PanopticFPNHead"),
        (fusion_head, "HeuristicFusionHead"),
    )
    return all(is_framework_class(part, "mmdet", name) for part, name in parts) and hasattr(
        fusion_head._predict_single, _FUSES_DEFERRED
    )


_HEADS = "mmdet.models.seg_heads"

FRAMEWORK = Framework(
    package="mmdet",
    distribution="mmdet",
    tested=("3.3.0", "3.3.0"),
    replacements=(
        Replacement("mmcv.ops.nms:nms", "nms", _nms),
        Replacement("mmcv.ops.roi_align:roi_align", "roi_align", _roi_align),
        Replacement(
            "mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor:SingleRoIExtractor.forward",
            "multiscale_roi_align",
            _extractor_forward,
        ),
        Replacement(
            "mmdet.models.roi_heads.mask_heads.fcn_mask_head:FCNMaskHead._predict_by_feat_single",
            "paste_masks",
            _masks_of_image,
        ),
        Replacement(
            f"{_HEADS}.panoptic_fpn_head:PanopticFPNHead.loss", "upsample_cross_entropy", _semantic_loss
        ),
        Replacement(
            f"{_HEADS}.base_semantic_head:BaseSemanticHead.predict", "upsample_argmax", _semantic_predict
        ),
        Replacement(
            f"{_HEADS}.panoptic_fusion_heads.heuristic_fusion_head:HeuristicFusionHead._predict_single",
            "panoptic_merge",
            _fuse,
        ),
        Replacement(
            "mmdet.models.detectors.panoptic_two_stage_segmentor:TwoStagePanopticSegmentor.predict",
            "panoptic_merge",
            _panoptic_predict,
        ),
    ),
)
