"""Merges instances and semantic labels into one panoptic map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register, reference
from panfpn_fast.ops.reference import PanopticSegments

__all__ = ["PanopticSegments", "panoptic_merge"]

Rule = Literal["detectron2", "mmdetection", "panopticapi"]

_LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def check_arguments(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    semantic: Tensor,
    image_size: Sequence[int],
    score_threshold: float,
    overlap_threshold: float,
    stuff_area_threshold: int,
    mask_threshold: float,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Checks the arguments of both merging ops; returns (masks, boxes, scores, classes, height, width).

    The tensors have the shapes and dtypes that the dispatcher ops take.
    """
    masks = _checks.check_masks(masks)
    _checks.check_boxes("boxes", boxes, masks.shape[0])
    _checks.check_tensor("scores", scores, _checks.FLOATING, "[N]", (1,))
    _checks.check_rows("scores", scores, masks.shape[0], "the masks")
    _checks.check_tensor("classes", classes, _checks.INTEGER, "[N]", (1,))
    _checks.check_rows("classes", classes, masks.shape[0], "the masks")
    height, width = _checks.image_size_pair(image_size)
    _checks.check_tensor("semantic", semantic, _LABEL_DTYPES, "[height, width]", (2,))
    if semantic.shape[0] != height or semantic.shape[1] != width:
        raise ValueError(
            f"semantic: expected shape {[height, width]}, which is image_size, got {list(semantic.shape)}"
        )
    for name, value in (("boxes", boxes), ("scores", scores), ("classes", classes), ("semantic", semantic)):
        _checks.check_device(name, value, masks.device, "masks")
    _checks.check_number("score_threshold", score_threshold)
    _checks.check_number("overlap_threshold", overlap_threshold)
    _checks.check_int("stuff_area_threshold", stuff_area_threshold)
    _checks.check_number("mask_threshold", mask_threshold)
    if rule not in get_args(Rule):
        raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}")

    masks, scores, classes = _checks.full_precision(masks), scores.to(torch.float32), classes.to(torch.int64)
    return masks, boxes.to(masks.dtype), scores, classes, height, width


def segments_of(table: Tensor, scores: Tensor) -> PanopticSegments:
    """Splits the table of the dispatcher ops, rows of (id, isthing, label, area, instance), and adds the scores."""
    id, isthing, label, area, instance = table.unbind(1)
    # The instance of stuff is -1, so its score is the zero that is appended here.
    score = torch.cat([scores, scores.new_zeros(1)])[instance]
    return PanopticSegments(id.to(torch.int32), isthing.to(torch.bool), label, score, area, instance)


def panoptic_merge(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    semantic: Tensor,
    image_size: Sequence[int],
    *,
    score_threshold: float = 0.5,
    overlap_threshold: float = 0.5,
    stuff_area_threshold: int = 4096,
    mask_threshold: float = 0.5,
    rule: Rule = "detectron2",
) -> tuple[Tensor, PanopticSegments]:
    """Assigns each pixel to one instance, to one stuff class or to void.

    Instances are placed by descending score; equal scores keep their given order. An instance is dropped if more than
    a given share of its pasted mask is already taken. Otherwise it gets the pixels of its mask that are still free.
    The pixels that remain get their semantic label, unless too few pixels with this label remain.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in 0..1; float32, float16, bfloat16, bool, or float64 on the
            CPU.
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image; float32, float16, bfloat16 or float64.
        scores: [N]; float32, float16, bfloat16 or float64. They are compared in float32.
        classes: Thing class of each instance, [N], any integer dtype.
        semantic: Label map [height, width]; uint8, int16, int32 or int64. Labels 1..4095 are stuff. All others are
            void, including 0, the label of things and other pixels.
        image_size: (height, width) of the image.
        score_threshold: Instances with a lower score are dropped. mmdetection's merger has no such threshold;
            float("-inf") reproduces this.
        overlap_threshold: An instance is dropped if more than this share of its mask is already taken.
        stuff_area_threshold: A stuff class is dropped if fewer pixels than this remain for it.
        mask_threshold: A pixel belongs to an instance if its value in the pasted mask is at least this.
        rule: The framework whose rules decide corner cases: "detectron2", "mmdetection" or "panopticapi"; see Note.

    Returns:
        A tuple of the panoptic map, int32 [height, width] with 0 for void, and its `PanopticSegments`, one row per
        segment, both on the device of `masks`. Things come first, in the order in which they were placed, with ids
        from 1. Stuff follows by ascending label. Each segment has at least one pixel.

    Raises:
        TypeError: If a tensor argument is not a tensor of one of these dtypes, or another argument is not of the type
            in the signature.
        ValueError: If a tensor has another shape, the tensors are on different devices, a threshold is NaN, or `rule`
            is another string.

    Note:
        The following holds for all rules. An instance is kept if exactly `overlap_threshold` of it is taken, and stuff
        if exactly `stuff_area_threshold` pixels remain. The share is relative to the whole pasted mask. Empty masks are
        skipped. Stuff pixels are counted after all things are placed. Equal scores keep their given order, whereas
        detectron2 and mmdetection sort unstably. NaN scores come last. The rules differ as follows:

        - "detectron2", combine_semantic_and_instance_outputs: the share is claimed / area in float64. The first score
          below the threshold ends the placement of instances, so all later ones are dropped, including NaN scores.
        - "panopticapi", combine_semantic_and_instance_predictions: the same share. Each instance below the threshold is
          dropped on its own. NaN is not below the threshold, so instances with NaN scores are placed.
        - "mmdetection", HeuristicFusionHead: the share is claimed / (area + 1e-5), computed and compared in float32.
          Scores are handled as in "detectron2".

        All rules give ids from 1 and void 0, and omit segments without pixels. detectron2 lists these if
        `overlap_threshold` is 1 or more, and panopticapi if there is no stuff area threshold. mmdetection's map
        contains `label + 1000 * id` for things, `80 + label - 1` for stuff (with 80 things) and 133 for void.
        panopticapi's ids are colours, which are random for things. For all rules, 0 in `semantic` stands for things and
        other pixels. mmdetection's semantic head has channels 0..52 for stuff and 53 for things, so its arg max `k` is
        passed as `(k + 1) % 54`. For a box without width or height, mmdetection pastes a stripe; this op pastes
        nothing.

        Masks are pasted as in `paste_masks`, without allocating [N, height, width]. On CUDA they are pasted as bits, at
        most 64 MiB or those of one instance at a time. Deterministic. On CUDA there is one host sync, which reads the
        number of segments; `panoptic_merge_padded` has none.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> panoptic, segments = ops.panoptic_merge(
        ...     torch.ones(1, 28, 28), torch.tensor([[0.0, 0.0, 64.0, 64.0]]), torch.tensor([0.9]),
        ...     torch.tensor([17]), torch.full((128, 128), 3), (128, 128))
        >>> segments.label, segments.area
        (tensor([17,  3]), tensor([ 4096, 12288]))
    """
    masks, boxes, scores, classes, height, width = check_arguments(
        masks,
        boxes,
        scores,
        classes,
        semantic,
        image_size,
        score_threshold,
        overlap_threshold,
        stuff_area_threshold,
        mask_threshold,
        rule,
    )
    if not _load.native(masks.device):
        return reference.panoptic_merge(
            masks,
            boxes,
            scores,
            classes,
            semantic,
            (height, width),
            score_threshold=score_threshold,
            overlap_threshold=overlap_threshold,
            stuff_area_threshold=stuff_area_threshold,
            mask_threshold=mask_threshold,
            rule=rule,
        )
    panoptic, table = torch.ops.panfpn_fast.panoptic_merge(
        masks,
        boxes,
        scores,
        classes,
        semantic,
        score_threshold,
        overlap_threshold,
        stuff_area_threshold,
        mask_threshold,
        rule,
    )
    return panoptic, segments_of(table, scores)


@_register.register_fake("panoptic_merge")
def _fake(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    semantic: Tensor,
    score_threshold: float,
    overlap_threshold: float,
    stuff_area_threshold: int,
    mask_threshold: float,
    rule: str,
) -> tuple[Tensor, Tensor]:
    segments = torch.library.get_ctx().new_dynamic_size()
    panoptic = masks.new_empty(tuple(semantic.shape), dtype=torch.int32)
    return panoptic, masks.new_empty((segments, 5), dtype=torch.int64)
