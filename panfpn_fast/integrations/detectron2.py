"""Replacements for detectron2's functions.

Results equal those of detectron2's own functions. Half-precision inputs therefore go to our ops only where detectron2
computes in float32. Elsewhere detectron2 rounds boxes to bfloat16, for example, and pools from other positions than
our more exact ops would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

_HALF = (torch.float16, torch.bfloat16)
# Field of an Instances object that keeps the masks before pasting, while detectron2 removes instances with empty boxes.
_MASKS_FIELD = "panfpn_fast_masks"


@served
def _pooler_forward(self: Any, x: list[Tensor], box_lists: list[Any]) -> Tensor | None:
    arguments = _pooling(self, x, box_lists)
    return None if arguments is None else ops.multiscale_roi_align(*arguments).contiguous()


def _pooling(self: Any, x: Any, box_lists: Any) -> tuple[Any, ...] | None:
    """Returns the arguments of `ops.multiscale_roi_align`, or None for a pooler or inputs that it does not support."""
    poolers = list(self.level_poolers)
    if not all(is_framework_class(pooler, "detectron2", "ROIAlign") for pooler in poolers):
        return None
    settings = {(tuple(pooler.output_size), pooler.sampling_ratio, pooler.aligned) for pooler in poolers}
    if len(settings) != 1 or not isinstance(x, list) or not isinstance(box_lists, list):
        return None
    if not x or len(x) != len(poolers) or not box_lists:
        return None
    boxes: list[Any] = [getattr(of_image, "tensor", None) for of_image in box_lists]
    if not servable(*x, *boxes) or torch.compiler.is_compiling() or len(boxes) != len(x[0]):
        return None
    if any(value.dtype != torch.float32 for value in (*x, *boxes)):
        return None
    if any(of_image.dim() != 2 or of_image.shape[1] != 4 for of_image in boxes):
        return None
    ((output_size, sampling_ratio, aligned),) = settings
    if len(x) > 1 and output_size[0] != output_size[1]:
        return None
    rois = torch.cat([F.pad(of_image, (1, 0), value=float(i)) for i, of_image in enumerate(boxes)])
    return (
        x,
        drop_negative_areas(rois) if len(x) > 1 else rois,
        output_size,
        [pooler.spatial_scale for pooler in poolers],
        sampling_ratio,
        aligned,
        self.canonical_box_size,
        self.canonical_level,
    )


@served
def _roi_align_forward(self: Any, input: Tensor, rois: Tensor) -> Tensor | None:
    if not servable(input, rois):
        return None
    if input.dtype in _HALF and not torch.is_autocast_enabled(input.device.type):
        return None
    return ops.roi_align(
        input,
        rois.to(input.dtype),
        self.output_size,
        self.spatial_scale,
        self.sampling_ratio,
        self.aligned,
    ).contiguous()


@served
def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor | None:
    if not _suits_nms(boxes, scores) or boxes.dtype != scores.dtype or boxes.dtype in _HALF:
        return None
    return ops.nms(boxes, scores, iou_threshold)


@served
def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor | None:
    if not _suits_nms(boxes, scores, idxs):
        return None
    # torchvision's rule: one NMS over shifted boxes for up to this many coordinates, one NMS per group above it.
    shifted = boxes.numel() <= (4_000 if boxes.device.type == "cpu" else 100_000)
    return ops.batched_nms(boxes.float(), scores, idxs, iou_threshold, "torchvision" if shifted else "class")


def _suits_nms(*tensors: Any) -> bool:
    return servable(*tensors) and not torch.compiler.is_compiling()


@served
def _paste_masks_in_image(
    masks: Tensor, boxes: Any, image_shape: tuple[int, int], threshold: float = 0.5
) -> Tensor | None:
    corners = boxes if isinstance(boxes, Tensor) else getattr(boxes, "tensor", None)
    if corners is None or not _suits_pasting(masks, corners):
        return None
    if len(masks) == 0 or not pasting_agrees(masks, threshold):
        return None
    return ops.paste_masks(masks, corners, image_shape, threshold)


def _suits_pasting(masks: Any, boxes: Any) -> bool:
    return (
        servable(masks, boxes)
        and masks.dim() == 3
        and masks.shape[1] == masks.shape[2]
        and masks.dtype in (torch.float32, torch.bool)
        and boxes.dtype == torch.float32
        and not torch.compiler.is_compiling()
    )


@served
def _semantic_losses(self: Any, predictions: Tensor, targets: Tensor) -> dict[str, Tensor] | None:
    if not servable(predictions, targets):
        return None
    loss = ops.upsample_cross_entropy(predictions.float(), targets, self.common_stride, self.ignore_value)
    return {"loss_sem_seg": loss * self.loss_weight}


def _panoptic_inference(original: Function) -> Function:
    def inference(self: Any, batched_inputs: list[dict[str, Any]], do_postprocess: bool = True) -> Any:
        head = self.sem_seg_head
        if (
            not do_postprocess
            or not servable(self.pixel_mean)
            or not is_framework_class(head, "detectron2", "SemSegFPNHead")
            or head.training
            or head._forward_hooks
            or head._forward_pre_hooks
            or torch.compiler.is_compiling()
        ):
            return original(self, batched_inputs, do_postprocess)

        framework = original.__globals__  # type: ignore[attr-defined]
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        logits = head.layers(features)  # [N, C, H / common_stride, W / common_stride]
        upsampled = F.interpolate(
            logits, scale_factor=head.common_stride, mode="bilinear", align_corners=False
        )
        proposals, _ = self.proposal_generator(images, features, None)
        detections, _ = self.roi_heads(images, features, proposals, None)

        results = []
        for i, (instances, inputs) in enumerate(zip(detections, batched_inputs, strict=True)):
            crop = images.image_sizes[i]
            height, width = inputs.get("height", crop[0]), inputs.get("width", crop[1])
            semantic = framework["sem_seg_postprocess"](upsampled[i], crop, height, width)
            instances, masks = _postprocess(framework["detector_postprocess"], instances, height, width)
            labels = attempt(_labels, logits[i : i + 1], head.common_stride, crop, (height, width))
            if labels is None:
                labels = semantic.argmax(dim=0)
            thresholds = (
                self.combine_overlap_thresh,
                self.combine_stuff_area_thresh,
                self.combine_instances_score_thresh,
            )
            panoptic = attempt(_combine, instances, masks, labels, logits.shape[1], *thresholds)
            if panoptic is None:
                panoptic = framework["combine_semantic_and_instance_outputs"](
                    instances, labels.long(), *thresholds
                )
            results.append({"sem_seg": semantic, "instances": instances, "panoptic_seg": panoptic})
        return results

    return inference


def _postprocess(
    detector_postprocess: Function, instances: Any, height: int, width: int
) -> tuple[Any, Tensor | None]:
    """Runs detector_postprocess; also returns the masks [N, M, M] of the instances that it keeps, before pasting."""
    if not instances.has("pred_masks"):
        return detector_postprocess(instances, height, width), None
    masks = instances.pred_masks
    masks = masks[:, 0] if isinstance(masks, Tensor) else masks.tensor
    instances.set(_MASKS_FIELD, masks)
    processed = detector_postprocess(instances, height, width)
    masks = processed.get(_MASKS_FIELD)
    instances.remove(_MASKS_FIELD)
    processed.remove(_MASKS_FIELD)
    return processed, masks


def _labels(logits: Tensor, stride: int, crop: Sequence[int], size: Sequence[int]) -> Tensor | None:
    """Returns the arg max [height, width] of upsampled logits [1, C, H, W], or None if our op does not support them."""
    if not servable(logits) or logits.dtype != torch.float32 or logits.shape[1] > MAX_LABELS:
        return None
    return ops.upsample_argmax(logits, stride, crop=tuple(crop), size=size)[0]


def _combine(
    instances: Any,
    masks: Tensor | None,
    labels: Tensor,
    classes: int,
    overlap_threshold: float,
    stuff_area_threshold: float,
    score_threshold: float,
) -> tuple[Tensor, list[dict[str, Any]]] | None:
    """Returns the result of combine_semantic_and_instance_outputs, or None where `ops.panoptic_merge` would differ.

    With an overlap threshold of 1 or more, or without a stuff area threshold, detectron2 lists segments that have no
    pixels. `ops.panoptic_merge` leaves them out.
    """
    if masks is None or overlap_threshold >= 1 or stuff_area_threshold <= 0 or classes > MAX_LABELS:
        return None
    boxes, scores = instances.pred_boxes.tensor, instances.scores
    if not servable(labels, masks, boxes, scores, instances.pred_classes):
        return None
    if not _suits_pasting(masks, boxes) or scores.dtype != torch.float32:
        return None
    order = score_order(scores)
    panoptic, segments = ops.panoptic_merge(
        masks[order],
        boxes[order],
        scores[order],
        instances.pred_classes[order],
        labels,
        tuple(labels.shape),
        score_threshold=score_threshold,
        overlap_threshold=overlap_threshold,
        stuff_area_threshold=integer_threshold(stuff_area_threshold),
    )
    unsorted = order.tolist()
    rows = torch.stack(
        [segments.id, segments.isthing, segments.label, segments.area, segments.instance], dim=1
    ).tolist()
    return panoptic, [
        {"id": id, "isthing": True, "score": score, "category_id": label, "instance_id": unsorted[instance]}
        if isthing
        else {"id": id, "isthing": False, "category_id": label, "area": area}
        for (id, isthing, label, area, instance), score in zip(rows, segments.score.tolist(), strict=True)
    ]


FRAMEWORK = Framework(
    package="detectron2",
    distribution="detectron2",
    tested=("0.6", "0.6"),
    replacements=(
        Replacement("detectron2.modeling.poolers:ROIPooler.forward", "multiscale_roi_align", _pooler_forward),
        Replacement("detectron2.layers.roi_align:ROIAlign.forward", "roi_align", _roi_align_forward),
        Replacement("detectron2.layers.nms:nms", "nms", _nms),
        Replacement("detectron2.layers.nms:batched_nms", "batched_nms", _batched_nms),
        Replacement("detectron2.layers.mask_ops:paste_masks_in_image", "paste_masks", _paste_masks_in_image),
        Replacement(
            "detectron2.modeling.meta_arch.semantic_seg:SemSegFPNHead.losses",
            "upsample_cross_entropy",
            _semantic_losses,
        ),
        Replacement(
            "detectron2.modeling.meta_arch.panoptic_fpn:PanopticFPN.inference",
            "panoptic_merge",
            _panoptic_inference,
        ),
    ),
)
