"""Merging of instances and semantic labels into one panoptic map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference
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
    """Checks what both forms of merging take; returns masks, boxes, scores and classes as the ops want them."""
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
            f"semantic: expected shape {[height, width]}, as image_size, got {list(semantic.shape)}"
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
    """Splits the ops' table, rows of (id, isthing, label, area, instance), and looks up the scores."""
    id, isthing, label, area, instance = table.unbind(1)
    # The zero at the end is what -1, the instance of stuff, reads.
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
    """Gives each pixel to one instance, to one stuff label or to nothing.

    Instances come by descending score, equal scores in their given order. Each takes the pixels of its pasted mask
    that are still free, unless more than a share of them is taken already. What stays free goes to its semantic
    label, unless too few pixels of that label are left.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in 0..1; float32, float16, bfloat16, float64 or bool.
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image, floating.
        scores: [N], floating; compared in float32.
        classes: Thing class of each instance [N], any integers.
        semantic: Label map [height, width], uint8, int16, int32 or int64; 1..4095 are stuff, everything else is void,
            as 0 is for things and other.
        image_size: (height, width) of the image.
        score_threshold: Instances below this are dropped. mmdetection's merger has no such threshold: float("-inf")
            gives that.
        overlap_threshold: An instance is dropped when more than this share of its mask is taken.
        stuff_area_threshold: Stuff with fewer pixels left than this is dropped.
        mask_threshold: A pixel belongs to an instance where the pasted mask is at least this.
        rule: Whose rules decide the corners: "detectron2", "mmdetection" or "panopticapi"; see Note.

    Returns:
        The panoptic map, int32 [height, width] with 0 = void, and its `PanopticSegments`: one row per segment, things
        in the order they were placed with ids 1.., then stuff by ascending label. No segment is without pixels.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        In all rules a share of exactly `overlap_threshold` is kept, so is stuff of exactly `stuff_area_threshold`
        pixels, the share is of the whole pasted mask, empty masks are skipped, and equal scores keep their given order
        (detectron2 and mmdetection sort unstably); a NaN score comes last. Stuff is counted over the pixels that things
        leave. The rules differ so:

        - "detectron2", combine_semantic_and_instance_outputs: claimed / area in float64; the first score below the
          threshold ends the instances, and with them the NaN at the end.
        - "panopticapi", combine_semantic_and_instance_predictions: the same share; every instance below the threshold
          is dropped by itself, so that NaN, which is not below, still has its turn.
        - "mmdetection", HeuristicFusionHead: claimed / (area + 1e-5) and the comparison in float32; scores as
          "detectron2".

        All rules give ids 1.. and void 0, and a segment without pixels is left out, where detectron2 lists it for an
        `overlap_threshold` of 1 or more and panopticapi without a stuff area threshold. mmdetection's map has
        `label + 1000 * id` at a thing, `80 + label - 1` at stuff (80 things) and 133 at void; panopticapi's ids are
        colours, drawn at random for things. `semantic` keeps 0 for things and other in all rules: mmdetection's
        channels are 0..52 for stuff and 53 for things, so its arg max `k` is given as `(k + 1) % 54`. mmdetection
        pastes a stripe for a box without width or height; here it pastes nothing.

        Masks are pasted as by `paste_masks`. Never makes N x height x width. Deterministic; on CUDA one host sync, for
        the number of segments: `panoptic_merge_padded` has none.

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


@_load.register_fake("panoptic_merge")
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
