"""Pasted instance masks as COCO run-length encodings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference


def paste_masks_rle(
    masks: Tensor, boxes: Tensor, image_size: Sequence[int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Encodes what `paste_masks` would paste, without making it.

    Pixel (0, 0) of the image is sampled at its centre (0.5, 0.5): a mask of ones in the box (10, 10, 20, 20) sets
    exactly the pixels 10..19 along both sides.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in 0..1; float32, float16, bfloat16, float64 or bool.
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image, floating.
        image_size: (height, width) of the image.
        threshold: A pixel is set where the interpolated value is at least this; not negative.

    Returns:
        One {"size": [height, width], "counts": bytes} for each mask: COCO's compressed run lengths, column by column,
        which pycocotools.mask reads and which are the bytes that it would write. For JSON decode `counts` as ASCII.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        Equals pycocotools.mask.encode of paste_masks on the CPU, pixel by pixel. The result is in the host's memory, so
        masks and boxes on a GPU are copied to the host first (one host sync, 3 KB for a mask of 28 x 28) and encoded
        there; their decisions are the GPU's, which computes in the same order. Deterministic. Python dictionaries
        cannot leave a graph: under torch.compile and torch.export use the op below this,
        torch.ops.panfpn_fast.paste_masks_rle(masks, boxes, height, width, threshold) for float32 masks [N, M_h, M_w] on
        the CPU, which returns all strings as one uint8 tensor and int64 offsets [N + 1].

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> ops.paste_masks_rle(torch.ones(1, 28, 28), torch.tensor([[1.0, 1.0, 3.0, 3.0]]), (4, 5))
        [{'size': [4, 5], 'counts': b'52207'}]
    """
    masks = _checks.check_masks(masks)
    _checks.check_boxes("boxes", boxes, masks.shape[0])
    _checks.check_device("boxes", boxes, masks.device, "masks")
    height, width = _checks.image_size_pair(image_size)
    _checks.check_number("threshold", threshold)
    if threshold < 0:
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold}")
    masks = _checks.full_precision(masks)
    boxes = boxes.to(masks.dtype)
    if not _load.native(masks.device):
        return reference.paste_masks_rle(masks, boxes, (height, width), threshold)
    strings, offsets = torch.ops.panfpn_fast.paste_masks_rle(
        masks.cpu(), boxes.cpu(), height, width, threshold
    )
    text, ends = strings.numpy().tobytes(), offsets.tolist()
    return [{"size": [height, width], "counts": text[begin:end]} for begin, end in pairwise(ends)]


@_load.register_fake("paste_masks_rle")
def _fake(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    offsets = masks.new_empty(masks.shape[0] + 1, dtype=torch.int64)
    return masks.new_empty(size, dtype=torch.uint8), offsets
