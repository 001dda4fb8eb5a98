"""Pasted instance masks as COCO run-length encodings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register, reference


def paste_masks_rle(
    masks: Tensor, boxes: Tensor, image_size: Sequence[int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Encodes the masks of `paste_masks` as COCO run lengths, without creating the pasted masks.

    Pixel (0, 0) of the image is sampled at its centre (0.5, 0.5). For example, a mask of ones in the box
    (10, 10, 20, 20) sets exactly the pixels 10..19 along both axes.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in 0..1; float32, float16, bfloat16, bool, or float64 on the
            CPU.
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image; float32, float16, bfloat16 or float64.
        image_size: (height, width) of the image.
        threshold: A pixel is set if its interpolated value is at least this; at least 0.

    Returns:
        A dictionary {"size": [height, width], "counts": bytes} for each mask. `counts` are COCO's compressed run
        lengths, column by column, byte for byte as pycocotools.mask writes them. For JSON, decode them as ASCII.

    Raises:
        TypeError: If `masks` or `boxes` is not a tensor of one of these dtypes, `image_size` is not a sequence of
            integers, or `threshold` is not a number.
        ValueError: If `masks` or `boxes` has another shape, they are on different devices, `image_size` is negative or
            does not have two values, or `threshold` is NaN or negative.

    Note:
        Equals pycocotools.mask.encode of the output of `paste_masks`, pixel by pixel. Deterministic. On CUDA the
        strings are made on the GPU and copied to the host. There are three host syncs, for the length of all strings,
        for the strings and for their ends. The largest temporary has a bit for each pixel of the image and each mask,
        at most 128 MiB or those of one mask at a time.

        Python dictionaries cannot leave a graph. Under torch.compile and torch.export, use the dispatcher op
        torch.ops.panfpn_fast.paste_masks_rle(masks, boxes, height, width, threshold) instead. It takes float32 masks
        [N, M_h, M_w] and returns all strings as one uint8 tensor, and their int64 offsets [N + 1], on the device of
        the masks. On CUDA it has one host sync.

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
    strings, offsets = torch.ops.panfpn_fast.paste_masks_rle(masks, boxes, height, width, threshold)
    text, ends = strings.cpu().numpy().tobytes(), offsets.tolist()
    return [{"size": [height, width], "counts": text[begin:end]} for begin, end in pairwise(ends)]


@_register.register_fake("paste_masks_rle")
def _fake(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    offsets = masks.new_empty(masks.shape[0] + 1, dtype=torch.int64)
    return masks.new_empty(size, dtype=torch.uint8), offsets
